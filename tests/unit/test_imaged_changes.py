"""Dockerfile instructions of import and commit: what each makes of a config, as moby's builder does."""

from __future__ import annotations

from typing import Any

import pytest

from pyx_bus import errors
from pyx_imaged import changes

S = 10**9


@pytest.mark.parametrize(
    ("before", "line", "after"),
    [
        ({}, 'CMD ["a", "b c"]', {"Cmd": ["a", "b c"]}),
        ({}, "cmd a b", {"Cmd": ["/bin/sh", "-c", "a b"]}),
        ({"Shell": ["/bin/ash", "-ec"]}, "CMD a", {"Shell": ["/bin/ash", "-ec"], "Cmd": ["/bin/ash", "-ec", "a"]}),
        ({}, "CMD ['a']", {"Cmd": ["/bin/sh", "-c", "['a']"]}),
        ({}, "CMD []", {"Cmd": []}),
        ({"Cmd": ["x"]}, 'ENTRYPOINT ["e"]', {"Entrypoint": ["e"]}),
        ({"Env": ["A=1", "B=2"]}, "ENV A=3 C=4", {"Env": ["A=3", "B=2", "C=4"]}),
        ({}, "ENV A=b\\ c D='$E f' G=\"h i\"", {"Env": ["A=b c", "D=$E f", "G=h i"]}),
        ({}, "ENV A the rest  of it", {"Env": ["A=the rest  of it"]}),
        ({"Env": ["P=/bin"]}, "ENV P=$P:/x Q=${P}y", {"Env": ["P=/bin:/x", "Q=/biny"]}),
        (
            {"Env": ["P=/bin"]}, "ENV A=${N:-no} B=${P:-no} C=${P:+yes} D=${N:+yes} E=\\$P",
            {"Env": ["P=/bin", "A=no", "B=/bin", "C=yes", "D=", "E=$P"]},
        ),
        ({}, "ENV A=x=y", {"Env": ["A=x=y"]}),
        ({}, "ENV PATH=$PATH:/x", {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/x"]}),
        (
            {"ExposedPorts": {"1/tcp": {}}}, "EXPOSE 80 53/udp 3-4",
            {"ExposedPorts": {"1/tcp": {}, "80/tcp": {}, "53/udp": {}, "3/tcp": {}, "4/tcp": {}}},
        ),
        ({"Env": ["PORT=99"]}, "EXPOSE $PORT", {"Env": ["PORT=99"], "ExposedPorts": {"99/tcp": {}}}),
        ({"Labels": {"a": "1"}}, 'LABEL a=2 "b c"="d e"', {"Labels": {"a": "2", "b c": "d e"}}),
        ({}, "HEALTHCHECK NONE", {"Healthcheck": {"Test": ["NONE"]}}),
        ({}, "HEALTHCHECK CMD a || b", {"Healthcheck": {"Test": ["CMD-SHELL", "a || b"]}}),
        (
            {}, 'HEALTHCHECK --interval=1m30s --timeout=1.5s --start-period=300ms --start-interval=2s --retries=4 CMD ["a", "b"]',
            {"Healthcheck": {
                "Test": ["CMD", "a", "b"], "Interval": 90 * S, "Timeout": 3 * S // 2, "StartPeriod": 3 * S // 10, "StartInterval": 2 * S,
                "Retries": 4,
            }},
        ),
        ({"OnBuild": ["RUN a"]}, "ONBUILD COPY $x /y", {"OnBuild": ["RUN a", "COPY $x /y"]}),
        ({}, "STOPSIGNAL SIGRTMIN+3", {"StopSignal": "SIGRTMIN+3"}),
        ({"Env": ["U=me"]}, "USER $U:1", {"Env": ["U=me"], "User": "me:1"}),
        ({"Volumes": {"/a": {}}}, 'VOLUME ["/b", "/c d"]', {"Volumes": {"/a": {}, "/b": {}, "/c d": {}}}),
        ({}, "VOLUME /b /c", {"Volumes": {"/b": {}, "/c": {}}}),
        ({"WorkingDir": "/a"}, "WORKDIR b/../c/", {"WorkingDir": "/a/c"}),
        ({"WorkingDir": "/a"}, "WORKDIR /", {"WorkingDir": "/"}),
        ({}, "WORKDIR b", {"WorkingDir": "/b"}),
    ],
)  # fmt: skip
def test_instructions(before: dict[str, Any], line: str, after: dict[str, Any]) -> None:
    kept = repr(before)
    assert changes.apply(before, [line]) == after
    assert repr(before) == kept  # the given config stays as it is


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("RUN make", "unknown instruction"), ("", "unknown instruction"), ("ENV", "without an argument"), ("ENV A", "key=value"),
        ("ENV =b", "key=value"), ("ENV A='b", "quote isn't closed"), ("ENV A=1 B", "key=value"), ("ENV A=${B:?no}", "unsupported form"),
        ("EXPOSE 0", "invalid port"), ("EXPOSE 70000", "invalid port"), ("EXPOSE x", "invalid"), ("EXPOSE 1/icmp", "unknown protocol"),
        ("STOPSIGNAL a b", "signal's name"), ("ONBUILD ONBUILD RUN x", "isn't allowed"), ("ONBUILD from x", "isn't allowed"),
        ("HEALTHCHECK", "without an argument"), ("HEALTHCHECK RUN x", "must be NONE"), ("HEALTHCHECK CMD", "must be NONE"),
        ("HEALTHCHECK NONE x", "takes no arguments"), ("HEALTHCHECK --interval=5 CMD x", "invalid duration"),
        ("HEALTHCHECK --interval=1us CMD x", "below a millisecond"), ("HEALTHCHECK --retries=-1 CMD x", "retries must be"),
        ("HEALTHCHECK --nosuch=1 CMD x", "unknown option"), ("VOLUME [\"\"]", "must be paths"), ("USER $NOBODY", "nothing is left"),
    ],
)  # fmt: skip
def test_refusals(line: str, message: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=message):
        changes.apply({}, [line])


def test_an_entry_point_takes_the_command_with_it() -> None:
    config = {"Cmd": ["old"], "Entrypoint": ["e"]}
    assert changes.commit(config, []) == config
    assert changes.commit(config, ['ENTRYPOINT ["n"]']) == {"Entrypoint": ["n"]}
    assert changes.commit(config, ['CMD ["c"]', 'ENTRYPOINT ["n"]']) == {"Entrypoint": ["n"], "Cmd": ["c"]}
    assert changes.commit(config, ['ENTRYPOINT ["n"]', 'CMD ["c"]']) == {"Entrypoint": ["n"], "Cmd": ["c"]}
    assert changes.commit(config, ["ENTRYPOINT []"]) == config
    assert changes.commit(config, ["CMD []"]) == {"Entrypoint": ["e"], "Cmd": []}
    assert changes.commit({"Cmd": ["old"]}, ["CMD []"]) == {"Cmd": ["old"]}

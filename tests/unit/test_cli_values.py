"""Sizes, durations, times, environments, ulimits; ports; mounts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyx_cli import mounts, ports, values
from pyx_cli.grammar import CliError


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("100", 100), ("512b", 512), ("1k", 1024), ("1kb", 1024), ("64KiB", 65536), ("512m", 512 << 20), ("1.5g", 3 << 29),
     ("2T", 2 << 40), ("1 g", 1 << 30)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert values.size_bytes(text, "-m") == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1x", "nan", "inf", "1gg", "m", "1e3g"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(CliError, match="invalid size") as caught:
        values.size_bytes(text, "-m, --memory")
    assert caught.value.status == 125


@pytest.mark.parametrize(
    ("text", "ns"),
    [("0", 0), ("10m", 600 * 10**9), ("1h30m", 5400 * 10**9), ("1.5s", 1_500_000_000), ("100ms", 10**8), ("-2s", -2 * 10**9),
     ("1d", 86400 * 10**9), ("9999h0.5s", 9999 * 3600 * 10**9 + 5 * 10**8)],
)  # fmt: skip
def test_durations(text: str, ns: int) -> None:
    assert values.duration_ns(text, "--since") == ns


@pytest.mark.parametrize("text", ["", "10", "m", "1x", "1.2.3s", "s1"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(CliError, match="invalid duration"):
        values.duration_ns(text, "--since")


@given(st.text(max_size=12))
def test_a_value_is_understood_or_refused_in_words(text: str) -> None:
    for parse in (values.size_bytes, values.duration_ns):
        try:
            assert isinstance(parse(text, "--x"), int)
        except CliError:
            pass
    for other in (ports.publish, ports.expose, mounts.tmpfs, values.ulimit, values.nano_cpus):
        try:
            other(text)
        except CliError:
            pass
    for mount in (mounts.volume, mounts.mount):
        try:
            mount(text, "/cwd")
        except CliError:
            pass


def test_times() -> None:
    now = 1_700_000_000 * 10**9
    assert values.timestamp_ns("1700000000.5", "--since", now) == 1_700_000_000_500_000_000
    assert values.timestamp_ns("10m", "--since", now) == now - 600 * 10**9
    assert values.timestamp_ns("2013-01-02T13:23:37Z", "--since", now) == 1357133017 * 10**9
    assert values.timestamp_ns("2013-01-02T13:23:37.123456789Z", "--since", now) == 1357133017_123456789
    assert values.timestamp_ns("2013-01-02T14:23:37+01:00", "--since", now) == 1357133017 * 10**9
    assert values.timestamp_ns("2013-01-02", "--since", now) % 900 == 0
    with pytest.raises(CliError, match="RFC 3339"):
        values.timestamp_ns("yesterday", "--since", now)


def test_environment(tmp_path: object) -> None:
    path = f"{tmp_path}/env"
    with open(path, "w") as file:
        file.write("\ufeff# comment\n\nA=1\n  B=x y\nHOST\nGONE\n")
    assert values.environment(["C=", "HOST", "GONE", "D=a=b"], [path], {"HOST": "h"}) == [
        "A=1",
        "B=x y",
        "HOST=h",
        "C=",
        "HOST=h",
        "D=a=b",
    ]
    with open(path, "w") as file:
        file.write("A B=1\n")
    with pytest.raises(CliError, match="contains whitespaces"):
        values.environment([], [path], {})
    with pytest.raises(CliError, match="no such file"):
        values.environment([], [f"{tmp_path}/none"], {})
    with pytest.raises(CliError, match="invalid environment variable"):
        values.environment(["=x"], [], {})


def test_ulimits() -> None:
    assert values.ulimit("nofile=1024:2048") == {"name": "nofile", "soft": 1024, "hard": 2048}
    assert values.ulimit("core=-1") == {"name": "core", "soft": -1, "hard": -1}
    for text in ("x=1", "nofile", "nofile=a", "nofile=3:2", "nofile=-1:5"):
        with pytest.raises(CliError):
            values.ulimit(text)


def _short(mappings: list[dict[str, object]]) -> list[tuple[object, ...]]:
    return [(m["host_ip"], m["host_port"], m["container_port"], m["protocol"]) for m in mappings]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80", [("", 0, 80, "tcp")]),
        ("8080:80", [("", 8080, 80, "tcp")]),
        ("0:80", [("", 0, 80, "tcp")]),
        ("53:53/udp", [("", 53, 53, "udp")]),
        ("127.0.0.1:8080:80", [("127.0.0.1", 8080, 80, "tcp")]),
        ("127.0.0.1::80", [("127.0.0.1", 0, 80, "tcp")]),
        ("[::1]:8080:80/TCP", [("::1", 8080, 80, "tcp")]),
        ("[::1]::80", [("::1", 0, 80, "tcp")]),
        ("8000-8001:80-81", [("", 8000, 80, "tcp"), ("", 8001, 81, "tcp")]),
        ("80-81", [("", 0, 80, "tcp"), ("", 0, 81, "tcp")]),
        ("target=80,published=8080,protocol=udp", [("", 8080, 80, "udp")]),
    ],
)
def test_published_ports(text: str, expected: list[tuple[object, ...]]) -> None:
    assert _short(ports.publish(text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no port specified"), ("x:80", "invalid port"), ("80:99999", "invalid port"), ("1-2:3", "invalid ranges"),
        ("5-4:5-4", "smaller than the start"), ("300.1.1.1:1:2",
         "invalid IP"), ("[::1]:80", "ip::container"), ("80/sctpx", "invalid proto"),
        ("a:b:c:d", "invalid"),
    ],
)  # fmt: skip
def test_bad_ports(text: str, message: str) -> None:
    with pytest.raises(CliError, match=message) as caught:
        ports.publish(text)
    assert caught.value.status == 125


def test_exposed_ports() -> None:
    assert ports.expose("80") == ["80/tcp"]
    assert ports.expose("3000-3002/udp") == ["3000/udp", "3001/udp", "3002/udp"]


def test_ports_are_shown_as_docker_shows_them() -> None:
    assert ports.merge([{"container_port": 80, "host_port": 8080}]) == "0.0.0.0:8080->80/tcp"
    assert ports.merge([{"container_port": 80, "host_port": 8080, "host_ip": "::"}]) == "[::]:8080->80/tcp"
    assert (
        ports.merge([{"container_port": p, "host_port": p + 8000} for p in (80, 81, 82)])
        == "0.0.0.0:8080-8082->80-82/tcp"
    )
    assert ports.merge([{"container_port": 80}, {"container_port": 53, "protocol": "udp"}]) == "53/udp, 80/tcp"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data", {"type": "volume", "target": "/data"}),
        ("vol:/data", {"type": "volume", "source": "vol", "target": "/data"}),
        (
            "vol:/data/:ro,nocopy",
            {"type": "volume", "source": "vol", "target": "/data", "read_only": True, "no_copy": True},
        ),
        ("/a:/b", {"type": "bind", "source": "/a", "target": "/b", "create_source": True}),
        ("./a:/b:z", {"type": "bind", "source": "/cwd/a", "target": "/b", "create_source": True, "selinux_label": "z"}),
        (
            "../a:/b:rshared,cached",
            {"type": "bind", "source": "/a", "target": "/b", "create_source": True, "propagation": "rshared"},
        ),
    ],
)
def test_volumes(text: str, expected: dict[str, object]) -> None:
    assert mounts.volume(text, "/cwd") == expected


@pytest.mark.parametrize(
    "text", ["", ":", "a:", ":/b", "a:b", "/a:/", "v:/b:what", "a b:/c", "x:/b", "a:/b:ro:rw", "vol:/b:rshared"]
)
def test_bad_volumes(text: str) -> None:
    with pytest.raises(CliError) as caught:
        mounts.volume(text, "/cwd")
    assert caught.value.status == 125


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("type=bind,source=/a,target=/b,readonly", {"type": "bind", "source": "/a", "target": "/b", "read_only": True}),
        ("type=bind,src=/a,dst=/b,bind-propagation=shared", {"type": "bind", "source": "/a", "target": "/b", "propagation": "shared"}),
        ("source=v,destination=/b,volume-nocopy", {"type": "volume", "source": "v", "target": "/b", "no_copy": True}),
        ('type=bind,"source=/a,b",target=/c,ro=false', {"type": "bind", "source": "/a,b", "target": "/c", "read_only": False}),
        ("type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=700", {"type": "tmpfs",
         "target": "/t", "tmpfs_size_bytes": 1 << 20, "tmpfs_mode": 0o700}),
        ("target=/b,volume-driver=d,volume-opt=a=b,volume-label=c=d",
         {"type": "volume", "target": "/b", "driver": "d", "driver_options": {"a": "b"}, "labels": {"c": "d"}}),
    ],
)  # fmt: skip
def test_mounts(text: str, expected: dict[str, object]) -> None:
    assert mounts.mount(text, "/cwd") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "pair"), ("type=bind,target=/b", "source is required"), ("type=bind,source=/a",
         "target is required"), ("type=x,target=/b", "invalid mount type"),
        ("type=tmpfs,source=/a,target=/b", "source must not"), ("type=bind,source=a,target=/b",
         "must be absolute"), ("what=1,target=/b", "unexpected key"),
        ("type=bind,source=/a,target=/b,tmpfs-size=1", "cannot mix"), ('"a', "quoted"), ("type=tmpfs,target=/t,tmpfs-mode=9", "octal"),
    ],
)  # fmt: skip
def test_bad_mounts(text: str, message: str) -> None:
    with pytest.raises(CliError, match=message) as caught:
        mounts.mount(text, "/cwd")
    assert caught.value.status == 125


def test_tmpfs() -> None:
    assert mounts.tmpfs("/run") == {"type": "tmpfs", "target": "/run"}
    assert mounts.tmpfs("/run:size=64m,mode=755,noexec,ro") == {
        "type": "tmpfs", "target": "/run", "tmpfs_size_bytes": 64 << 20,
        "tmpfs_mode": 0o755, "tmpfs_options": ["noexec"], "read_only": True,
    }  # fmt: skip

"""pyx events and pyx system bus, as a person and as a monitoring tool use them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import Any

import pytest
from tests.e2e.conftest import wait_for

PAST = ("--until", "0s")


@pytest.fixture
def life(stack: Any, request: pytest.FixtureRequest) -> str:
    """A container that came and went; its name."""
    name = "life-" + request.node.name.removeprefix("test_").partition("[")[0].replace("_", "-")[:40]
    stack.pyx("run", "--rm", "--name", name, "--label", "tier=web", "busybox", "true", check=True)
    return name


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_records_for_programs_can_be_resumed_at_an_offset(stack: Any, life: str) -> None:
    told = records(stack.pyx("events", "--since", "1m", *PAST, "--json", "-f", f"container={life}", check=True).stdout)
    assert [one["topic"] for one in told] == [
        f"container.{what}" for what in ("create", "attach", "start", "die", "destroy")
    ]
    assert {one["source"] for one in told} == {"containerd"}
    assert told[3]["payload"]["attributes"]["exitCode"] == "0"
    died = told[3]["payload"]  # the short life of true may have ended before it was known to have begun
    assert (died["exit_code"], died["signal"], died["oom_killed"], died["run_time_ns"] >= 0) == (0, 0, False, True)
    offsets = [one["offset"] for one in told]
    assert offsets == sorted(set(offsets))
    again = stack.pyx(
        "events", "--since", f"offset:{offsets[2]}", *PAST, "--json", "-f", f"container={life}", check=True
    )
    assert records(again.stdout) == told[2:]
    assert len({one["journal"] for one in told}) == 1


def test_what_is_not_wanted_is_left_out(stack: Any, life: str) -> None:
    def actions(*filters: str) -> list[str]:
        arguments = [word for one in filters for word in ("-f", one)]
        out: str = stack.pyx("events", "--since", "1m", *PAST, "--format", "{{.Action}}", *arguments, check=True).stdout
        return out.split()

    mine = f"container={life}"
    assert actions(mine, "event!=create", "event!=attach") == ["start", "die", "destroy"]
    assert actions(mine, "type!=container", "type!=network") == []
    assert actions(mine, "label=tier=web", "event=die") == ["die"]
    assert actions(mine, "label=tier=db") == []
    assert actions(mine, "scope=swarm") == []
    assert "connect" in actions("type=network")


def test_a_durable_name_goes_on_where_it_stopped(stack: Any, life: str) -> None:
    name = "shipper"

    def read(*options: str) -> list[str]:
        out: str = stack.pyx("events", "--durable", name, *options, *PAST, "--format", "{{.Action}}", check=True).stdout
        return out.split()

    assert read("--since", "beginning", "-f", f"container={life}")[-1] == "destroy"
    assert read("-f", f"container={life}") == []
    stack.pyx("run", "--rm", "--name", f"{life}-2", "busybox", "true", check=True)
    assert read("-f", f"container={life}-2") == ["create", "attach", "start", "die", "destroy"]
    shown = stack.pyx("system", "bus", check=True).stdout
    assert any(line.split()[:2] == [name, "0"] for line in shown.splitlines())
    assert stack.pyx("system", "forget", name).stdout == f"{name}\n"
    gone = stack.pyx("system", "forget", name)
    assert gone.returncode == 1 and "no durable subscription" in gone.stderr


def position(stack: Any, name: str) -> int:
    """The next event a durable subscription wants; 0 if there's none of that name."""
    stats = json.loads(stack.pyx("system", "bus", "--format", "json", check=True).stdout)
    return next((int(one["offset"]) for one in stats["durables"] if one["name"] == name), 0)


def next_offset(stack: Any) -> int:
    return int(json.loads(stack.pyx("system", "bus", "--format", "json", check=True).stdout)["next_offset"])


def test_a_durable_reader_that_is_killed_sees_again_only_what_it_did_not_write(stack: Any, life: str) -> None:
    options = [
        "events",
        "--durable",
        "killed",
        "-f",
        "type=container",
        "--format",
        '{{.Action}} {{index .Actor.Attributes "name"}}',
    ]
    watcher = stack.popen(*options, "--since", "offset:1", stdout=subprocess.PIPE)
    try:
        assert watcher.stdout is not None
        while watcher.stdout.readline() != f"destroy {life}\n".encode():
            pass
        end = next_offset(stack)
        wait_for(lambda: position(stack, "killed") == end, 10, "the acknowledgement of what was written")
    finally:
        watcher.send_signal(signal.SIGKILL)
        watcher.wait(10)
    stack.pyx("run", "--rm", "--name", f"{life}-2", "busybox", "true", check=True)
    rest = stack.pyx(*options, *PAST, check=True).stdout.splitlines()
    assert rest[-5:] == [f"{what} {life}-2" for what in ("create", "attach", "start", "die", "destroy")]
    assert f"create {life}" not in rest
    stack.pyx("system", "forget", "killed", check=True)


def test_what_a_reader_left_in_the_pipe_comes_again(stack: Any, life: str) -> None:
    options = ["events", "--durable", "piped", "-f", f"container={life}", "--format", "{{.Action}}"]
    seen = records(
        stack.pyx("events", "--since", "beginning", *PAST, "--json", "-f", f"container={life}", check=True).stdout
    )
    attached = seen[1]["offset"]
    reader, writer = os.pipe()
    watcher = stack.popen(*options, "--since", "beginning", stdout=writer)
    os.close(writer)
    try:
        read = b""
        while len(read) < 14:
            read += os.read(reader, 14 - len(read))
        assert read == b"create\nattach\n"
        wait_for(lambda: position(stack, "piped") == attached + 1, 10, "the acknowledgement of what was read")
        os.close(reader)  # it ends, with the rest still in the pipe
        stack.pyx("run", "--rm", "--name", f"{life}-2", "busybox", "true", check=True)  # so that the watcher notices
    finally:
        watcher.kill()
        watcher.wait(10)
    # A pipe tells how many bytes were taken: what was acknowledged is exactly what was read.
    assert stack.pyx(*options, *PAST, check=True).stdout.split() == ["start", "die", "destroy"]
    stack.pyx("system", "forget", "piped", check=True)


def test_bad_questions_are_answered_clearly(stack: Any) -> None:
    for options, status, said in (
        (["-f", "colour=red"], 1, "invalid filter 'colour'"),
        (["-f", "type="], 1, "invalid filter 'type=': it has no value"),
        (["-f", "type"], 125, "bad format of filter"),
        (["--since", "offset:x"], 125, 'invalid argument "offset:x" for "--since" flag: an offset is a number'),
        (["--since", "offset:"], 125, "an offset is a number"),
        (["--since", "yesterday"], 125, 'invalid argument "yesterday" for "--since" flag'),
        (["--since", "offset:99999999"], 1, "beyond the journal's end"),
        (["--durable", "../x"], 1, "can't name a durable subscription"),
        (["--json", "--format", "{{.Action}}"], 125, "exclude each other"),
        (["--format", "table {{.Action}}"], 125, "not as a table"),
    ):
        answer = stack.pyx("events", *options, *PAST)
        assert answer.returncode == status, answer
        assert said in answer.stderr and "Traceback" not in answer.stderr, answer.stderr


def test_how_the_bus_fares(stack: Any, life: str) -> None:
    stats = json.loads(stack.pyx("system", "bus", "--format", "json", check=True).stdout)
    assert stats["methods"]["containerd.run"]["calls"] >= 1
    assert sum(stats["methods"]["containerd.run"]["latency_us_log2"]) >= 1
    assert stats["next_offset"] > stats["oldest_offset"] >= 1
    shown = stack.pyx("system", "bus", check=True).stdout
    assert f"Journal: {stats['journal_id']}, offsets " in shown
    assert any(line.startswith("containerd.run ") for line in shown.splitlines())

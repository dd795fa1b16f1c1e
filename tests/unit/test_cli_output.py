"""Tables, sizes and times for people; the multiplexed stream; detach keys; references; events' lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyx_bus.errors import PermissionDenied, Unavailable
from pyx_cli import client, output
from pyx_cli.commands import bus, events, system
from pyx_cli.commands.images import familiar, split_reference
from pyx_cli.demux import Demux
from pyx_cli.grammar import CliError, Options, parse
from pyx_cli.table import COMMANDS
from pyx_cli.terminal import DetachScanner, parse_keys


def test_columns_line_up_as_docker_s() -> None:
    assert output.table_lines([["ID", "NAME"], ["0123456789ab", "web"]]) == [
        "ID             NAME",
        "0123456789ab   web",
    ]
    assert output.table_lines([["A", "B"], ["x", "y"]]) == ["A         B", "x         y"]
    assert output.table_lines([]) == []


def test_a_table_fits_the_terminal_where_it_may_be_cut() -> None:
    rows = [["ID", "COMMAND", "NAMES"], ["0123456789ab", '"a long command with many words"', "a-name-that-stays-whole"]]
    lines = output.table_lines(rows, 60, (1,))
    assert max(map(len, lines)) <= 60
    assert "a-name-that-stays-whole" in lines[1] and "…" in lines[1] and "0123456789ab" in lines[1]
    assert output.table_lines(rows, 0, (1,))[1].endswith('words"   a-name-that-stays-whole')


@given(
    st.lists(st.lists(st.text("ab ", max_size=30), min_size=3, max_size=3), min_size=1, max_size=5), st.integers(0, 80)
)
def test_a_column_that_may_not_be_cut_is_not(rows: list[list[str]], width: int) -> None:
    for row, line in zip(rows, output.table_lines(rows, width, (1,)), strict=True):
        assert row[2].rstrip(" ") in line and row[0].rstrip(" ") in line


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0B"), (999, "999B"), (1000, "1kB"), (4_261_000, "4.26MB"), (123_456_789, "123MB"), (1_500_000_000, "1.5GB")],
)
def test_sizes(size: int, text: str) -> None:
    assert output.human_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "Less than a second"), (1, "1 second"), (59, "59 seconds"), (60, "About a minute"), (150, "2 minutes"), (3600, "About an hour"),
     (7200, "2 hours"), (86400 * 3, "3 days"), (86400 * 15, "2 weeks"), (86400 * 90, "3 months"), (86400 * 800, "2 years")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert output.human_duration(seconds) == text


def _frame(stream: int, payload: bytes) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(payload).to_bytes(4, "big") + payload


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=50))), st.lists(st.integers(1, 40)))
def test_the_stream_is_taken_apart_however_it_is_cut(frames: list[tuple[int, bytes]], cuts: list[int]) -> None:
    data = b"".join(_frame(*frame) for frame in frames)
    demux, got, position = Demux(), {1: b"", 2: b""}, 0
    for cut in [*cuts, len(data) or 1]:
        for stream, payload in demux.feed(data[position : position + cut]):
            got[stream] += payload
        position += cut
    assert got == {stream: b"".join(p for s, p in frames if s == stream) for stream in (1, 2)}
    assert not demux.inside


def test_a_batch_of_one_stream_is_one_run() -> None:
    data = b"".join(_frame(1, b"line\n") for _ in range(100))
    assert Demux().feed(data + _frame(2, b"e") + _frame(1, b"z")) == [(1, b"line\n" * 100), (2, b"e"), (1, b"z")]


def test_garbage_is_refused() -> None:
    with pytest.raises(ValueError, match="malformed output stream"):
        Demux().feed(b"hello, this is no header")


def test_detach_keys() -> None:
    assert parse_keys("ctrl-p,ctrl-q") == b"\x10\x11"
    assert parse_keys("ctrl-@,a,ctrl-[") == b"\x00a\x1b"
    assert parse_keys("") == b""
    for text in ("ctrl-", "ctrl-1", "ab", "ctrl-p,,"):
        with pytest.raises(CliError):
            parse_keys(text)


@pytest.mark.parametrize(
    ("keys", "typed", "passed", "detached"),
    [
        (b"\x10\x11", [b"ab\x10\x11cd"], b"ab", True),
        (b"\x10\x11", [b"\x10", b"\x11"], b"", True),
        (b"\x10\x11", [b"\x10", b"x"], b"\x10x", False),
        (b"\x10\x11", [b"\x10\x10\x11"], b"\x10", True),
        (b"aab", [b"aaab"], b"a", True),
        (b"", [b"\x10\x11"], b"\x10\x11", False),
    ],
)
def test_detaching(keys: bytes, typed: list[bytes], passed: bytes, detached: bool) -> None:
    scanner, out, found = DetachScanner(keys), b"", False
    for data in typed:
        got, found = scanner.feed(data)
        out += got
    assert (out, found) == (passed, detached)


@given(st.binary(max_size=30), st.integers(1, 5))
def test_what_is_typed_arrives(data: bytes, step: int) -> None:
    scanner, out = DetachScanner(b"\x10\x11"), b""
    for start in range(0, len(data), step):
        got, found = scanner.feed(data[start : start + step])
        out += got
        if found:
            assert data.startswith(out + b"\x10\x11")
            return
    assert data in (out, out + b"\x10")


def test_references() -> None:
    assert split_reference("a:1") == ("a", "1")
    assert split_reference("127.0.0.1:5000/a") == ("127.0.0.1:5000/a", "")
    assert split_reference("127.0.0.1:5000/a:b") == ("127.0.0.1:5000/a", "b")
    assert split_reference("a@sha256:0") == ("a", "sha256:0")
    assert familiar("docker.io/library/busybox:latest") == "busybox:latest"
    assert familiar("docker.io/me/x:1") == "me/x:1"
    assert familiar("quay.io/me/x:1") == "quay.io/me/x:1"


def test_an_event_s_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    payload = {"id": "abcdef", "attributes": {"name": "web", "image": "busybox", "a": "b"}}
    event = events.document("container.start", 1_700_000_000_000_000_005, dict(payload))
    assert events.line(event) == "2023-11-14T22:13:20.000000005Z container start abcdef (a=b, image=busybox, name=web)"
    assert event["status"] == "start" and event["from"] == "busybox" and event["timeNano"] == 1_700_000_000_000_000_005
    ran = events.document("container.exec.start", 0, {"id": "x", "attributes": {"command": "ls -l", "execID": "1"}})
    assert ran["Action"] == "exec_start: ls -l"


def events_options(*words: str) -> Options:
    command = COMMANDS["system events"]
    return Options(command, *parse(command.flags, list(words)))


def test_an_event_has_docker_s_fields_in_a_template_and_the_api_s_names_in_json() -> None:
    event = events.document("network.connect", 5, {"id": "n1", "attributes": {"type": "bridge", "name": "net"}})

    def form(template: str) -> str:
        return events._writer(events_options("--format", template))(event)

    assert form("{{.Type}} {{.Action}} {{.Actor.ID}} {{.TimeNano}} [{{.From}}]") == "network connect n1 5 []"
    assert form("{{.Actor.Attributes.name}} {{.Actor.Attributes.image}}") == "net <no value>"
    assert form('[{{index .Actor.Attributes "image"}}]') == "[]"
    as_json = (
        '{"Type":"network","Action":"connect","Actor":{"ID":"n1","Attributes":{"name":"net","type":"bridge"}},'
        '"scope":"local","time":0,"timeNano":5}'
    )
    assert form("{{json .}}") == form("json") == as_json
    for template in ("table", "table {{.Action}}", r"table\t{{.Action}}"):
        with pytest.raises(CliError, match="not as a table"):
            form(template)
    assert form("tables {{.Action}}") == "tables connect"


def test_a_refusal_says_what_to_do() -> None:
    refused = client.unreachable("/run/bus.sock", PermissionDenied("user 7 may not use this bus", hint="join a group"), 125)
    assert (refused.message, refused.status, refused.hint) == ("user 7 may not use this bus", 125, "join a group")
    gone = client.unreachable("/run/bus.sock", FileNotFoundError(2, "x"))
    assert "is the stack running?" in gone.message and gone.hint == "start it with: pyx system up --detach"


def test_how_the_bus_fares_in_words() -> None:
    def bound(power: int) -> str:
        return bus._quantile([0] * power + [1], 0.5)

    assert [bound(power) for power in (0, 9, 10, 19, 20, 26)] == ["<1 µs", "<512 µs", "<1.02 ms", "<524 ms", "<1.05 s", "<67.1 s"]
    assert bus._quantile([], 0.5) == "-"
    one = {"gaps": 1, "events_lost": 1, "next_offset": 2, "oldest_offset": 1, "journal_segments": 1, "journal_bytes": 5}
    said = "\n".join(bus._summary(dict(one)))
    assert "1 gap of 1 event\n" in said and "(1 event), 5B in 1 segment" in said
    said = "\n".join(bus._summary({key: 2 * value for key, value in one.items()}))
    assert "2 gaps of 2 events\n" in said and "(2 events), 10B in 2 segments" in said


class Away:
    """A subscription, and its connection, to a bus that's away for ``looks`` looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.closed = False

    def receive(self, timeout_s: float | None) -> None:
        self.looks -= 1
        self.closed = self.looks > 0
        if timeout_s is None:
            raise Unavailable("cannot connect")


def test_watching_gives_up_when_the_bus_stays_away(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = "pyx: the bus is away; waiting up to 30 s for it to come back\n"
    bus: Any = Away(3)
    assert events._receive(bus, bus, None) is None and bus.looks == 0
    assert capsys.readouterr().err == said
    times = iter(range(1000))
    monkeypatch.setattr("pyx_cli.commands.events.time.monotonic", lambda: float(next(times)))
    bus = Away(1000)
    with pytest.raises(Unavailable, match="cannot connect"):
        events._receive(bus, bus, None)
    assert capsys.readouterr().err == said and 1000 - bus.looks == 29


def test_down_by_somebody_who_may_not_says_nothing_of_containers_and_stops_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(pid: int, number: int) -> None:
        assert (pid, number) == (7, 0)
        raise PermissionError

    monkeypatch.setattr("pyx_cli.supervisor.Stack.supervisor_pid", lambda _: 7)
    monkeypatch.setattr("os.kill", refuse)
    monkeypatch.setattr("pyx_cli.commands.system.connect", lambda *_: pytest.fail("it asked the bus"))
    command = COMMANDS["system down"]
    options = Options(command, *parse(command.flags, ["--stop-containers"]))
    options.session = {"root": str(tmp_path), "run": str(tmp_path)}
    with pytest.raises(CliError, match="only root may stop the stack"):
        system.down(options)
    assert capsys.readouterr().err == ""

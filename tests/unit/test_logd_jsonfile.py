"""The json-file format against a slow encoder written from its definition, and against json.loads."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyx_logd import frames
from pyx_logd.jsonfile import cut, decode, encode, format_time, format_time_fixed, line_ends, parse_time, unescape
from pyx_logd.model import LINE_MAX_BYTES, Chunk
from pyx_logd.reader import Renderer, Selection


def slow_escape(line: bytes) -> str:
    """One character at a time, as moby's jsonlog does."""
    out = []
    for char in line.decode("utf-8", "surrogateescape"):
        code = ord(char)
        if char in '"\\':
            out.append("\\" + char)
        elif char == "\n":
            out.append("\\n")
        elif char == "\r":
            out.append("\\r")
        elif code < 0x20 or char in "<>&":
            out.append(f"\\u00{code:02x}")
        elif 0xDC80 <= code <= 0xDCFF:
            out.append("\\ufffd")
        elif code in (0x2028, 0x2029):
            out.append(f"\\u{code:x}")
        else:
            out.append(char)
    return "".join(out)


def slow_encode(chunk: Chunk) -> bytes:
    time = format_time(chunk.time_ns).decode()
    return b"".join(
        f'{{"log":"{slow_escape(line)}","stream":"{chunk.stream}","time":"{time}"}}\n'.encode() for line in lines(chunk.data)
    )


def lines(data: bytes) -> list[bytes]:
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


nasty = st.lists(
    st.sampled_from(
        [b"\n", b"\r\n", b'"', b"\\", b"\\n", b"<>&", b"\t\x1b[0m\x00\x7f", "é–😀".encode(), "\u2028\u2029".encode(), b"\xff\xe2\x82",
         b"\xed\xa0\x80", b'","stream":"stderr","time":"2024-01-01T00:00:00Z"}\n', b'{"log":"', b"plain text "]
    )
    | st.binary(max_size=20),
    max_size=40,
).map(b"".join)


def as_seen(data: bytes) -> bytes:
    """What's left of bytes that aren't UTF-8."""
    return "".join("\ufffd" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in data.decode("utf-8", "surrogateescape")).encode()


@settings(deadline=None)  # a busy machine is no failure
@given(nasty, st.integers(0, 4 * 10**18))
@example(b"a\nb\n\n", 1_714_910_400_120_000_000)
def test_encode_is_the_reference(data: bytes, time_ns: int) -> None:
    chunks, rest = cut("stdout", data, time_ns, ended=True)
    assert not rest
    encoded = b"".join(encode(chunk) for chunk in chunks)
    assert encoded == b"".join(slow_encode(chunk) for chunk in chunks)
    records = [json.loads(line) for line in encoded.splitlines()]
    assert [record["log"].encode() for record in records] == [as_seen(line) for line in lines(data)]
    assert all(list(record) == ["log", "stream", "time"] for record in records)
    assert all(parse_time(record["time"].encode()) == time_ns for record in records)


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), nasty, st.integers(0, 3)), max_size=12), st.booleans())
def test_decode_gives_back_what_was_written(pieces: list[tuple[str, bytes, int]], times: bool) -> None:
    encoded = b""
    expected = []
    for stream, data, time_ns in pieces:
        for chunk in cut(stream, data, time_ns, ended=True)[0]:
            encoded += encode(chunk)
            expected.append((stream, time_ns, as_seen(chunk.data)))
    got = list(decode(encoded, times=times))
    for stream in ("stdout", "stderr"):
        assert b"".join(t for s, _, t in got if s == stream) == b"".join(t for s, _, t in expected if s == stream)
    order = [s for s, _, text in got if text]
    assert "".join(s for i, s in enumerate(order) if i == 0 or order[i - 1] != s) == "".join(
        s for i, (s, _, t) in enumerate(expected) if t and (i == 0 or expected[i - 1][0] != s)
    )
    if times:
        for at in range(4):
            assert b"".join(t for _, time, t in got if time == at) == b"".join(t for _, time, t in expected if time == at)


@settings(deadline=None)  # a busy machine is no failure
@given(nasty)
def test_unescape_reverses_escape(data: bytes) -> None:
    assert unescape(slow_escape(data).encode()) == as_seen(data)


@settings(deadline=None)  # a busy machine is no failure
@given(nasty, st.integers(1, 200))
def test_cut_loses_nothing_however_reads_fall(data: bytes, step: int) -> None:
    data = data * 3 + b"x" * (LINE_MAX_BYTES - 7) + data
    whole = b""
    rest = b""
    step *= 97
    for start in range(0, len(data), step):
        chunks, rest = cut("stdout", rest + data[start : start + step], 1)
        whole += b"".join(chunk.data for chunk in chunks)
        assert len(rest) < LINE_MAX_BYTES
    assert whole + rest == data


def test_long_lines_are_cut_as_docker_cuts_them() -> None:
    data = b"a" * (2 * LINE_MAX_BYTES + 5) + b"\nshort\n" + b"b" * LINE_MAX_BYTES + b"\n"
    chunks, rest = cut("stderr", data, 5)
    assert [len(chunk.data) for chunk in chunks] == [LINE_MAX_BYTES, LINE_MAX_BYTES, 12, LINE_MAX_BYTES, 1]
    assert rest == b""
    assert chunks[2].data == b"aaaaa\nshort\n"


@pytest.mark.parametrize("offset", range(5))
def test_a_character_is_never_cut(offset: int) -> None:
    data = b"x" * offset + "😀".encode() * (LINE_MAX_BYTES // 2)
    for size in (len(data), LINE_MAX_BYTES):  # also when the read ends inside the character
        chunks, rest = cut("stdout", data[:size], 1)
        assert b"".join(c.data for c in chunks) + rest == data[:size]
        for chunk in chunks:
            chunk.data.decode()


def test_times_are_gos() -> None:
    assert format_time(1_714_910_400_000_000_000) == b"2024-05-05T12:00:00Z"
    assert format_time(1_714_910_400_120_000_000) == b"2024-05-05T12:00:00.12Z"
    assert format_time(1_714_910_400_000_000_001) == b"2024-05-05T12:00:00.000000001Z"
    assert format_time_fixed(1_714_910_400_120_000_000) == b"2024-05-05T12:00:00.120000000Z"
    assert parse_time(b"2024-05-05T14:00:00.5+02:00") == 1_714_910_400_500_000_000
    assert parse_time(b"yesterday") is None


def test_what_is_not_a_record_is_left_out() -> None:
    good = encode(Chunk("stdout", b"one\n", 1))
    attrs = b'{"log":"two\\n","stream":"stdout","attrs":{"tag":"x"},"time":"2024-05-05T12:00:00Z"}\n'
    block = b'\0\0\0garbage\n{"log":"torn' + b"\n" + good + b'{"log":"bad \\x","stream":"stdout","time":"2024-05-05T12:00:00Z"}\n' + attrs
    assert [text for _, _, text in decode(block)] == [b"one\n", b"two\n"]


def test_line_ends_sees_through_backslashes() -> None:
    block = b"".join(encode(c) for c in (Chunk("stdout", b"a\n", 1), Chunk("stdout", b"ends in \\n", 1), Chunk("stdout", b"x\\\n", 1)))
    first = len(encode(Chunk("stdout", b"a\n", 1)))
    assert line_ends(block) == [first, len(block)]


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), nasty), max_size=6))
def test_timestamps_stand_before_each_line_only(pieces: list[tuple[str, bytes]]) -> None:
    encoded = b"".join(encode(c) for s, d in pieces for c in cut(s, d, 7, ended=True)[0])
    plain = Renderer(Selection(), frames.raw).render(encoded)
    for stream in ("stdout", "stderr"):
        only = Selection(stdout=stream == "stdout", stderr=stream == "stderr", timestamps=True)
        stamped = Renderer(only, frames.raw).render(encoded)
        text = b"".join(as_seen(d) for s, d in pieces if s == stream)
        assert stamped == b"".join(b"1970-01-01T00:00:00.000000007Z " + line for line in lines(text))
    assert len(plain) == sum(len(as_seen(c.data)) for s, d in pieces for c in cut(s, d, 7, ended=True)[0])

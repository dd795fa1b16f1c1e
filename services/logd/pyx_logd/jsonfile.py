"""Docker's json-file format, both ways, many lines at a time. Pure.

A record is ``{"log":"text\\n","stream":"stdout","time":"2024-05-05T12:00:00.123Z"}`` and a newline. The text is escaped as Docker's
encoder does (``pkg/jsonlog`` of moby, which follows Go's HTML-safe ``encoding/json``): ``\\"`` ``\\\\`` ``\\n`` ``\\r``, other control
characters and ``< > &`` as ``\\u00XX``, U+2028/9 as ``\\u202X``, each byte that isn't valid UTF-8 as ``\\ufffd``. The time is Go's
RFC3339Nano: UTC, a fraction without trailing zeros.

Speed comes from never looking at single lines: all lines of one read share stream and time, so what separates their texts
(`separator`) is the same bytes, put in, or found and taken out, by one ``bytes.replace`` for hundreds of lines.
"""

from __future__ import annotations

import calendar
import json
import re
import time
from collections.abc import Iterable

import msgspec

from .model import LINE_MAX_BYTES, Chunk

PREFIX = b'{"log":"'
_SPECIAL = bytes(i for i in range(32) if i != 10) + b'"\\<>&'
_COMMON = (  # the backslash first: the others' escapes contain one
    (b"\\", b"\\\\"),
    (b'"', b'\\"'),
    (b"\r", b"\\r"),
    (b"<", b"\\u003c"),
    (b">", b"\\u003e"),
    (b"&", b"\\u0026"),
    (b"\t", b"\\u0009"),
    (b"\x1b", b"\\u001b"),
)
_CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f]")
_INVALID = re.compile("[\udc80-\udcff]")


def format_time(time_ns: int) -> bytes:
    """RFC3339Nano as Go prints it: no trailing zeros in the fraction, none at all for a whole second."""
    seconds, fraction = divmod(time_ns, 1_000_000_000)
    text = _second(seconds)
    return b"%b.%bZ" % (text, (b"%09d" % fraction).rstrip(b"0")) if fraction else text + b"Z"


def format_time_fixed(time_ns: int) -> bytes:
    """With always nine digits, as ``logs --timestamps`` shows it."""
    seconds, fraction = divmod(time_ns, 1_000_000_000)
    return b"%b.%09dZ" % (_second(seconds), fraction)


_last_second: tuple[int, bytes] = (0, b"1970-01-01T00:00:00")


def _second(seconds: int) -> bytes:
    global _last_second
    last, text = _last_second
    if seconds != last:
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode()
        _last_second = (seconds, text)
    return text


_TIME = re.compile(rb"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):(\d\d))")


def parse_time(text: bytes) -> int | None:
    """RFC 3339 to Unix nanoseconds; None if it isn't one."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(match[i]) for i in range(1, 7))
    seconds = calendar.timegm((year, month, day, hour, minute, second, 0, 0, 0))
    if match[8]:
        offset = int(match[9]) * 3600 + int(match[10]) * 60
        seconds += -offset if match[8] == b"+" else offset
    return seconds * 1_000_000_000 + (int(match[7].ljust(9, b"0")) if match[7] else 0)


def escape(text: bytes) -> bytes:
    """``text`` as the inside of a JSON string, newlines left as they are (`encode` needs them to find the lines)."""
    if len(text.translate(None, _SPECIAL)) != len(text):
        for raw, escaped in _COMMON:
            if raw in text:
                text = text.replace(raw, escaped)
        text = _CONTROL.sub(lambda match: b"\\u%04x" % match[0][0], text)
    if not text.isascii():
        try:
            text.decode()
        except UnicodeDecodeError:  # surrogateescape stands for each byte alone, as Go's decoder counts them
            text = _INVALID.sub(r"\\ufffd", text.decode("utf-8", "surrogateescape")).encode()
        if b"\xe2\x80" in text:
            text = text.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    return text


def encode(chunk: Chunk) -> bytes:
    """The records of a chunk, each with its newline. Empty for an empty chunk."""
    if not chunk.data:
        return b""
    suffix = b'","stream":"%b","time":"%b"}\n' % (chunk.stream.encode(), format_time(chunk.time_ns))
    text = escape(chunk.data)
    if not text.endswith(b"\n"):
        return PREFIX + text + suffix
    end = b"\\n" + suffix
    return PREFIX + text[:-1].replace(b"\n", end + PREFIX) + end


def cut(stream: str, data: bytes, time_ns: int, *, ended: bool = False) -> tuple[list[Chunk], bytes]:
    """Chunks to store and the rest, an unfinished line shorter than `LINE_MAX_BYTES`, which the next data continues.

    A line of `LINE_MAX_BYTES` and more is cut into pieces of that size, or up to three bytes less so as not to cut a character.
    When the stream has ``ended`` the rest is a piece too.
    """
    end = data.rfind(b"\n") + 1
    chunks: list[Chunk] = []
    start = position = 0
    while len(data) - position >= LINE_MAX_BYTES:
        newline = data.rfind(b"\n", position, position + LINE_MAX_BYTES)
        if newline >= 0:  # so no line up to there is too long
            position = newline + 1
            continue
        if start < position:
            chunks.append(Chunk(stream, data[start:position], time_ns))
        stop = _character_boundary(data, position + LINE_MAX_BYTES)
        chunks.append(Chunk(stream, data[position:stop], time_ns))
        start = position = stop
    if start < end:
        chunks.append(Chunk(stream, data[start:end], time_ns))
        start = end
    rest = data[start:]
    if ended and rest:
        chunks.append(Chunk(stream, rest, time_ns))
        rest = b""
    return chunks, rest


def _character_boundary(data: bytes, stop: int) -> int:
    """``stop``, or the start of the UTF-8 character that would be cut there."""
    if stop < len(data) and data[stop] & 0xC0 != 0x80:
        return stop
    for start in range(stop - 1, stop - 4, -1):
        byte = data[start]
        if byte & 0xC0 == 0x80:
            continue
        length = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 0
        return start if start + length > stop else stop
    return stop


_LINE_END = re.compile(rb'(?<!\\)(?:\\\\)*\\n","stream":"')


def line_ends(block: bytes) -> list[int]:
    """Where, in a block of whole records, each record that finishes a line begins its next record (the offset after its newline)."""
    return [block.find(b"\n", match.end()) + 1 for match in _LINE_END.finditer(block)]


def unescape(text: bytes) -> bytes:
    """The inside of a JSON string back to the bytes it stands for."""
    escapes = text.count(b"\\")
    if not escapes:
        return text
    if escapes == text.count(b"\\n"):  # then every backslash is one before an n
        return text.replace(b"\\n", b"\n")
    quoted = b'"%b"' % text
    try:
        return msgspec.json.decode(quoted, type=str).encode()
    except (msgspec.DecodeError, UnicodeEncodeError):
        return str(json.loads(quoted.decode("utf-8", "replace"))).encode("utf-8", "replace")


Text = tuple[str, int, bytes]
"""Stream, time in ns, and the text of consecutive records which share both."""

_SUFFIX = re.compile(rb'","stream":"(\w+)"(?:,"attrs":\{.*\})?,"time":"([^"]+)"\}\n')
_ANY_SEPARATOR = re.compile(rb'","stream":"\w+"(?:,"attrs":\{[^\n]*\})?,"time":"[^"]+"\}\n(?:\{"log":")?')
_STRETCH_BYTES = 64 * 1024


def decode(block: bytes, *, times: bool = True) -> Iterable[Text]:
    """The texts of a block of whole records. What isn't a record (a torn or foreign line) is left out.

    Without ``times`` records of different times may come as one text, with the first one's time: much faster where each line was
    written alone.
    """
    position, size = 0, len(block)
    while position < size:
        newline = block.find(b"\n", position)
        if newline < 0:
            return
        head = block.find(b'","stream":"', position, newline)  # can't be inside the text: its quotes are escaped
        match = _SUFFIX.fullmatch(block, head, newline + 1) if head >= 0 else None
        time_ns = parse_time(match[2]) if match else None
        if match is None or time_ns is None or not block.startswith(PREFIX, position):
            position = newline + 1
            continue
        stream, suffix = match[1].decode(), match[0]
        stop = _run_end(block, position, newline + 1, suffix)
        start = position + len(PREFIX)
        if stop == newline + 1:
            text = block[start:head]
            if not times and (stretch := _stretch_end(block, position, match[1])) > stop:
                text, stop = _ANY_SEPARATOR.sub(b"", block[start:stretch]), stretch
        else:
            text = block[start : stop - len(suffix)].replace(suffix + PREFIX, b"")
        position = stop
        try:
            yield stream, time_ns, unescape(text)
        except ValueError:  # not JSON after all
            continue


def _run_end(block: bytes, position: int, first_end: int, suffix: bytes) -> int:
    """The end of the run of records, from ``position``, that all end in ``suffix``; ``first_end`` is the first one's end."""
    second_end = block.find(b"\n", first_end) + 1
    if not second_end or not block.endswith(suffix, first_end, second_end):
        return first_end
    limit = len(block)
    while limit > second_end:
        end = block.rfind(suffix, position, limit) + len(suffix)
        # every raw newline ends a record: as many suffixes as newlines means that no other record is among them
        if block.count(suffix, position, end) == block.count(b"\n", position, end) == block.count(PREFIX, position, end):
            return end
        limit = position + (end - position) // 2
    return first_end


def _stretch_end(block: bytes, position: int, stream: bytes) -> int:
    """The end of a stretch of well-formed records of ``stream`` from ``position``; ``position`` if there's none worth the trouble."""
    end = block.rfind(b"\n", position, position + _STRETCH_BYTES) + 1
    separators = block.count(b'","stream":"%b","time":"' % stream, position, end)
    if separators < 2 or separators != block.count(b"\n", position, end) or separators != block.count(PREFIX, position, end):
        return position
    return end

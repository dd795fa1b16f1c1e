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
_CONTROLS = bytes(i for i in range(32) if i != 10)
_SPECIAL = _CONTROLS + b'"\\<>&'
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


_last_parsed: tuple[bytes, int] = (b"1970-01-01T00:00:00.", 0)


def parse_time(text: bytes) -> int | None:
    """RFC 3339 to Unix nanoseconds; None if it isn't one."""
    global _last_parsed
    head, seconds_ns = _last_parsed
    if text.startswith(head):  # most records are of the same second as the one before
        fraction = text[20:-1]
        if text.endswith(b"Z") and len(fraction) <= 9 and fraction.isdigit():
            return seconds_ns + int(fraction.ljust(9, b"0"))
    time_ns = _parse_time(text)
    if time_ns is not None and text.endswith(b"Z") and text[19:20] == b".":
        _last_parsed = text[:20], time_ns - time_ns % 1_000_000_000
    return time_ns


def _parse_time(text: bytes) -> int | None:
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
        if len(text.translate(None, _CONTROLS)) != len(text):  # other, rare ones
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
    """The inside of a JSON string back to the bytes it stands for. Raises ValueError if it isn't one."""
    if b"\\" not in text and b'"' not in text:
        return text
    quoted = b'"%b"' % text
    try:
        return msgspec.json.decode(quoted, type=str).encode()
    except (msgspec.DecodeError, UnicodeEncodeError):
        return str(json.loads(quoted.decode("utf-8", "replace"))).encode("utf-8", "replace")


Text = tuple[str, int, bytes]
"""Stream, time in ns, and the text of consecutive records which share both."""

_TAIL = rb'","stream":"(\w+)"(?:,"attrs":\{[^\n]*\})?,"time":"([^"\n]+)"\}\n'
_SUFFIX = re.compile(_TAIL)
_SEPARATORS = {
    stream: re.compile(rb'","stream":"%b"(?:,"attrs":\{[^\n]*\})?,"time":"[^"\n]+"\}\n\{"log":"' % stream)
    for stream in (b"stdout", b"stderr")
}
_LINE_SEPARATORS = {stream: re.compile(rb"\\n" + pattern.pattern) for stream, pattern in _SEPARATORS.items()}
_RECORD = re.compile(rb'\{"log":"([^"\n]*(?:(?<=\\)"[^"\n]*)*)' + _TAIL)
_SPAN_BYTES = 4096
_STRETCH_BYTES = 64 * 1024


def decode(block: bytes, *, times: bool = True) -> Iterable[Text]:
    """The texts of a block of whole records. What isn't a record (a torn or foreign line) is left out.

    Without ``times`` records of different times may come as one text, with the first one's time: much faster where each line was
    written alone.
    """
    position, size = 0, len(block)
    span = _SPAN_BYTES
    stretches = not times
    while position < size:
        first_end = block.find(b"\n", position) + 1
        if not first_end:
            return
        # a record's first unescaped `","` is the end of its text: quotes in the text are escaped
        head = block.find(b'","stream":"', position, first_end)
        match = _SUFFIX.fullmatch(block, head, first_end) if head >= 0 else None
        time_ns = parse_time(match[2]) if match else None
        if match is None or time_ns is None or not block.startswith(PREFIX, position):
            position = first_end
            continue
        stream, suffix = match[1].decode(), match[0]
        limit = min(size, position + span)
        stop = block.rfind(suffix, first_end, limit) + len(suffix)
        text: bytes | None = None
        if stop >= position + _SPAN_BYTES // 2 or (not stretches and stop > first_end):  # a run of records with the same suffix
            text = _run_text(block, position, stop, suffix)
            span = span * 4 if limit - stop < _SPAN_BYTES else _SPAN_BYTES
        if text is None and stretches:
            stop = block.rfind(b"\n", position, position + _STRETCH_BYTES) + 1
            text = _stretch_text(block, position, stop, match[1])
            span = _SPAN_BYTES
            stretches = text is not None  # else the streams are mixed here, and will be further on
        if text is None:
            # short runs, or something odd among them: record by record, up to where it may be worth looking again
            stop = block.rfind(b"\n", position, position + _STRETCH_BYTES // 4) + 1
            if stop > first_end:
                yield from _records(block, position, stop)
                position = stop
                continue
            text, stop = _unescaped([block[position + len(PREFIX) : head]]), first_end
        position = stop
        if text:
            yield stream, time_ns, text


def _run_text(block: bytes, position: int, stop: int, suffix: bytes) -> bytes | None:
    """The text of the records from ``position`` to ``stop`` if all of them end in ``suffix``, as the last one does.

    No count is needed to know: any other separator left in the text has quotes in it which aren't escaped, and so it isn't JSON.
    """
    encoded = block[position + len(PREFIX) : stop - len(suffix)]
    if encoded.endswith(b"\\n") and not _escapes_early(encoded):
        text = encoded[:-2].replace(b"\\n" + suffix + PREFIX, b"\n")
        if b"\\" not in text and b'"' not in text:  # nothing else was escaped
            return text + b"\n"
    try:
        return unescape(encoded.replace(suffix + PREFIX, b""))
    except ValueError:
        return None


def _escapes_early(encoded: bytes) -> bool:
    """Whether the first line has escapes: others will too, so don't try without."""
    return encoded.find(b"\\") != encoded.find(b'\\n","stream":"') != -1


def _stretch_text(block: bytes, position: int, stop: int, stream: bytes) -> bytes | None:
    """The text of the records from ``position`` to ``stop`` if all are of ``stream``, whatever their times; known as in `_run_text`."""
    if stream not in _SEPARATORS:
        return None
    end = block.rfind(b'","stream":"%b"' % stream, position, stop)
    if end < 0 or block.find(b"\n", end, stop) != stop - 1:
        return None
    encoded = block[position + len(PREFIX) : end]
    if encoded.endswith(b"\\n") and not _escapes_early(encoded):
        text = _LINE_SEPARATORS[stream].sub(b"\n", encoded[:-2])
        if b"\\" not in text and b'"' not in text:
            return text + b"\n"
    try:
        return unescape(_SEPARATORS[stream].sub(b"", encoded))
    except ValueError:
        return None


def _records(block: bytes, position: int, stop: int) -> Iterable[Text]:
    """One by one, neighbours of the same stream and time together."""
    last: tuple[bytes, bytes] = (b"", b"")
    texts: list[bytes] = []
    time_ns: int | None = None
    for text, stream, time_text in _RECORD.findall(block, position, stop):
        if (stream, time_text) != last:
            if texts and time_ns is not None:
                yield last[0].decode(), time_ns, _unescaped(texts)
            texts = []
            last = stream, time_text
            time_ns = parse_time(time_text)
        texts.append(text)
    if texts and time_ns is not None:
        yield last[0].decode(), time_ns, _unescaped(texts)


def _unescaped(texts: list[bytes]) -> bytes:
    """`unescape` of all, less those that aren't JSON after all."""
    try:
        return unescape(b"".join(texts))
    except ValueError:
        return b"".join([_unescaped([text]) for text in texts]) if len(texts) > 1 else b""

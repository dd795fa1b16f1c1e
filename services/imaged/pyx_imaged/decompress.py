"""What a layer or archive is compressed with, and bounded chunks of what's inside.

The kind is told by the first bytes, never by a name or media type. Whatever the ratio, no more than a chunk's worth of output is
held at a time. Several members (gzip) or frames (zstd) one after another are one stream, as their specifications say.
"""

from __future__ import annotations

import bz2
import importlib
import lzma
from collections.abc import Callable, Iterator
from typing import IO, cast

CHUNK = 1 << 20
_MEMORY_LIMIT = 256 << 20  # what xz and zstd may take for a window; the highest levels of both need less
_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh", "bzip2"),
)
_MODULES = {"gzip": "isal.isal_zlib", "zstd": "zstandard"}


class CompressionError(ValueError):
    """Damaged or truncated compressed data. The message is for people."""


def kind_of(head: bytes) -> str:
    """gzip, zstd, xz, bzip2, or ``""`` for anything else. A zstd stream may begin with a skippable frame."""
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if len(head) >= 4 and head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:
        return "zstd"
    return ""


def load(kind: str) -> None:
    """Import what ``chunks`` needs for ``kind``. Only what's needed: a worker's start is part of every unpacking."""
    if kind in _MODULES:
        importlib.import_module(_MODULES[kind])


def chunks(kind: str, read: Callable[[], bytes]) -> Iterator[bytes]:
    """Uncompressed chunks of the stream that ``read()`` gives piece by piece (empty at its end). Errors: CompressionError."""
    if kind == "":
        while data := read():
            yield data
    elif kind == "gzip":
        yield from _gzip(read)
    elif kind == "zstd":
        yield from _zstd(read)
    elif kind == "xz":
        yield from _python(read, lambda: lzma.LZMADecompressor(memlimit=_MEMORY_LIMIT), "xz", lzma.LZMAError)
    else:
        yield from _python(read, bz2.BZ2Decompressor, "bzip2", OSError)


def _gzip(read: Callable[[], bytes]) -> Iterator[bytes]:
    from isal import isal_zlib

    data = read()
    while data:
        inflater = isal_zlib.decompressobj(31)
        try:
            while not inflater.eof:
                if not data:
                    data = read()
                    if not data:
                        raise CompressionError("truncated gzip stream")
                if out := inflater.decompress(data, CHUNK):
                    yield out
                data = inflater.unconsumed_tail
        except isal_zlib.error as error:  # type: ignore[misc]  # its stubs call it Any
            raise CompressionError(f"damaged gzip stream ({error})") from None
        data = inflater.unused_data or read()
        while data and not data.lstrip(b"\0"):
            data = read()  # zeros after the last member are padding (gzip(1))
        if data and not data.startswith(b"\x1f") and data[:1] != b"\0":
            raise CompressionError("damaged gzip stream (something else follows it)")


class _Source:
    """The file-like face of a ``read()`` that zstandard wants."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self._left = b""

    def read(self, size: int = -1) -> bytes:
        data = self._left or self._read()
        if 0 <= size < len(data):
            self._left = data[size:]
            return data[:size]
        self._left = b""
        return data


def _zstd(read: Callable[[], bytes]) -> Iterator[bytes]:
    """zstandard's reader bounds its output but can't tell a truncated last frame from a whole one: the tar's end marker and the
    blob's digest do."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_MEMORY_LIMIT >> 1)
    reader = decompressor.stream_reader(cast("IO[bytes]", _Source(read)), read_size=CHUNK >> 2, read_across_frames=True)
    try:
        while data := reader.read(CHUNK):
            yield data
    except zstandard.ZstdError as error:
        raise CompressionError(f"damaged zstd stream ({error})") from None


def _python(
    read: Callable[[], bytes], make: Callable[[], lzma.LZMADecompressor | bz2.BZ2Decompressor], name: str, damage: type[Exception]
) -> Iterator[bytes]:
    data = read()
    while data:
        decompressor = make()
        try:
            while not decompressor.eof:
                if not data and decompressor.needs_input:
                    data = read()
                    if not data:
                        raise CompressionError(f"truncated {name} stream")
                if out := decompressor.decompress(data, CHUNK):
                    yield out
                data = b""
        except (damage, MemoryError) as error:
            raise CompressionError(f"damaged {name} stream ({error})") from None
        data = decompressor.unused_data or read()
        while data and not data.lstrip(b"\0"):
            data = read()  # xz pads its streams with zeros

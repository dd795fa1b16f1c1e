"""imaged's stream readers: tar headers against tarfile, decompression in bounded pieces, both against damage."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.imaged_support import tar_of

from pyx_imaged import decompress, tarstream


def members(data: bytes, *, strict_end: bool = True) -> Iterator[tuple[tarstream.Entry, bytes]]:
    source = io.BytesIO(data)
    for entry in tarstream.entries(source.read, strict_end=strict_end):
        size = entry.size if entry.kind == tarstream.REGULAR else 0
        content = tarstream.exactly(source.read, size)
        tarstream.exactly(source.read, -size % 512)
        yield entry, content


NAME = st.text(alphabet=st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=120)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.lists(st.tuples(NAME, st.binary(max_size=1500), st.integers(0, 2**31), st.integers(-(2**31), 2**33)), max_size=5),
)
def test_reads_what_tarfile_writes(form: int, files: list[tuple[str, bytes, int, int]]) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data, uid, mtime in files:
            info = tarfile.TarInfo(name)
            info.size, info.uid, info.gid, info.mtime, info.mode = len(data), uid, uid // 2, mtime, 0o4751
            tar.addfile(info, io.BytesIO(data))
    found = [(entry.name.decode(), data, entry.uid, entry.mtime_ns // 10**9) for entry, data in members(out.getvalue())]
    assert found == files


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2000))
def test_garbage_is_refused(data: bytes) -> None:
    try:
        list(members(data))
    except tarstream.TarError:
        return
    assert data[:512] == bytes(512)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5000))
def test_every_truncation_is_noticed(cut: int) -> None:
    data = tar_of(("a" * 150, "f", b"x" * 700), ("b", "s", "c" * 150), ("d", "f", ""))
    end = data.rstrip(b"\0")
    end = data[: (len(end) + 511) // 512 * 512]
    if cut >= len(end) + 512:
        return
    with pytest.raises(tarstream.TarError):
        list(members(data[:cut]))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (b"garbage", "bad record"), (b"99 path=x\n", "bad record"), (b"12 size=-12\n", "negative size"), (b"8 size=x\n"[:9], "bad"),
        (b"13 mtime=1e9\n", "bad time"), (b"0 x=y\n", "bad record"), (b"17 uid=9999999999\n"[:18], "owner|bad record"),
    ],
)  # fmt: skip
def test_bad_pax_records(records: bytes, message: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("h")
        info.type, info.size = b"x", len(records)
        tar.addfile(info, io.BytesIO(records))
        tar.addfile(tarfile.TarInfo("f"))
    with pytest.raises(tarstream.TarError, match=message):
        list(members(out.getvalue()))


def test_a_huge_extended_header_isnt_read() -> None:
    info = tarfile.TarInfo("h")
    info.type, info.size = b"x", 1 << 40
    with pytest.raises(tarstream.TarError, match="extended header"):
        list(members(info.tobuf(tarfile.GNU_FORMAT)))


PACK = {"gzip": gzip.compress, "zstd": zstandard.compress, "xz": lzma.compress, "bzip2": bz2.compress, "": bytes}


def unpack(data: bytes, piece: int = 1000) -> list[bytes]:
    source = io.BytesIO(data)
    return list(decompress.chunks(decompress.kind_of(data[:8]), lambda: source.read(piece)))


@pytest.mark.parametrize("kind", sorted(PACK))
@given(parts=st.lists(st.binary(max_size=3000), min_size=1, max_size=3), piece=st.integers(1, 4000))
@settings(max_examples=30, deadline=None)
def test_members_in_a_row(kind: str, parts: list[bytes], piece: int) -> None:
    packed = b"".join(PACK[kind](b"tar" + part) for part in parts)
    assert decompress.kind_of(packed) == kind
    assert b"".join(unpack(packed, piece)) == b"".join(b"tar" + part for part in parts)


@pytest.mark.parametrize("kind", sorted(set(PACK) - {""}))
def test_pieces_stay_small_whatever_the_ratio(kind: str) -> None:
    pieces = unpack(PACK[kind](bytes(30_000_000)), 1 << 18)
    assert sum(map(len, pieces)) == 30_000_000 and max(map(len, pieces)) <= decompress.CHUNK


@pytest.mark.parametrize("kind", ["gzip", "xz", "bzip2"])
def test_truncation_and_damage(kind: str) -> None:
    data = PACK[kind](bytes(range(256)) * 100)
    with pytest.raises(decompress.CompressionError, match="truncated"):
        unpack(data[:-5])
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0xFF
    with pytest.raises(decompress.CompressionError, match=r"damaged|truncated"):
        unpack(bytes(damaged))
    with pytest.raises(decompress.CompressionError, match="damaged"):
        unpack(data + b"something else")


def test_padding_after_gzip() -> None:
    assert b"".join(unpack(gzip.compress(b"x") + bytes(5000))) == b"x"


def test_a_zstd_skippable_frame_first() -> None:
    data = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstandard.compress(b"x" * 100)
    assert b"".join(unpack(data)) == b"x" * 100

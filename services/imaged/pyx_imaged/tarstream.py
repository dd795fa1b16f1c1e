"""Tar headers (POSIX.1-2001 pax, ustar, GNU; pax(1), GNU tar manual "Basic Tar Format"): a stream of bytes in, entries out. Pure.

Sizes in a header are the archive's claims: names and extended headers are bounded before they're read into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

BLOCK = 512
_EXTENDED_LIMIT = 1 << 20  # of one pax or GNU long-name header; real ones have a few KiB
_XATTR_NAME_LIMIT = 255  # xattr(7)
_NS = 1_000_000_000
_ID_LIMIT = 2**32 - 1  # (uid_t)-1 means "leave it" to chown(2)
_DEVICE_LIMITS = 1 << 12, 1 << 20  # of major and minor numbers in Linux
_TIME_LIMIT_NS = 2**33 * _NS  # what ext4 can keep, give or take; a time beyond it is kept as the last possible one

REGULAR, LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"


Read = Callable[[int], bytes | memoryview]
"""``read(n)``: exactly n bytes, fewer only at the end of the stream."""


class TarError(ValueError):
    """Not a tar, or a broken one. The message is for people."""


@dataclass(slots=True)
class Entry:
    """One member. ``name`` and ``link`` are as written in the archive. ``size`` bytes of data follow (``data_size`` with padding)."""

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    link: bytes
    device: tuple[int, int]
    xattrs: list[tuple[str, bytes]] = field(default_factory=list)
    sparse: list[tuple[int, int]] | None = None
    real_size: int = 0

    @property
    def padding(self) -> int:
        return -self.size % BLOCK


def number(text: bytes) -> int:
    """A numeric field: octal, or base 256 where the first bit is set (GNU)."""
    if text[0] & 0x80:
        value = int.from_bytes(text, "big") & ((1 << (len(text) * 8 - 1)) - 1)
        return value - (1 << (len(text) * 8 - 1)) if text[0] & 0x40 else value
    try:
        return int(text.rstrip(b" \0") or b"0", 8)
    except ValueError:
        pass  # perhaps something behind the first zero, which doesn't count
    digits = text.split(b"\0", 1)[0].strip()
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        raise TarError("not a tar archive, or a damaged one (bad number in a header)") from None


def pax_records(data: bytes) -> list[tuple[bytes, bytes]]:
    """The records ``<length> <key>=<value>\\n`` of an extended header, in order (a key may come several times)."""
    records, offset = [], 0
    while offset < len(data) and data[offset : offset + 1] != b"\0":
        space = data.find(b" ", offset, offset + 20)
        try:
            end = offset + int(data[offset:space])
        except ValueError:
            raise TarError("damaged tar archive (bad record in a pax header)") from None
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if space < 0 or end > len(data) or end <= space + 1 or data[end - 1 : end] != b"\n" or not equals:
            raise TarError("damaged tar archive (bad record in a pax header)")
        records.append((key, value))
        offset = end
    return records


def _checksum_ok(header: bytes) -> bool:
    unsigned = sum(header) - sum(header[148:156]) + 8 * 0x20
    stored = number(header[148:156])
    if stored == unsigned:
        return True
    signed = sum(b - 256 if b > 127 else b for b in header[:148] + header[156:]) + 8 * 0x20
    return stored == signed  # some old tars add signed characters


def _time_ns(text: bytes) -> int:
    try:
        whole, _, fraction = text.decode("ascii").partition(".")
        seconds = int(whole or "0")
        nanoseconds = int((fraction + "000000000")[:9]) if fraction else 0
    except (ValueError, UnicodeDecodeError):
        raise TarError("damaged tar archive (bad time in a pax header)") from None
    return seconds * _NS + (-nanoseconds if text.startswith(b"-") else nanoseconds)


def _integer(key: bytes, text: bytes) -> int:
    try:
        value = int(text)
    except ValueError:
        raise TarError(f"damaged tar archive (bad {key.decode()} in a pax header)") from None
    if value < 0:
        raise TarError(f"damaged tar archive (negative {key.decode()} in a pax header)")
    return value


def _ustar(header: bytes) -> Entry:
    kind = header[156:157]
    name = header[:100].split(b"\0", 1)[0]
    posix = header[257:263] == b"ustar\0"
    prefix = header[345:500].split(b"\0", 1)[0] if posix else b""
    if prefix:
        name = prefix + b"/" + name
    if kind in (b"\0", b"7"):
        kind = REGULAR
    if kind == REGULAR and name.endswith(b"/"):
        kind = DIRECTORY  # before ustar a directory was a file with a slash
    size = number(header[124:136])
    if size < 0:
        raise TarError("damaged tar archive (negative size)")
    device = (0, 0)
    if kind in (CHARACTER, BLOCK_DEVICE):
        device = (number(header[329:337]), number(header[337:345]))
    return Entry(
        name=name,
        kind=kind,
        mode=number(header[100:108]) & 0o7777,
        uid=number(header[108:116]),
        gid=number(header[116:124]),
        size=size,
        mtime_ns=number(header[136:148]) * _NS,
        link=header[157:257].split(b"\0", 1)[0],
        device=device,
    )


def _apply_pax(entry: Entry, records: list[tuple[bytes, bytes]]) -> None:
    offsets: list[int] = []
    lengths: list[int] = []
    version = ""
    for key, value in records:
        if key == b"path":
            entry.name = value
        elif key == b"linkpath":
            entry.link = value
        elif key == b"size":
            entry.size = _integer(key, value)
        elif key == b"uid":
            entry.uid = _integer(key, value)
        elif key == b"gid":
            entry.gid = _integer(key, value)
        elif key == b"mtime":
            entry.mtime_ns = _time_ns(value)
        elif key.startswith(b"SCHILY.xattr."):
            if not 13 < len(key) <= 13 + _XATTR_NAME_LIMIT or b"\0" in key:
                raise TarError(f"damaged tar archive (extended attribute {key[13:80]!r})")
            entry.xattrs.append((key[13:].decode("utf-8", "surrogateescape"), value))
        elif key.startswith(b"GNU.sparse."):
            word = key[11:]
            if word == b"major":
                version = value.decode("ascii", "replace")
            elif word == b"name":
                entry.name = value
            elif word in (b"size", b"realsize"):
                entry.real_size = _integer(key, value)
            elif word == b"offset":
                offsets.append(_integer(key, value))
            elif word == b"numbytes":
                lengths.append(_integer(key, value))
            elif word == b"map":
                numbers = [_integer(key, part) for part in value.split(b",")]
                offsets, lengths = numbers[::2], numbers[1::2]
            version = version or "0"
    if version == "1":
        entry.sparse = []  # the map comes before the data; ``entries`` reads it
    elif version:
        if len(offsets) != len(lengths):
            raise TarError("damaged tar archive (bad sparse map)")
        entry.sparse = list(zip(offsets, lengths, strict=True))


def _old_sparse(header: bytes, entry: Entry, read: Read) -> None:
    """GNU's type S: four (offset, length) pairs in the header, more in the blocks behind it."""
    pairs: list[tuple[int, int]] = []

    def collect(block: bytes, start: int, count: int) -> None:
        for index in range(start, start + 24 * count, 24):
            if block[index] == 0:
                return
            pairs.append((number(block[index : index + 12]), number(block[index + 12 : index + 24])))

    collect(header, 386, 4)
    more = header[482]
    while more:
        block = bytes(read(BLOCK))
        collect(block, 0, 21)
        more = block[504]
        if len(pairs) > 1_000_000:
            raise TarError("damaged tar archive (endless sparse map)")
    entry.kind, entry.sparse, entry.real_size = REGULAR, pairs, number(header[483:495])


def _sparse_map_from_data(entry: Entry, read: Read) -> None:
    """GNU's pax sparse format 1.0: the map in decimal lines at the beginning of the data, padded to whole blocks."""
    text, consumed = b"", 0

    def line() -> int:
        nonlocal text, consumed
        while b"\n" not in text:
            if consumed >= entry.size or len(text) > 40:
                raise TarError("damaged tar archive (bad sparse map)")
            text += bytes(read(BLOCK))
            consumed += BLOCK
        word, _, text = text.partition(b"\n")
        return _integer(b"sparse map", word)

    count = line()
    if count > 1_000_000:
        raise TarError("damaged tar archive (endless sparse map)")
    entry.sparse = [(line(), line()) for _ in range(count)]
    entry.size -= consumed
    if entry.size < 0:
        raise TarError("damaged tar archive (bad sparse map)")


def entries(read: Read, *, strict_end: bool = False) -> Iterator[Entry]:
    """The members of an archive. ``read(n)`` gives exactly n bytes, or fewer at the end of the stream.

    The caller reads an entry's data (``size`` bytes, then ``padding``) before it asks for the next one. The archive ends with a block
    of zeros, or (unless ``strict_end``) with the stream. Errors: TarError.
    """
    global_records: dict[bytes, bytes] = {}
    records: list[tuple[bytes, bytes]] = []
    long_name = long_link = None
    first = True
    while True:
        header = bytes(read(BLOCK))
        if len(header) < BLOCK:
            if header or first:
                raise TarError("truncated tar archive" if not first else "not a tar archive (it is empty or too short)")
            if strict_end or records or long_name or long_link:
                raise TarError("truncated tar archive (its end is missing)")
            return
        if not header[0] and not any(header):
            return
        if not _checksum_ok(header):
            raise TarError("not a tar archive" if first else "damaged tar archive (wrong checksum of a header)")
        first = False
        entry = _ustar(header)
        if entry.kind in (b"x", b"g", b"L", b"K", b"X"):
            if entry.size > _EXTENDED_LIMIT:
                raise TarError(f"tar archive with an extended header of {entry.size} bytes (at most {_EXTENDED_LIMIT})")
            data = exactly(read, entry.size + entry.padding)[: entry.size]
            if entry.kind == b"g":
                global_records |= pax_records(data)  # a later one of the same key counts
                if sum(len(key) + len(value) for key, value in global_records.items()) > _EXTENDED_LIMIT:
                    raise TarError(f"tar archive with more than {_EXTENDED_LIMIT} bytes of global headers")
            elif entry.kind == b"L":
                long_name = data.split(b"\0", 1)[0]
            elif entry.kind == b"K":
                long_link = data.split(b"\0", 1)[0]
            else:
                records = pax_records(data)
            continue
        if long_name is not None:
            entry.name = long_name
        if long_link is not None:
            entry.link = long_link
        if entry.kind == b"S":
            _old_sparse(header, entry, lambda n: exactly(read, n))
        if records or global_records:
            _apply_pax(entry, [*global_records.items(), *records])
            if entry.sparse == [] and entry.kind == REGULAR:
                _sparse_map_from_data(entry, lambda n: exactly(read, n))
        records, long_name, long_link = [], None, None
        if entry.kind not in (REGULAR, LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO):
            raise TarError(f"tar archive with an entry of unknown type {entry.kind!r}: {entry.name!r}")
        if not (0 <= entry.uid < _ID_LIMIT and 0 <= entry.gid < _ID_LIMIT):
            raise TarError(f"damaged tar archive (owner {entry.uid}:{entry.gid} of {entry.name!r})")
        if not all(0 <= part < limit for part, limit in zip(entry.device, _DEVICE_LIMITS, strict=True)):
            raise TarError(f"damaged tar archive (device {entry.device} of {entry.name!r})")
        entry.mtime_ns = max(-_TIME_LIMIT_NS, min(entry.mtime_ns, _TIME_LIMIT_NS))
        if b"\0" in entry.name or b"\0" in entry.link:
            raise TarError(f"tar archive with a NUL in a name: {entry.name!r}")
        yield entry


def exactly(read: Read, count: int) -> bytes:
    """``count`` bytes, or TarError for a truncated archive."""
    data = bytes(read(count))
    if len(data) < count:
        raise TarError("truncated tar archive")
    return data

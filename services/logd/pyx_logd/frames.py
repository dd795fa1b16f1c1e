"""Docker's multiplexed stream: one byte 1 = stdout, 2 = stderr; three zero bytes; the payload's length, 32 bits big endian; payload."""

from __future__ import annotations

from collections.abc import Callable

CODES = {"stdin": 0, "stdout": 1, "stderr": 2}

Frame = Callable[[str, bytes], bytes]


def multiplexed(stream: str, payload: bytes) -> bytes:
    """``payload`` (of less than 4 GiB) with the header that says whose it is."""
    return b"%c\0\0\0%b%b" % (CODES[stream], len(payload).to_bytes(4, "big"), payload)


def raw(stream: str, payload: bytes) -> bytes:
    """A terminal has one stream only, and its bytes go as they are."""
    return payload

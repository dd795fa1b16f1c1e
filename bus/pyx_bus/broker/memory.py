"""Giving memory back that's no longer used. The interpreter and the C library keep it for later; a few objects are enough to keep many
megabytes of free ones around them, and what once was needed for a flood would be kept for good."""

from __future__ import annotations

import gc
import os

_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """What the process has in memory (proc(5), statm)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE


def give_back(more_than: int) -> None:
    """If more than so many bytes are resident: empty the interpreter's free lists (a full collection does), and malloc_trim(3)."""
    if resident_bytes() <= more_than:
        return
    gc.collect()
    if resident_bytes() > more_than:
        import ctypes  # a megabyte itself, and rarely needed

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU library's
        if trim is not None:
            trim(0)

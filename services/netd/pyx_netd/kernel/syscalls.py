"""The system calls Python has no function for, and the one place where an errno becomes an error of the bus."""

from __future__ import annotations

import ctypes
import errno
import os

from pyx_bus.errors import BusError, Conflict, Internal, InvalidArgument, PermissionDenied, ResourceExhausted

_CLONE_NEWNET = 0x40000000
_MS_BIND = 4096
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str, path: str | None = None) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}", path)


def unshare_net() -> None:
    """Put the calling thread, and only it, into a new network namespace."""
    _check(_libc.unshare(_CLONE_NEWNET), "unshare(CLONE_NEWNET)")


def bind_mount(source: str, target: str) -> None:
    _check(_libc.mount(source.encode(), target.encode(), None, _MS_BIND, None), "mount(MS_BIND)", target)


def unmount(target: str) -> None:
    """Detach the topmost mount at a path; what still uses it keeps it alive."""
    _check(_libc.umount2(target.encode(), _MNT_DETACH | _UMOUNT_NOFOLLOW), "umount2", target)


_EXHAUSTED = frozenset(
    # EXFULL: a bridge has 1023 ports at most
    (errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EDQUOT, errno.EXFULL)
)


def failure(doing: str, error: OSError) -> BusError:
    """The error to report for a failed kernel operation; ``doing`` says what was attempted ("create the veth pair")."""
    words = f"can't {doing}: {error.strerror or error}"
    if error.filename:
        words += f' ("{error.filename}")'
    details = {"errno": errno.errorcode.get(error.errno or 0, str(error.errno))}
    if error.errno in (errno.EPERM, errno.EACCES):
        return PermissionDenied(words, hint="netd needs CAP_NET_ADMIN and CAP_SYS_ADMIN", details=details)
    if error.errno in _EXHAUSTED:
        return ResourceExhausted(words, details=details)
    if error.errno == errno.EADDRINUSE:
        return Conflict(words, details=details)
    if error.errno == errno.EADDRNOTAVAIL:
        return InvalidArgument(words, details=details)
    return Internal(words, details=details)

"""imaged's only door to system calls that Python doesn't have: syncfs, reflinks, detached mounts.

Errors are ``OSError`` with the call's name and the path in them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import time
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_FICLONE = 0x40049409
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432  # the same number on every architecture
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC = 1, 1
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6
OVERLAY_OPAQUE = "trusted.overlay.opaque"
_NO_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.ETXTBSY)


def _check(result: int, call: str, path: object = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}", str(path) if path is not None else None)
    return result


def syncfs(path: Path) -> None:
    """Write everything of the file system that holds ``path`` to the disk. Blocks: seconds on a slow disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check(_libc.syncfs(fd), "syncfs", path)
    finally:
        os.close(fd)


def give_to_root(path: Path) -> None:
    """The owner of what a container sees and no image says anything of, whoever we are."""
    if (os.geteuid(), os.getegid()) != (0, 0):
        os.chown(path, 0, 0)


def lock_directory(path: Path, wait_s: float) -> int:
    """Take the lock of a data directory; it's held as long as the returned descriptor is open. Blocks.

    Raises BlockingIOError if somebody else still holds it after ``wait_s`` seconds.
    """
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)  # a predecessor that's ending
    except BaseException:
        os.close(fd)
        raise


def detached_overlay(lower: Path, upper: Path, work: Path) -> int:
    """An overlay mount that is attached nowhere (fsopen, fsmount): a descriptor of its root, gone when closed.

    Needs Linux 5.2 and CAP_SYS_ADMIN. Whoever dies holding it leaves no mount behind.
    """
    context = _check(_libc.syscall(_SYS_FSOPEN, b"overlay", _FSOPEN_CLOEXEC), "fsopen overlay")
    try:
        for key, path in (("source", "overlay"), ("lowerdir", lower), ("upperdir", upper), ("workdir", work)):
            value = os.fsencode(path)
            _check(
                _libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, key.encode(), value, 0), f"fsconfig {key}", path
            )
        _check(_libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), "fsconfig create", upper)
        return _check(_libc.syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0), "fsmount", upper)
    finally:
        os.close(context)


def copy_data(source: int, target: int, size: int) -> None:
    """Give the empty file ``target`` what ``source`` has: shared blocks where the file system can, else a copy inside the kernel."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return
    except OSError as error:
        if error.errno not in _NO_CLONE:
            raise
    left = size
    while left > 0:
        try:
            done = os.copy_file_range(source, target, left)
        except OSError as error:
            if error.errno not in _NO_CLONE:
                raise
            done = os.sendfile(target, source, None, left)
        if done == 0:
            return
        left -= done


def copy_xattrs(source: int | str, target: int | str) -> None:
    """Copy extended attributes, overlayfs's own excepted. A path's last component isn't followed."""
    follow = isinstance(source, int)
    for name in os.listxattr(source, follow_symlinks=follow):
        if name.startswith(("trusted.overlay.", "user.overlay.")):
            continue
        try:
            os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=follow), follow_symlinks=follow)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                raise


def is_whiteout(status: os.stat_result) -> bool:
    """Overlayfs's mark for "what's below is gone": a character device 0:0 (Documentation/filesystems/overlayfs.rst)."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(path: str | int) -> bool:
    """Whether a directory hides what's in it in lower layers."""
    try:
        return os.getxattr(path, OVERLAY_OPAQUE) == b"y"
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return False
        raise

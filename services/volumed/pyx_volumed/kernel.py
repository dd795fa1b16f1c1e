"""volumed's door to the kernel: openat2(2), mount(2), umount2(2), syncfs(2), through libc.

Every failure is an OSError with errno, the call and the path in it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_libc = ctypes.CDLL(None, use_errno=True)

_SYS_OPENAT2 = 437  # the same on every architecture but alpha
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10

FLAGS: dict[str, tuple[bool, int]] = {  # option → (clear, flag), as mount(8) names them
    "ro": (False, 0x1), "rw": (True, 0x1),
    "nosuid": (False, 0x2), "suid": (True, 0x2),
    "nodev": (False, 0x4), "dev": (True, 0x4),
    "noexec": (False, 0x8), "exec": (True, 0x8),
    "sync": (False, 0x10), "async": (True, 0x10),
    "dirsync": (False, 0x80),
    "noatime": (False, 0x400), "atime": (True, 0x400),
    "nodiratime": (False, 0x800), "diratime": (True, 0x800),
    "bind": (False, 0x1000), "rbind": (False, 0x5000),
    "relatime": (False, 0x200000), "norelatime": (True, 0x200000),
    "strictatime": (False, 0x1000000), "nostrictatime": (True, 0x1000000),
    "defaults": (False, 0),
}
_MS_BIND = 0x1000
_MS_REMOUNT = 0x20
_MS_REC = 0x4000
_UMOUNT_NOFOLLOW = 0x8
_MNT_DETACH = 0x2


def _failed(call: str, path: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}", path)


def open_in_root(root_fd: int, path: str, flags: int) -> int:
    """Open ``path`` as a process whose root is ``root_fd`` would: links, absolute ones and ``..`` stay inside. Linux 5.6."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    number = _SYS_OPENAT2 if platform.machine() != "alpha" else 547
    fd: int = _libc.syscall(ctypes.c_long(number), ctypes.c_int(root_fd), os.fsencode(path), how, ctypes.c_size_t(len(how)))
    if fd < 0:
        raise _failed("openat2", path)
    return fd


def mount(source: str, target: str, type_: str, options: list[str]) -> None:
    """mount(2) with mount(8)'s options; those that aren't flags go to the file system. A read-only bind takes two calls."""
    flags, data = 0, []
    for option in options:
        if option in FLAGS:
            clear, flag = FLAGS[option]
            flags = flags & ~flag if clear else flags | flag
        elif option:
            data.append(option)
    text = ",".join(data).encode() if data else None
    if _libc.mount(os.fsencode(source), os.fsencode(target), type_.encode() or None, ctypes.c_ulong(flags), text) != 0:
        raise _failed("mount", target)
    if flags & _MS_BIND and flags & ~(_MS_BIND | _MS_REC):
        remount = ctypes.c_ulong(flags & ~_MS_REC | _MS_REMOUNT)
        if _libc.mount(b"none", os.fsencode(target), None, remount, None) != 0:
            error = _failed("mount", target)
            unmount(target)
            raise error


def unmount(target: str) -> None:
    """Take the mount away from ``target``; what still uses it keeps it until it's done. Nothing mounted there is fine."""
    if _libc.umount2(os.fsencode(target), _UMOUNT_NOFOLLOW | _MNT_DETACH) != 0:
        error = _failed("umount2", target)
        if error.errno not in (22, 2):  # EINVAL: not a mount point; ENOENT
            raise error


def is_mounted(target: str) -> bool:
    """Whether something is mounted exactly at ``target``, an absolute path without links."""
    wanted = target.replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        return any(line.split(" ", 5)[4] == wanted for line in lines)


def sync_filesystem(fd: int) -> None:
    """Everything written to the file system of ``fd`` is on its disk. Blocking, maybe long."""
    if _libc.syncfs(fd) != 0:
        raise _failed("syncfs", f"descriptor {fd}")

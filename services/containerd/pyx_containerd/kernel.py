"""The only door to mounts, cgroups and files inside a container's root.

Everything here is synchronous and short (well under a millisecond), so the service calls it inline. Errors come out as
``KernelError`` with the call, the path and the errno's text.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

from .errors import KernelError

_libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 1024, 4096, 16384, 1 << 18, 1 << 21
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_SYS_OPENAT2 = 437
_CLONE_NEWNS = 0x00020000
_IN_MODIFY = 2
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
_FLAGS = {
    "ro": MS_RDONLY,
    "rw": 0,
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "noatime": MS_NOATIME,
    "relatime": MS_RELATIME,
    "bind": MS_BIND,
    "rbind": MS_BIND | MS_REC,
    "defaults": 0,
}
CGROUP_ROOT = Path("/sys/fs/cgroup")
# Beside those of containers, in the stack's cgroup:
WARM_CGROUP, SHIM_CGROUP = "warm", "shims"
OWN_CGROUPS = (WARM_CGROUP, SHIM_CGROUP)


def _check(result: int, call: str, path: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise KernelError(number, call, path)
    return result


def mount(type_: str, source: str, target: str, options: list[str]) -> None:
    """mount(2) with options as mount(8) takes them; what isn't a flag goes to the file system as data."""
    flags = 0
    data: list[str] = []
    for option in options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        else:
            data.append(option)
    text = ",".join(data).encode()
    kind = type_.encode() if not flags & MS_BIND else None
    result = _libc.mount(source.encode(), os.fsencode(target), kind, ctypes.c_ulong(flags), text or None)
    _check(result, "mount", target)
    if flags & MS_BIND and flags & MS_RDONLY:  # a bind takes its own flags only in a second step
        again = ctypes.c_ulong(flags | MS_REMOUNT)
        if _libc.mount(None, os.fsencode(target), None, again, None) < 0:
            number = ctypes.get_errno()
            unmount(target)
            raise KernelError(number, "remount", target)


def own_mounts() -> None:
    """Give this process a mount namespace of its own, from which nothing gets back to the one it had."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare", "mount namespace")
    _check(_libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None), "mount", "/")


def remount_read_only(target: str) -> None:
    """The mount whose root ``target`` is, as far as it's seen from there."""
    flags = ctypes.c_ulong(MS_REMOUNT | MS_BIND | MS_RDONLY)
    _check(_libc.mount(None, os.fsencode(target), None, flags, None), "remount", target)


def unmount(target: str) -> None:
    """Take everything mounted on ``target`` off, busy or not. Nothing mounted there is fine."""
    while True:
        if _libc.umount2(os.fsencode(target), MNT_DETACH | UMOUNT_NOFOLLOW) < 0:
            number = ctypes.get_errno()
            if number in (errno.EINVAL, errno.ENOENT):
                return
            raise KernelError(number, "umount", target)


def mounts_under(directory: str) -> list[str]:
    """Mount points below ``directory``, deepest first (proc_pid_mountinfo(5))."""
    prefix = directory.rstrip("/") + "/"
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        point = line.split(b" ", 5)[4].decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")
        if point.startswith(prefix):
            found.append(point)
    return sorted(found, key=len, reverse=True)


def open_in_root(root: int, path: str, flags: int = os.O_RDONLY, mode: int = 0) -> int:
    """Open ``path`` as a process whose root directory is ``root`` would: no link leads out of it (openat2, RESOLVE_IN_ROOT)."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    fd = _libc.syscall(_SYS_OPENAT2, root, os.fsencode(path), how, len(how))
    return _check(fd, "open", path)


def read_in_root(root: int, path: str, limit_bytes: int = 1 << 20) -> bytes:
    """A regular file's content inside a root; empty if there's none. Never blocks on a pipe or device an image put there."""
    try:
        fd = open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK)
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENXIO):
            return b""
        raise
    try:
        if os.fstat(fd).st_mode & 0o170000 != 0o100000:
            return b""
        parts = []
        left = limit_bytes
        while left > 0 and (data := os.read(fd, min(left, 65536))):
            parts.append(data)
            left -= len(data)
        return b"".join(parts)
    finally:
        os.close(fd)


def make_directories_in_root(root: int, path: str, uid: int = 0, gid: int = 0) -> None:
    """mkdir -p inside a root; new directories belong to ``uid``:``gid``. KernelError ENOTDIR if something else is in the way."""
    current = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    walked = ""
    try:
        for part in [part for part in path.split("/") if part and part != "."]:
            walked += "/" + part
            try:
                following = open_in_root(root, walked, os.O_PATH | os.O_DIRECTORY)
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise
                try:
                    os.mkdir(part, 0o755, dir_fd=current)
                    os.chown(part, uid, gid, dir_fd=current, follow_symlinks=False)
                except OSError as failure:  # a dangling link, most likely
                    raise KernelError(failure.errno or 0, "mkdir", walked) from None
                following = open_in_root(root, walked, os.O_PATH | os.O_DIRECTORY)
            os.close(current)
            current = following
    finally:
        os.close(current)


def find_executable(root: int, path: str) -> str:
    """Whether ``path`` inside a root can be executed: "" if so, else "missing", "directory" or "denied"."""
    try:
        fd = open_in_root(root, path, os.O_PATH)
    except KernelError as error:
        return "denied" if error.errno in (errno.EACCES, errno.ELOOP) else "missing"
    try:
        mode = os.fstat(fd).st_mode
    finally:
        os.close(fd)
    if mode & 0o170000 == 0o040000:
        return "directory"
    if mode & 0o170000 != 0o100000 or not mode & 0o111:
        return "denied"
    return ""


# cgroups ----------------------------------------------------------------------------------------------------------------


def cgroup_mode(root: Path = CGROUP_ROOT) -> str:
    """``v2``, ``v1``, or ``hybrid`` (v1 controllers with a v2 tree beside them)."""
    if (root / "cgroup.controllers").exists():
        return "v2"
    if (root / "unified" / "cgroup.procs").exists():
        return "hybrid"
    return "v1"


def hierarchies(root: Path = CGROUP_ROOT) -> Iterator[Path]:
    """The roots of the mounted hierarchies, each once (cpu and cpu,cpuacct are one under two names)."""
    if (root / "cgroup.controllers").exists():
        yield root
        return
    seen: set[int] = set()
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return
    for name in names:
        path = root / name
        if (path / "cgroup.procs").exists():
            device = path.stat().st_dev
            if device not in seen:
                seen.add(device)
                yield path


def cgroup_directories(path: str) -> list[Path]:
    """Where the cgroup ``path`` exists, over all hierarchies."""
    return [place for root in hierarchies() if (place := root / path.lstrip("/")).is_dir()]


def cgroup_processes(path: str) -> list[int]:
    """PIDs in a cgroup and those below it, from the first hierarchy that knows it."""
    for place in cgroup_directories(path):
        found = []
        for directory, _, _ in os.walk(place):
            try:
                found += [int(line) for line in Path(directory, "cgroup.procs").read_text().split()]
            except OSError:
                continue
        return [pid for pid in found if pid > 0]  # 0 is a process of an outer PID namespace; to kill(2) it would be ourselves
    return []


def frozen(path: str) -> bool:
    """Whether a cgroup is frozen or about to be (v2 cgroup.freeze, v1 freezer.state)."""
    for place in cgroup_directories(path):
        for name, word in (("cgroup.freeze", "1"), ("freezer.self_freezing", "1")):
            try:
                if (place / name).read_text().strip() == word:
                    return True
            except OSError:
                continue
    return False


def thaw(path: str) -> None:
    """Undo a freeze. A frozen process of cgroup v1 doesn't even die."""
    for place in cgroup_directories(path):
        for name, word in (("cgroup.freeze", "0"), ("freezer.state", "THAWED")):
            if (place / name).exists():
                try:
                    (place / name).write_text(word)
                except OSError:
                    pass


def kill_cgroup(path: str) -> int:
    """SIGKILL to every process of a cgroup. How many there were."""
    for place in cgroup_directories(path):
        killer = place / "cgroup.kill"
        if killer.exists():
            try:
                killer.write_text("1")
            except OSError:
                pass
    processes = cgroup_processes(path)
    for pid in processes:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            pass
    if processes:
        thaw(path)
    return len(processes)


def remove_cgroup(path: str) -> bool:
    """Remove an empty cgroup and those below it in every hierarchy. False if a process is still in one."""
    gone = True
    for place in cgroup_directories(path):
        for directory, _, _ in os.walk(place, topdown=False):
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                pass
            except OSError:
                gone = False
    return gone


def oom_kills(path: str) -> int:
    """How many processes of the cgroup the kernel's OOM killer ended (v2 memory.events, v1 memory.oom_control)."""
    relative = path.lstrip("/")
    for candidate in (CGROUP_ROOT / relative / "memory.events", CGROUP_ROOT / "memory" / relative / "memory.oom_control"):
        try:
            lines = candidate.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


class OomNotice:
    """Readable when the OOM killer strikes in a cgroup, or may have: `oom_kills` tells. KernelError if the cgroup isn't there.

    v2: inotify(7) on memory.events, whose counters change before it's told. v1: an eventfd(2) at memory.oom_control, told when memory has
    run out, so a moment before the kill is counted.
    """

    def __init__(self, path: str) -> None:
        relative = path.lstrip("/")
        events = CGROUP_ROOT / relative / "memory.events"
        if events.exists():
            self._fd = _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1", str(events))
            try:
                _check(_libc.inotify_add_watch(self._fd, os.fsencode(events), _IN_MODIFY), "inotify_add_watch", str(events))
            except KernelError:
                os.close(self._fd)
                raise
            return
        place = CGROUP_ROOT / "memory" / relative
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            control = os.open(place / "memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
            try:
                (place / "cgroup.event_control").write_text(f"{self._fd} {control}")
            finally:
                os.close(control)
        except OSError as error:
            os.close(self._fd)
            raise KernelError(error.errno or 0, "watch", str(place)) from None

    def fileno(self) -> int:
        return self._fd

    def clear(self) -> None:
        try:
            os.read(self._fd, 4096)
        except BlockingIOError:
            pass

    def close(self) -> None:
        os.close(self._fd)


def swap_accounting() -> bool:
    """Whether a limit on swap can be set. Without it the runtime would fail on the missing file."""
    if (CGROUP_ROOT / "cgroup.controllers").exists():
        return any(CGROUP_ROOT.glob("*/memory.swap.max"))
    return (CGROUP_ROOT / "memory" / "memory.memsw.limit_in_bytes").exists()


def warm_path(parent: str) -> str:
    """Make ``<parent>/warm`` in one hierarchy and return its cgroup.procs: the target of a shim's WARM. "" if it can't be made.

    Which hierarchy doesn't matter: the lock that is to be warmed is one for all of them.
    """
    for root in hierarchies():
        if root.name == "cpuset":
            continue  # refuses processes until its cpus are set
        place = root / parent.lstrip("/") / WARM_CGROUP
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        return str(place / "cgroup.procs")
    return ""


def shim_cgroups(path: str) -> list[str]:
    """Make the cgroup ``path`` in the hierarchies where systemd tracks services; their cgroup.procs. [] without systemd (sd_booted(3)).

    Shims must leave the service's cgroup: who is in it is killed with the service by ``systemctl kill``, systemd-oomd or a unit
    without KillMode=process, and counted as its memory.
    """
    if not Path("/run/systemd/system").is_dir():
        return []
    made = []
    for root in (CGROUP_ROOT, CGROUP_ROOT / "unified", CGROUP_ROOT / "systemd"):
        if not (root / "cgroup.procs").exists():
            continue
        place = root / path.lstrip("/")
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KernelError(error.errno or 0, "mkdir", str(place)) from None
        made.append(str(place / "cgroup.procs"))
    return made


def capability_bound() -> int:
    """The capabilities this process may hand on, as a bit mask (proc_pid_status(5), CapBnd)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            return int(line.split()[1], 16)
    return (1 << 64) - 1


# processes --------------------------------------------------------------------------------------------------------------


_LOOKS = 1000  # a family that outgrows as many looks at it, each stopping all it finds, can't be


def _family(pid: int) -> tuple[int, int]:
    """(parent, session) of a process (proc_pid_stat(5)); zeros if there's no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b") ", 1)[1].split()
    except (OSError, IndexError):
        return 0, 0
    return int(fields[1]), int(fields[3])


def kill_tree(cgroup: str, pid: int) -> int:
    """SIGKILL to a process of a cgroup and to what it has begun: who descends from it, and its session if it leads one (who was orphaned
    is still in that). How many there were.

    Each is stopped before the next look, so that at the end nobody is left to fork. Only processes of the cgroup are ever touched.
    """
    found: dict[int, int] = {}
    try:
        for _ in range(_LOOKS):
            families = {member: _family(member) for member in cgroup_processes(cgroup) if member not in found}
            kin = {pid, *found}
            fresh: list[int] = []
            grown = True
            while grown:
                more = [member for member, (parent, session) in families.items() if member not in kin and (parent in kin or session == pid)]
                grown = bool(more)
                kin.update(more)
                fresh += more
            if pid in families:
                fresh.append(pid)
            if not fresh:
                break
            for member in fresh:
                _stop(member, families[member], found)
        for descriptor in found.values():
            _signal(descriptor, signal.SIGKILL)
        return len(found)
    finally:
        for descriptor in found.values():
            os.close(descriptor)


def _stop(pid: int, family: tuple[int, int], found: dict[int, int]) -> None:
    """Stop a process, and keep a descriptor of it. If it has gone meanwhile, and its number perhaps is another's, nothing happens."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return
    if _family(pid) != family:
        os.close(descriptor)
        return
    found[pid] = descriptor
    _signal(descriptor, signal.SIGSTOP)


def _signal(descriptor: int, number: int) -> None:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        pass


def children_with(parent: int, word: str) -> list[int]:
    """Descriptors (pidfd_open(2), readable at its end) of the children of ``parent`` that have ``word`` among their arguments."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or _family(int(name))[0] != parent:
            continue
        try:
            arguments = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            if word.encode() in arguments:
                found.append(os.pidfd_open(int(name)))
        except OSError:
            continue
    return found

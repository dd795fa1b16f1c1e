"""Network namespaces: made by a thread of their own, kept by a bind mount, dropped by unmounting it.

unshare(2) and setns(2) change the calling thread. A thread that failed to come back would do everybody else's work in a container's
namespace, so no thread ever comes back: each batch of namespaces is made by a new thread that ends in the last one it made.

Dropping the last reference makes the kernel take down everything in a namespace, veth pairs included, in its own time; asking
it to delete a veth instead would make us wait 15-30 ms for it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from .. import rtnl
from . import syscalls
from .netlink import RouteSocket

_LOOPBACK_INDEX = 1
_SETTINGS = (
    # Interfaces born later have no IPv6 of their own: the networks have none, and without it no link-local address has to be probed
    # for duplicates. lo exists already and keeps ::1.
    ("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"),
    # Docker's defaults for containers: who isn't root inside may listen on port 80 and send pings.
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
    ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
)


@dataclass(slots=True)
class Namespace:
    """A namespace held by descriptors: dropped by ``close`` unless ``keep`` gave it a path. lo is up.

    ``inode`` is its number on nsfs, ``route`` an rtnetlink socket in it.
    """

    fd: int
    inode: int
    route: RouteSocket

    def close(self) -> None:
        self.route.close()
        os.close(self.fd)

    def keep(self, path: str) -> None:
        """Keep the namespace alive at ``path``, which must not be a mount point. Raises OSError, then leaves nothing."""
        os.close(os.open(path, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o444))
        try:
            syscalls.bind_mount(f"/proc/self/fd/{self.fd}", path)
        except BaseException:
            os.unlink(path)
            raise


def make(count: int) -> list[Namespace]:
    """New namespaces, about 1 ms each: call it in a thread. Raises OSError if not even one could be made."""
    made: list[Namespace] = []
    problems: list[BaseException] = []
    thread = threading.Thread(target=_make, args=(count, made, problems), name="netns", daemon=True)
    thread.start()
    thread.join()
    if not made and problems:
        raise problems[0]
    return made


def _make(count: int, made: list[Namespace], problems: list[BaseException]) -> None:
    try:
        for _ in range(count):
            made.append(_make_one())
    except BaseException as error:
        problems.append(error)


def _make_one() -> Namespace:
    syscalls.unshare_net()
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        route = RouteSocket()
    except BaseException:
        os.close(fd)
        raise
    try:
        route.run(rtnl.link_up(1, _LOOPBACK_INDEX))
        for path, value in _SETTINGS:
            _set(path, value)
        return Namespace(fd, os.fstat(fd).st_ino, route)
    except BaseException:
        route.close()
        os.close(fd)
        raise


def _set(path: str, value: str) -> None:
    """Set one of the calling thread's namespace's sysctls; each is a comfort that a namespace is whole without."""
    try:
        with open(path, "w") as file:
            file.write(value)
    except OSError as error:
        # Not there: a kernel without it. Read-only: /proc/sys of a restricted host. EINVAL: IDs beyond the user namespace's.
        if error.errno not in (errno.ENOENT, errno.EROFS, errno.EACCES, errno.EINVAL):
            raise


def drop(path: str) -> None:
    """Let go of the namespace kept at ``path``; the kernel takes it down once nobody is in it. Idempotent, about 0.1 ms.

    Unlinking also detaches copies of the mount in other mount namespaces, so a copied mount table can't keep a container's network.
    """
    try:
        while True:
            syscalls.unmount(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # not a mount point (any more); gone
            raise
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def alive(path: str, inode: int) -> bool:
    """Whether the namespace with that number is still kept at ``path``."""
    try:
        return os.stat(path).st_ino == inode
    except OSError:
        return False


def sweep(directory: Path, keep: Collection[str]) -> list[str]:
    """Drop every namespace in ``directory`` whose file name isn't in ``keep``; returns the names. What a killed netd left half-made."""
    dropped = []
    for entry in os.scandir(directory):
        if entry.name not in keep:
            drop(entry.path)
            dropped.append(entry.name)
    return dropped

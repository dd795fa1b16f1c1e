"""Who may do what on the bus: roles, decided by the kernel's word on a peer (SO_PEERCRED, SO_PEERGROUPS; socket(7), unix(7)).

- root and the broker's own user may do everything;
- the user of a service may do what a user may, register that service's name and publish its topics;
- a member of the group ``pyx`` calls and subscribes, which is as good as being root;
- a member of the group ``pyx-monitor`` subscribes and calls read-only methods, with secrets masked;
- nobody else may connect.

Every user has quotas, so that one that runs wild can't starve the others (dbus-broker accounts by user for the same reason). root has
them too, but for connections, where some are kept free for it instead.
"""

from __future__ import annotations

import grp
import os
import pwd
import socket
import struct
from collections.abc import Iterable

from .. import errors

ROOT, SERVICE, USER, MONITOR = "root", "service", "user", "monitor"
GROUP, MONITOR_GROUP = "pyx", "pyx-monitor"
SERVICES = ("containerd", "imaged", "netd", "logd", "volumed")
# Whose topics those are; any other first word is the service of that name.
TOPIC_OWNERS = {
    "container": "containerd",
    "image": "imaged",
    "network": "netd",
    "log": "logd",
    "volume": "volumed",
    "service": "bus",
    "daemon": "bus",
}
SO_PEERGROUPS = 59  # Linux 4.13; not in Python's socket module
_PYTHONS_LIMIT = 1024  # of getsockopt's buffer, which is 256 groups; the kernel's own is 65,536 (NGROUPS_MAX)

MAX_CONNECTIONS = 4096
KEPT_FOR_ROOT = 256


class User:
    """One user's account: what all its connections have together. The limits are the reasons: about a tenth of the whole each."""

    __slots__ = ("call_bytes", "calls", "connections", "queued_bytes", "subscriptions", "uid", "wishes")

    max_connections = 512
    max_subscriptions = 1024
    # Patterns and filters' values of all subscriptions: some 100 bytes each.
    max_wishes = 16_384
    max_calls = 8192
    # Bodies of open calls: what a caller makes services hold.
    max_call_bytes = 64 << 20
    # Frames half received, and frames the user's own connections haven't read.
    max_queued_bytes = 64 << 20

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.connections = 0
        self.subscriptions = 0
        self.wishes = 0
        self.calls = 0
        self.call_bytes = 0
        self.queued_bytes = 0


class Roles:
    """The host's users and groups as they were at start or at the last reload. ``service_uids``: uid → the services it may be."""

    def __init__(
        self,
        *,
        own_uid: int = 0,
        user_gids: Iterable[int] = (),
        monitor_gids: Iterable[int] = (),
        service_uids: dict[int, str] | None = None,
    ) -> None:
        self._all_powerful = frozenset({0, own_uid})
        self._user_gids = frozenset(user_gids)
        self._monitor_gids = frozenset(monitor_gids)
        self._service_uids = service_uids or {}

    @classmethod
    def of_host(cls) -> Roles:
        """From the host's user and group databases: the groups above, and the users ``pyx-<service>``."""
        services = {}
        for name in SERVICES:
            try:
                services[pwd.getpwnam(f"pyx-{name}").pw_uid] = name
            except KeyError:
                continue
        return cls(
            own_uid=os.geteuid(),
            user_gids=[gid] if (gid := group_id(GROUP)) >= 0 else [],
            monitor_gids=[gid] if (gid := group_id(MONITOR_GROUP)) >= 0 else [],
            service_uids=services,
        )

    def of(self, uid: int, gid: int, groups: Iterable[int]) -> tuple[str, str]:
        """(role, the service it may be: "" none, "*" any). Raises ``PermissionDenied``."""
        if uid in self._all_powerful:
            return ROOT, "*"
        if uid in self._service_uids:
            return SERVICE, self._service_uids[uid]
        belongs = {gid, *groups}
        if belongs & self._user_gids:
            return USER, ""
        if belongs & self._monitor_gids:
            return MONITOR, ""
        raise errors.PermissionDenied(
            f"user {uid} may not use this bus",
            hint=f'members of the group "{GROUP}" may, which is as good as being root; those of "{MONITOR_GROUP}" may watch',
        )


def group_id(name: str) -> int:
    """-1 if the host has no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return -1


def owner_of(topic: str) -> str:
    """The service that publishes a topic."""
    kind = topic.partition(".")[0]
    return TOPIC_OWNERS.get(kind, kind)


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(uid, gid, pid) of who connected, as of then (SO_PEERCRED)."""
    pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid, gid, pid


def groups(sock: socket.socket) -> list[int]:
    """Supplementary groups of who connected, as of then (SO_PEERGROUPS)."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _PYTHONS_LIMIT)
    except OSError:
        raw = _many_groups(sock)
    return list(struct.unpack(f"{len(raw) // 4}I", raw))


def _many_groups(sock: socket.socket) -> bytes:
    import ctypes  # rare enough to be worth nobody's memory

    length = ctypes.c_uint(4 * 65_536)
    buffer = ctypes.create_string_buffer(length.value)
    libc = ctypes.CDLL(None)
    if libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, buffer, ctypes.byref(length)) < 0:
        return b""
    return buffer.raw[: length.value]

"""A connection as the broker's decisions see it: who it is, what it has open, and a way to send."""

from __future__ import annotations

from abc import ABC, abstractmethod

from .metrics import MethodCounters
from .roles import ROOT, SERVICE, User

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .subscriptions import Subscription

# (the service that has the call, its counters, when it came in monotonic ns, size of its body)
OpenCall = tuple["Peer", MethodCounters, int, int]


class Peer(ABC):
    """One connection. ``uid``, ``gid`` and ``pid`` are the kernel's word (SO_PEERCRED), ``role`` and ``may_be`` what follows from it
    (``Roles.of``)."""

    __slots__ = (
        "calls",
        "gid",
        "id",
        "incoming",
        "may_be",
        "name",
        "pid",
        "publisher",
        "pushed",
        "refused_from",
        "role",
        "service",
        "source",
        "subscriptions",
        "trusted",
        "uid",
        "user",
    )

    def __init__(self, user: User, gid: int, pid: int, role: str = ROOT, may_be: str = "*") -> None:
        self.user = user
        self.uid = user.uid
        self.gid = gid
        self.pid = pid
        self.role = role
        self.trusted = role in (ROOT, SERVICE)  # limits by user don't apply: who is root can stop the broker anyway
        self.may_be = may_be
        self.id = 0
        self.name = ""
        self.service = ""
        self.calls: dict[int, OpenCall] = {}  # by serial
        self.pushed: dict[int, int] = {}  # as a service: bytes of calls since my queue was empty, by the caller's user
        self.incoming: set[tuple[int, int]] = set()  # calls I have as a service: (caller's ID, serial)
        self.subscriptions: dict[int, Subscription] = {}
        # as a publisher
        self.source = b""
        self.publisher = b""
        self.refused_from = 0  # the event that couldn't be kept: nothing after it is taken before it has come again

    @abstractmethod
    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """Queue bytes for this peer; ``fds`` are closed once they're sent."""

    @property
    @abstractmethod
    def queued_bytes(self) -> int:
        """What the peer hasn't taken yet."""

    @property
    def user_is_full(self) -> bool:
        """Its user's connections together have as much unread as they may. Doesn't hold for who could stop the broker anyway."""
        return not self.trusted and self.user.queued_bytes > self.user.max_queued_bytes

    @abstractmethod
    def disconnect(self, reason: str) -> None:
        """End the connection, once what is being done is done."""

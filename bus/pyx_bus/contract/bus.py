"""The broker's own methods and events: who is there, and how it fares."""

from __future__ import annotations

from typing import ClassVar

from .base import Empty, Event, Message, Method


class ServiceInfo(Message, frozen=True, kw_only=True):
    """A registered service: ``since_ns`` is when it registered, ``version`` its distribution's."""

    name: str
    pid: int
    uid: int
    since_ns: int
    version: str = ""


class ServiceList(Message, frozen=True, kw_only=True):
    services: list[ServiceInfo] = []


class MethodStats(Message, frozen=True, kw_only=True):
    """Calls of one method since the broker's start.

    ``latency_us_log2[n]`` counts calls that took less than 2^n µs from the broker's view (and at least 2^(n-1)); ``total_us`` is the
    sum. ``cancelled`` ones and ``errors`` are among the calls.
    """

    calls: int = 0
    errors: int = 0
    cancelled: int = 0
    total_us: int = 0
    latency_us_log2: list[int] = []


class UserStats(Message, frozen=True, kw_only=True):
    """What one user's connections hold now, all together; each has a quota."""

    uid: int
    connections: int = 0
    subscriptions: int = 0
    calls: int = 0
    call_bytes: int = 0
    queued_bytes: int = 0


class BrokerStats(Message, frozen=True, kw_only=True):
    """How the broker fares. Totals are since its start, the rest is now.

    ``slow_readers`` read from the journal because they didn't keep up or began in the past, ``most_behind`` is how many events the
    last of them has yet to see; ``slow_readers_total`` counts how often one fell behind. ``gaps`` were told, ``events_lost`` in them.
    ``journal_error`` is set while the journal can't be written (a full disk): publishers keep their events, and watchers get none.
    """

    connections: int = 0
    connections_by_role: dict[str, int] = {}
    users: list[UserStats] = []
    refused: int = 0
    protocol_errors: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    calls_in_flight: int = 0
    calls_total: int = 0
    methods: dict[str, MethodStats] = {}
    subscriptions: int = 0
    events_total: int = 0
    events_duplicate: int = 0
    events_refused: int = 0
    events_lost: int = 0
    gaps: int = 0
    slow_readers: int = 0
    slow_readers_total: int = 0
    most_behind: int = 0
    journal_id: str = ""
    journal_error: str = ""
    journal_bytes: int = 0
    journal_segments: int = 0
    oldest_offset: int = 0
    next_offset: int = 0


class DurableInfo(Message, frozen=True, kw_only=True):
    """A durable subscription: ``offset`` is the next event it wants, ``pid`` who uses it now (0: nobody)."""

    name: str
    uid: int
    offset: int
    acked_ns: int = 0
    pid: int = 0


class DurableList(Message, frozen=True, kw_only=True):
    durables: list[DurableInfo] = []


class DurableRef(Message, frozen=True, kw_only=True):
    """``uid``: whose it is, the caller's own if not given. Errors of ``bus.forget``: not_found, conflict while it's in use,
    permission_denied (another user's, and not root)."""

    name: str
    uid: int | None = None


SERVICES = Method("bus.services", Empty, ServiceList, idempotent=True, read_only=True)
STATS = Method("bus.stats", Empty, BrokerStats, idempotent=True, read_only=True)
DURABLES = Method("bus.durables", Empty, DurableList, idempotent=True, read_only=True)
FORGET = Method("bus.forget", DurableRef, Empty)


class ServiceUp(Event, frozen=True, kw_only=True):
    """``id`` is the service's name; attributes: name, pid."""

    topic: ClassVar[str] = "service.up"


class ServiceDown(Event, frozen=True, kw_only=True):
    topic: ClassVar[str] = "service.down"


class DaemonReloaded(Event, frozen=True, kw_only=True):
    """The broker has read the host's users and groups again. ``id`` is "bus"."""

    topic: ClassVar[str] = "daemon.reload"


class Gap(Message, frozen=True, kw_only=True):
    """What a subscriber won't see: the events of these offsets that it asked for. ``lost`` is at most how many."""

    lost: int
    first_offset: int
    last_offset: int


METHODS = (SERVICES, STATS, DURABLES, FORGET)
EVENTS = (ServiceUp, ServiceDown, DaemonReloaded)

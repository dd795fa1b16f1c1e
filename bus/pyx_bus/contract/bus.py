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


class BrokerStats(Message, frozen=True, kw_only=True):
    """Counters since the broker's start."""

    connections: int = 0
    calls_in_flight: int = 0
    calls_total: int = 0
    events_total: int = 0
    events_dropped: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    refused: int = 0
    protocol_errors: int = 0


SERVICES = Method("bus.services", Empty, ServiceList, idempotent=True, read_only=True)
STATS = Method("bus.stats", Empty, BrokerStats, idempotent=True, read_only=True)


class ServiceUp(Event, frozen=True, kw_only=True):
    """``id`` is the service's name; attributes: pid."""

    topic: ClassVar[str] = "service.up"


class ServiceDown(Event, frozen=True, kw_only=True):
    topic: ClassVar[str] = "service.down"


METHODS = (SERVICES, STATS)
EVENTS = (ServiceUp, ServiceDown)

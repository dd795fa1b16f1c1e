"""Typed payloads of events: which class of the contract an event's topic stands for.

The table is drawn from the modules of ``pyx_bus.contract`` when the first event is looked at, so that whoever only calls doesn't
import them all.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import msgspec

from .. import contract
from ..contract.base import Event, Message

log = logging.getLogger("pyx_bus.client")

_decode_plain = msgspec.msgpack.Decoder().decode


class Gap(Message, frozen=True, kw_only=True):
    """Payload of ``bus.gap``: ``lost`` events from ``first_offset`` to ``last_offset`` are gone, kept no longer.

    When the broker came back with another journal than before (its directory was removed), ``lost`` is -1, as nobody knows,
    ``journal`` is the new one's ID, and the events that follow are numbered anew.
    """

    lost: int
    first_offset: int = 0
    last_offset: int = 0
    journal: str = ""


class Heartbeat(Message, frozen=True, kw_only=True):
    """Payload of ``bus.heartbeat``: every event before ``next_offset`` that matches has been delivered."""

    next_offset: int


@functools.cache
def event_types() -> dict[str, type[Event]]:
    """The event class of every topic of the contract."""
    import importlib
    import pkgutil

    types: dict[str, type[Event]] = {}
    for module in pkgutil.iter_modules(contract.__path__):
        for value in vars(importlib.import_module(f"{contract.__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Event) and value.topic:
                types[value.topic] = value
    return types


@functools.cache
def _decoders() -> dict[str, msgspec.msgpack.Decoder[Event]]:
    return {topic: msgspec.msgpack.Decoder(kind) for topic, kind in event_types().items()}


def decode_payload(topic: str, raw: bytes) -> Any:
    """The contract's event; a dict if the topic isn't in this version's contract, or the payload isn't what the contract says."""
    decoder = _decoders().get(topic)
    if decoder is not None:
        try:
            return decoder.decode(raw)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            log.debug("an event isn't what the contract says: %s: %s", topic, error)
    try:
        value = _decode_plain(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # the broker lets only maps pass, but looks no deeper
        log.warning("the payload of an event can't be read: %s: %s", topic, error)
        return {}
    return value if isinstance(value, dict) else {}

"""What a contract is made of: messages, methods and events.

A message is a frozen ``msgspec.Struct``: decoding validates it in the same pass. Unknown fields are ignored (a newer peer may send
more), missing required ones and wrong types are ``invalid_argument`` before any service code runs. Fields with defaults may be
added; a field's meaning, unit or type never changes under its name (docs/bus.md, "Compatibility").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every request, result, item and event payload. On the wire a msgpack map, keys are field names."""


class Empty(Message, frozen=True, kw_only=True):
    """Nothing to say."""


class Retain(Message, frozen=True, kw_only=True):
    """Which containers still live: whatever is held for any other ID is to be released. Idempotent.

    ``before_ns`` is the wall clock when the list was drawn; holdings made later are left alone, so that a container created
    meanwhile can't lose what it has just been given.
    """

    container_ids: list[str]
    before_ns: int


class Released(Message, frozen=True, kw_only=True):
    """Answer to ``Retain``: the IDs whose leftovers were released."""

    container_ids: list[str] = []


Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[Req, Res]):
    """A method of a service: ``name`` is ``<service>.<verb>``.

    ``item`` is the type of the items streamed before the result, if it streams. ``idempotent`` methods are retried by the client
    when the connection broke. ``read_only`` methods change nothing, show nothing of what a container writes or holds, not even names of
    files, and are open to monitors (the group pyx-monitor), for whom the service masks secrets. Descriptors that travel with the request,
    an item or the result are described in the request's docstring.
    """

    name: str
    request: type[Req]
    result: type[Res]
    item: type[Message] | None = None
    idempotent: bool = False
    read_only: bool = False


class Event(Message, frozen=True, kw_only=True, omit_defaults=False):
    """Base of every event payload: Docker's actor (``id`` and string ``attributes``) at a time.

    Every concrete event class names its topic (``topic: ClassVar[str] = "container.start"``): ``<type>.<action>`` as in Docker's
    events, so that the type is what precedes the first dot. An action of several words has a dot between them where that makes a
    family (``container.exec.start``); Docker's name of it has ``_``. No payload ever carries a secret such as an environment's values:
    whoever may subscribe sees all of them.
    """

    topic: ClassVar[str] = ""

    id: str
    time_ns: int
    attributes: dict[str, str] = {}

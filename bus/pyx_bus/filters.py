"""What a subscription wants: topic patterns, and filters on what an event says. Pure; the broker decides with it.

Filters are Docker's (Engine API, ``GET /events``): a map of field to values. The values of one field are alternatives, all fields
have to hold; of ``label`` all values have to hold. A field with ``!`` behind its name must not match. Fields:

- ``type``: the topic's first word (``container``); ``event``: the rest of it in Docker's form (``die``, ``exec_start``), or a
  first part of it that ends at a colon (``health_status`` for ``health_status: healthy``);
- ``container``, ``image``, ``network``, ``volume``: the actor if it's of that type, else the attribute of that name, by ID, a first
  part of the ID of at least 4 digits, or name; an image also without its tag;
- ``label``: an attribute, ``key`` or ``key=value``; ``service``: who published it.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgpack import unpackb

from . import errors
from .wire import topic_matches

MAX_PATTERNS = 64
MAX_VALUES = 256
OBJECTS = ("container", "image", "network", "volume")
FIELDS = ("type", "event", "label", "service", *OBJECTS)
_SHORTEST_ID = 4


def action_of(topic: str) -> str:
    """Docker's name for what happened: ``container.exec.start`` is ``exec_start``."""
    return topic.partition(".")[2].replace(".", "_")


class Filter:
    """Patterns and filters of one subscription."""

    __slots__ = ("patterns", "wanted")

    def __init__(self, patterns: list[str], filters: dict[str, list[str]] | None = None) -> None:
        self.patterns = patterns
        self.wanted = [
            (field.removesuffix("!"), field.endswith("!"), _Values(values)) for field, values in (filters or {}).items()
        ]

    @property
    def size(self) -> int:
        """Patterns and values in all."""
        return len(self.patterns) + sum(len(values) for _, _, values in self.wanted)

    @property
    def everything(self) -> bool:
        """Every event passes."""
        return ">" in self.patterns and not self.wanted

    def topic(self, topic: str, source: str) -> bool | None:
        """Whether an event of this topic and source passes; None if that depends on its payload."""
        if not any(topic_matches(pattern, topic) for pattern in self.patterns):
            return False
        open_question = False
        for field, negated, values in self.wanted:
            if field == "type":
                holds = topic.partition(".")[0] in values
            elif field == "event":
                action = action_of(topic)
                holds = action in values
                if not holds and any(value.partition(":")[0] == action for value in values):
                    open_question = True  # health_status: what follows the colon is in the payload
                    continue
            elif field == "service":
                holds = source in values
            else:
                open_question = True
                continue
            if holds == negated:
                return False
        return None if open_question else True

    def payload(self, topic: str, raw: bytes) -> bool:
        """Whether an event for which ``topic`` gave None passes."""
        try:
            event = unpackb(raw)
            return self.holds(topic, event["id"], event.get("attributes", {}))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return False  # it isn't an event as the contract has them

    def holds(self, topic: str, actor: str, attributes: dict[str, str]) -> bool:
        """The same for an event that is decoded already."""
        return all(
            _holds(field, values, topic, actor, attributes) != negated
            for field, negated, values in self.wanted
            if field not in ("type", "service")
        )


class _Values(list[str]):
    """The values of one field. An ID may be given by its beginning: with ``ids`` by length, looking a name up takes no longer for many."""

    def __init__(self, values: Iterable[str]) -> None:
        super().__init__(values)
        self.exact = frozenset(self)
        self.ids = frozenset(digits for value in self if len(digits := value.removeprefix("sha256:")) >= _SHORTEST_ID)
        self.lengths = frozenset(map(len, self.ids))

    def names(self, name: str) -> bool:
        """Whether one of them is this name, or begins this ID."""
        if name in self.exact:
            return True
        bare = name.removeprefix("sha256:")
        return len(bare) == 64 and any(bare[:length] in self.ids for length in self.lengths)


def _holds(field: str, values: _Values, topic: str, actor: str, attributes: dict[str, str]) -> bool:
    if field == "event":
        action = action_of(topic)
        # Docker's long forms: "health_status: healthy", "exec_create: ls -l"
        more = attributes.get("command" if action.startswith("exec_") else action, "")
        said = {action, f"{action}: {more}"}
        return any(value in said for value in values)
    if field == "label":
        return all(_label(attributes, value) for value in values)
    if field == topic.partition(".")[0]:
        names = [actor, attributes.get("name", "")]
    else:
        names = [attributes[field]] if field in attributes else []
    if field == "image":
        names += [name.rpartition(":")[0] for name in names if "/" not in name.rpartition(":")[2]]
    return any(map(values.names, names))


def _label(attributes: dict[str, str], wanted: str) -> bool:
    key, equals, value = wanted.partition("=")
    return key in attributes and (not equals or attributes[key] == value)


def parse(patterns: object, filters: object) -> Filter:
    """The filter of a SUBSCRIBE's body. Raises ``InvalidArgument``."""
    if not isinstance(patterns, list) or not 0 < len(patterns) <= MAX_PATTERNS:
        raise errors.InvalidArgument(f"a subscription has 1 to {MAX_PATTERNS} topic patterns")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern or not all(pattern.split(".")) or ">" in pattern[:-1]:
            raise errors.InvalidArgument(f"bad topic pattern {pattern!r}")
    if filters is None:
        filters = {}
    if not isinstance(filters, dict):
        raise errors.InvalidArgument("filters are a map of field to values")
    for field, values in filters.items():
        if not isinstance(field, str) or field.removesuffix("!") not in FIELDS:
            raise errors.InvalidArgument(
                f"unknown filter {field!r}", hint=f"known: {', '.join(FIELDS)}, each also with ! behind it"
            )
        if (
            not isinstance(values, list)
            or not 0 < len(values) <= MAX_VALUES
            or not all(isinstance(value, str) and value for value in values)
        ):
            raise errors.InvalidArgument(f'the values of the filter "{field}" are 1 to {MAX_VALUES} texts')
    return Filter(patterns, filters)

"""The contract as it is on the wire: a change of any message, method or event fails here until it's made on purpose.

``fingerprints.json`` is renewed with ``python tests/contract/test_contract_messages.py``; CONTRIBUTING.md says what may change.
"""

from __future__ import annotations

import hashlib
import json
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import pytest

import pyx_bus.contract
from pyx_bus.contract.base import Event, Method

GOLDEN = Path(__file__).with_name("fingerprints.json")
MODULES = [
    import_module(f"pyx_bus.contract.{module.name}")
    for module in pkgutil.iter_modules(pyx_bus.contract.__path__)
    if module.name != "base"
]
METHODS: list[Method[Any, Any]] = [method for module in MODULES for method in module.METHODS]
EVENTS: list[type[Event]] = [event for module in MODULES for event in module.EVENTS]


def fingerprint(kind: type[msgspec.Struct] | None) -> str:
    """Of every field's name, type, default and order, through all nested messages."""
    if kind is None:
        return ""
    schema = msgspec.json.schema(kind)

    def strip(value: object) -> object:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k != "description"}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return hashlib.sha256(json.dumps(strip(schema), sort_keys=True).encode()).hexdigest()[:16]


def current() -> dict[str, Any]:
    return {
        "methods": {
            m.name: {
                "request": fingerprint(m.request),
                "result": fingerprint(m.result),
                "item": fingerprint(m.item),
                "idempotent": m.idempotent,
                "read_only": m.read_only,
            }
            for m in METHODS
        },
        "events": {e.topic: fingerprint(e) for e in EVENTS},
    }


def test_nothing_changed_on_the_wire() -> None:
    assert current() == json.loads(GOLDEN.read_text()), "renew fingerprints.json if this change is meant (CONTRIBUTING.md)"


def test_names_are_unique_and_belong_to_their_module() -> None:
    names = [m.name for m in METHODS]
    assert len(set(names)) == len(names)
    topics = [e.topic for e in EVENTS]
    assert len(set(topics)) == len(topics)
    for module in MODULES:
        for method in module.METHODS:
            assert method.name.startswith(module.__name__.rpartition(".")[2] + ".")


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_request_is_documented(method: Method[Any, Any]) -> None:
    assert method.request.__doc__
    assert "Event" not in method.request.__name__


def test_unknown_fields_are_ignored_and_defaults_left_out() -> None:
    from pyx_bus.contract.netd import PortMapping

    data = msgspec.msgpack.encode({"container_port": 80, "a_field_of_the_future": [1, 2]})
    mapping = msgspec.msgpack.decode(data, type=PortMapping)
    assert mapping == PortMapping(container_port=80)
    assert msgspec.msgpack.encode(mapping).hex() == "81ae636f6e7461696e65725f706f727450"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(current(), indent=1, sort_keys=True) + "\n")


def test_every_event_is_documented() -> None:
    """docs/events.md and docs/containers.md tell of every topic; containers' stand there without their first word."""
    root = Path(__file__).parents[2] / "docs"
    told = (root / "events.md").read_text() + (root / "containers.md").read_text()
    words = set(re.findall(r"[a-z_]+(?:\.[a-z_]+)*", told))
    assert [e.topic for e in EVENTS if e.topic not in words and e.topic.removeprefix("container.") not in words] == []


def test_an_event_always_says_all_of_itself() -> None:
    """Readers in other languages needn't know our defaults."""
    for event in EVENTS:
        assert event.__struct_config__.omit_defaults is False, event.topic

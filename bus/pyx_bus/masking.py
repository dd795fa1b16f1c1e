"""What monitors don't get to see: values that people put secrets into. Pure; each service masks what it answers.

A monitor (the group pyx-monitor) may see what there is, not what it's worth: the names of environment variables and of options stay,
so that a tool can say that one is set. Commands, arguments and labels stay as they are: those are shown by ps and in events.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

MASK = "***"

_SECRET = re.compile(r"token|passw|secret|key|credential|auth", re.IGNORECASE)


def environment(entries: Iterable[str]) -> list[str]:
    """``NAME=value`` becomes ``NAME=***``; a name alone stays."""
    return [name + "=" + MASK if equals else name for name, equals, _ in (entry.partition("=") for entry in entries)]


def options(given: Mapping[str, str]) -> dict[str, str]:
    """Options of a log or volume driver. One whose name speaks of a token, password, secret, key or credential is masked; so is one
    in a list of mount options (``o=addr=10.0.0.1,password=x`` of a volume)."""
    return {name: MASK if _SECRET.search(name) else _nested(value) for name, value in given.items()}


def _nested(value: str) -> str:
    parts = []
    for part in value.split(","):
        name, equals, _ = part.partition("=")
        parts.append(f"{name}={MASK}" if equals and _SECRET.search(name) else part)
    return ",".join(parts)


def container(document: dict[str, Any]) -> dict[str, Any]:
    """The inspect document of a container. What its health checks wrote is masked like its output, which monitors don't read either."""
    host = document.get("HostConfig") or {}
    log = host.get("LogConfig") or {}
    masked = {
        **_with_config(document),
        "HostConfig": {**host, "LogConfig": {**log, "Config": options(log.get("Config") or {})}},
    }
    state = document.get("State") or {}
    if health := state.get("Health"):
        results = [{**result, "Output": MASK if result.get("Output") else ""} for result in health.get("Log") or []]
        masked["State"] = {**state, "Health": {**health, "Log": results}}
    return masked


def image(document: dict[str, Any]) -> dict[str, Any]:
    """The inspect document of an image."""
    return _with_config(document)


def volume(document: dict[str, Any]) -> dict[str, Any]:
    """The inspect document of a volume."""
    given = document.get("Options")
    return {**document, "Options": options(given) if given else given}


def _with_config(document: dict[str, Any]) -> dict[str, Any]:
    config = document.get("Config") or {}
    env = config.get("Env")
    return {**document, "Config": {**config, "Env": environment(env) if env else env}}

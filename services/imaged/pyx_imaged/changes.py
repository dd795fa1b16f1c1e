"""Dockerfile instructions given to ``import`` with ``--change``, applied to an image config. Pure."""

from __future__ import annotations

import json
import shlex
from typing import Any

from pyx_bus.errors import InvalidArgument


def apply(config: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """A new ``config`` object with the instructions applied in order. Errors: invalid_argument."""
    result = dict(config)
    for line in changes:
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        name = word.upper()
        if name not in _INSTRUCTIONS:
            known = ", ".join(sorted(_INSTRUCTIONS))
            raise InvalidArgument(f'unknown instruction in change: "{line}"', hint=f"one of {known}")
        if not rest and name not in ("CMD", "ENTRYPOINT"):
            raise InvalidArgument(f'change without an argument: "{line}"')
        try:
            _INSTRUCTIONS[name](result, rest)
        except ValueError as error:
            raise InvalidArgument(f'invalid change: "{line}" ({error})') from None
    return result


def _command(text: str) -> list[str]:
    """Exec form (a JSON array of texts), else shell form."""
    if text.startswith("["):
        try:
            words = json.loads(text)
        except ValueError:
            words = None
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            return words
    return ["/bin/sh", "-c", text] if text else []


def _pairs(text: str) -> list[tuple[str, str]]:
    """``key=value …`` with quotes, or the old ``key value``."""
    words = shlex.split(text)
    if "=" not in words[0]:
        key, _, value = text.partition(" ")
        if not value.strip():
            raise ValueError("must be key=value")
        return [(key, value.strip())]
    pairs = []
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise ValueError("must be key=value")
        pairs.append((key, value))
    return pairs


def _env(config: dict[str, Any], text: str) -> None:
    env = dict(entry.partition("=")[::2] for entry in config.get("Env") or [])
    env.update(_pairs(text))
    config["Env"] = [f"{key}={value}" for key, value in env.items()]


def _label(config: dict[str, Any], text: str) -> None:
    config["Labels"] = {**(config.get("Labels") or {}), **dict(_pairs(text))}


def _expose(config: dict[str, Any], text: str) -> None:
    ports = dict(config.get("ExposedPorts") or {})
    for word in shlex.split(text):
        port, _, protocol = word.partition("/")
        first, dash, last = port.partition("-")
        if (protocol or "tcp").lower() not in ("tcp", "udp", "sctp"):
            raise ValueError(f'unknown protocol "{protocol}"')
        low, high = int(first), int(last if dash else first)
        if not 0 < low <= high <= 65535:
            raise ValueError(f'invalid port "{port}"')
        ports.update({f"{number}/{(protocol or 'tcp').lower()}": {} for number in range(low, high + 1)})
    config["ExposedPorts"] = ports


def _volume(config: dict[str, Any], text: str) -> None:
    paths = json.loads(text) if text.startswith("[") else shlex.split(text)
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError("must be paths")
    config["Volumes"] = {**(config.get("Volumes") or {}), **{path: {} for path in paths}}


def _workdir(config: dict[str, Any], text: str) -> None:
    before = config.get("WorkingDir") or "/"
    config["WorkingDir"] = text if text.startswith("/") else before.rstrip("/") + "/" + text


_INSTRUCTIONS = {
    "CMD": lambda config, text: config.__setitem__("Cmd", _command(text)),
    "ENTRYPOINT": lambda config, text: config.__setitem__("Entrypoint", _command(text)),
    "ENV": _env,
    "EXPOSE": _expose,
    "LABEL": _label,
    "STOPSIGNAL": lambda config, text: config.__setitem__("StopSignal", text),
    "USER": lambda config, text: config.__setitem__("User", text),
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}

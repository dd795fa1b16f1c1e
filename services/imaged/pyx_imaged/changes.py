"""Dockerfile instructions given with ``--change``, applied to an image config as Docker does (moby, builder/dockerfile). Pure.

Words are split and quoted as in a Dockerfile. In ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME and WORKDIR ``$NAME``, ``${NAME}``,
``${NAME:-default}`` and ``${NAME:+instead}`` mean the config's variables, but not between single quotes.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Mapping
from typing import Any

from pyx_bus.errors import InvalidArgument

_VARIABLE = re.compile(r"\$(?:(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)(?::(?P<operator>[-+])(?P<word>[^}]*))?\})", re.ASCII)
_DURATION = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|μs|ms|s|m|h)")
_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_MIN_NS = 10**6
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # what a container has if its image says nothing
_CHECK_OPTIONS = {
    "interval": "Interval", "timeout": "Timeout", "start-period": "StartPeriod", "start-interval": "StartInterval", "retries": "Retries",
}  # fmt: skip


def apply(config: Mapping[str, Any], changes: list[str]) -> dict[str, Any]:
    """A new ``config`` object with the instructions applied in order. Errors: invalid_argument."""
    result = dict(config)
    seen: set[str] = set()
    for line in changes:
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        name = word.upper()
        if name not in _INSTRUCTIONS:
            known = ", ".join(sorted(_INSTRUCTIONS))
            raise InvalidArgument(f'unknown instruction in change: "{line}"', hint=f"one of {known}")
        if not rest and name not in ("CMD", "ENTRYPOINT"):
            raise InvalidArgument(f'change without an argument: "{line}"')
        if name == "ENTRYPOINT" and "CMD" not in seen:
            result.pop("Cmd", None)  # those were arguments of another one
        seen.add(name)
        try:
            _INSTRUCTIONS[name](result, rest)
        except ValueError as error:
            raise InvalidArgument(f'invalid change: "{line}" ({error})') from None
    return result


def commit(config: Mapping[str, Any], changes: list[str]) -> dict[str, Any]:
    """As ``apply``, to a container's config; but what was emptied is the container's again, where Docker merges that into the result:
    the entry point, and without one in the changes the command. Errors: invalid_argument."""
    result = apply(config, changes)
    if not result.get("Entrypoint"):
        for key in ("Cmd", "Entrypoint"):
            if not result.get(key) and config.get(key):
                result[key] = config[key]
    return result


# Words


def _words(text: str) -> list[str]:
    """Split at blanks outside of quotes; quotes and backslashes stay for ``_expand``."""
    words, word, quote, i = [], "", "", 0
    while i < len(text):
        char = text[i]
        if char == "\\" and quote != "'" and i + 1 < len(text):
            word += text[i : i + 2]
            i += 2
            continue
        if char in "'\"":
            quote = "" if quote == char else quote or char
        if char.isspace() and not quote:
            if word:
                words.append(word)
            word = ""
        else:
            word += char
        i += 1
    if quote:
        raise ValueError("a quote isn't closed")
    return [*words, word] if word else words


def _expand(word: str, env: Mapping[str, str]) -> str:
    """One word, or several as one, with its quotes taken off and its variables put in."""
    out, quote, i = "", "", 0
    while i < len(word):
        char = word[i]
        if char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote = char
        elif char == "\\" and quote != "'" and i + 1 < len(word):
            i += 1
            out += char + word[i] if quote and word[i] not in '"$\\' else word[i]
        elif char == "$" and quote != "'" and (found := _VARIABLE.match(word, i)):
            out += _value(found, env)
            i = found.end() - 1
        elif char == "$" and quote != "'" and word.startswith("${", i):
            raise ValueError("unsupported form of a variable: ${NAME}, ${NAME:-word} and ${NAME:+word} are known")
        else:
            out += char
        i += 1
    if quote:
        raise ValueError("a quote isn't closed")
    return out


def _value(found: re.Match[str], env: Mapping[str, str]) -> str:
    value = env.get(found["name"] or found["braced"], "")
    if found["operator"] == "-":
        return value or _expand(found["word"], env)
    if found["operator"] == "+":
        return _expand(found["word"], env) if value else ""
    return value


def _variables(config: Mapping[str, Any]) -> dict[str, str]:
    return dict(entry.partition("=")[::2] for entry in config.get("Env") or [])


def _scope(config: Mapping[str, Any]) -> dict[str, str]:
    """What variables mean."""
    return {"PATH": _DEFAULT_PATH, **_variables(config)}


def _array(text: str) -> list[str] | None:
    """The exec form: a JSON array of texts."""
    if text.startswith("["):
        try:
            words = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if isinstance(words, list):
            if not all(isinstance(word, str) for word in words):
                raise ValueError("an array must be of texts")
            return words
    return None


def _command(key: str) -> Callable[[dict[str, Any], str], None]:
    """Exec form, else shell form."""

    def put(config: dict[str, Any], text: str) -> None:
        words = _array(text)
        if words is None:
            words = [*(config.get("Shell") or ["/bin/sh", "-c"]), text] if text else []
        config[key] = words

    return put


def _pairs(config: Mapping[str, Any], text: str) -> list[tuple[str, str]]:
    """``key=value …`` with quotes, or the old ``key value``."""
    env, words = _scope(config), _words(text)
    if "=" not in words[0]:
        key, _, value = text.partition(" ")
        if not value.strip():
            raise ValueError("must be key=value")
        return [(_expand(key, env), _expand(value.strip(), env))]
    pairs = []
    for word in words:
        key, equals, value = word.partition("=")
        key = _expand(key, env)
        if not key or not equals:
            raise ValueError("must be key=value")
        pairs.append((key, _expand(value, env)))
    return pairs


# Instructions


def _env(config: dict[str, Any], text: str) -> None:
    env = _variables(config) | dict(_pairs(config, text))
    config["Env"] = [f"{key}={value}" for key, value in env.items()]


def _label(config: dict[str, Any], text: str) -> None:
    config["Labels"] = {**(config.get("Labels") or {}), **dict(_pairs(config, text))}


def _expose(config: dict[str, Any], text: str) -> None:
    ports = dict(config.get("ExposedPorts") or {})
    for word in _expand(text, _scope(config)).split():
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
    env, words = _scope(config), _array(text)
    paths = [_expand(word, env) for word in (_words(text) if words is None else words)]
    if not all(path.strip() for path in paths):
        raise ValueError("must be paths")
    config["Volumes"] = {**(config.get("Volumes") or {}), **{path: {} for path in paths}}


def _workdir(config: dict[str, Any], text: str) -> None:
    path = _expand(text, _scope(config))
    config["WorkingDir"] = posixpath.normpath(posixpath.join("/", config.get("WorkingDir") or "", path)).replace("//", "/", 1)


def _text(key: str) -> Callable[[dict[str, Any], str], None]:
    def put(config: dict[str, Any], text: str) -> None:
        value = _expand(text, _scope(config))
        if not value:
            raise ValueError("nothing is left of it")
        config[key] = value

    return put


def _stop_signal(config: dict[str, Any], text: str) -> None:
    value = _expand(text, _scope(config))
    if not re.fullmatch(r"\d+|[A-Za-z]+[A-Za-z0-9+-]*", value):
        raise ValueError("must be a signal's name or number")
    config["StopSignal"] = value


def _onbuild(config: dict[str, Any], text: str) -> None:
    trigger = text.split()[0].upper()
    if trigger in ("ONBUILD", "FROM", "MAINTAINER"):
        raise ValueError(f"{trigger} isn't allowed as a trigger")
    config["OnBuild"] = [*(config.get("OnBuild") or []), text]


def _healthcheck(config: dict[str, Any], text: str) -> None:
    check: dict[str, Any] = {}
    while text.startswith("--"):
        option, _, text = text.partition(" ")
        name, equals, value = option[2:].partition("=")
        key = _CHECK_OPTIONS.get(name)
        if key is None or not equals:
            raise ValueError(f'unknown option "{option}"')
        check[key] = _retries(value) if key == "Retries" else _duration_ns(value)
        text = text.lstrip()
    kind, _, rest = text.partition(" ")
    rest = rest.strip()
    if kind.upper() == "NONE":
        if rest or check:
            raise ValueError("NONE takes no arguments")
        config["Healthcheck"] = {"Test": ["NONE"]}
        return
    if kind.upper() != "CMD" or not rest:
        raise ValueError("must be NONE, or CMD and a command")
    words = _array(rest)
    config["Healthcheck"] = {"Test": ["CMD-SHELL", rest] if words is None else ["CMD", *words], **check}


def _retries(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError("retries must be a number, 0 or more")
    return int(text)


def _duration_ns(text: str) -> int:
    """As Go writes durations: 1m30s, 1.5h, 300ms. 0 means the default."""
    parts = _DURATION.findall(text)
    if text == "0":
        return 0
    if not parts or "".join(parts) != text:
        raise ValueError(f'invalid duration "{text}"')
    total = 0
    for part in parts:
        number = part.rstrip("nuµμmsh")
        total += round(float(number) * _UNITS[part[len(number) :]])
    if 0 < total < _MIN_NS:
        raise ValueError(f'the duration "{text}" is below a millisecond')
    return total


_INSTRUCTIONS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "CMD": _command("Cmd"),
    "ENTRYPOINT": _command("Entrypoint"),
    "ENV": _env,
    "EXPOSE": _expose,
    "HEALTHCHECK": _healthcheck,
    "LABEL": _label,
    "ONBUILD": _onbuild,
    "STOPSIGNAL": _stop_signal,
    "USER": _text("User"),
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}

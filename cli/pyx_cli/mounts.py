"""``-v``, ``--mount`` and ``--tmpfs``: contract MountRequest's fields. Pure; relative host paths are joined to ``cwd``."""

from __future__ import annotations

import posixpath

from .grammar import CliError
from .values import size_bytes

_PROPAGATION = ("private", "rprivate", "shared", "rshared", "slave", "rslave")
# What only macOS and Windows hosts act on; accepted and without effect, as on any Linux Docker.
_WITHOUT_EFFECT = ("consistent", "cached", "delegated", "default")
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def _target(path: str, whole: str) -> str:
    if not path.startswith("/"):
        raise CliError(f"invalid volume specification: '{whole}': invalid mount path: '{path}' mount path must be absolute", 125)
    clean = posixpath.normpath(path)
    if clean in ("/", "//"):
        raise CliError(f"invalid volume specification: '{whole}': invalid specification: destination can't be '/'", 125)
    return clean


def volume(text: str, cwd: str, driver: str = "") -> dict[str, object]:
    """``-v [SOURCE:]TARGET[:OPTIONS]``. A source beginning with ``/`` or ``.`` is a host path, made if missing; else a name."""
    parts = text.split(":")
    if not text or len(parts) > 3 or not all(parts[:2]):
        raise CliError(f"invalid volume specification: '{text}'", 125)
    if len(parts) == 1:
        request: dict[str, object] = {"type": "volume", "target": _target(parts[0], text)}
        if driver:
            request["driver"] = driver
        return request
    source, target = parts[0], _target(parts[1], text)
    if source[0] in "/.":
        request = {"type": "bind", "source": posixpath.normpath(posixpath.join(cwd, source)), "target": target, "create_source": True}
    else:
        if len(source) < 2:
            raise CliError(f'volume name "{source}" is too short: names have at least two characters', 125)
        if source[0] in "_.-" or not _NAME.issuperset(source):
            raise CliError(
                f'"{source}" includes invalid characters for a local volume name, only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. '
                "If you intended to pass a host directory, use an absolute path",
                125,
            )
        request = {"type": "volume", "source": source, "target": target}
        if driver:
            request["driver"] = driver
    for option in parts[2].split(",") if len(parts) == 3 else ():
        if option in ("ro", "rw"):
            request["read_only"] = option == "ro"
        elif option in ("z", "Z"):
            request["selinux_label"] = option
        elif option == "nocopy" and request["type"] == "volume":
            request["no_copy"] = True
        elif option in _PROPAGATION and request["type"] == "bind":
            request["propagation"] = option
        elif option not in _WITHOUT_EFFECT:
            raise CliError(f"invalid volume specification: '{text}': invalid mode: {option}", 125)
    return request


def _csv(text: str) -> list[str]:
    """The fields of one CSV record: commas inside double quotes don't separate, a doubled quote is one."""
    fields, field, quoted, index = [], "", False, 0
    while index < len(text):
        letter = text[index]
        if letter == '"':
            if quoted and text[index + 1 : index + 2] == '"':
                field += '"'
                index += 1
            else:
                quoted = not quoted
        elif letter == "," and not quoted:
            fields.append(field)
            field = ""
        else:
            field += letter
        index += 1
    if quoted:
        raise CliError(f'invalid argument "{text}" for "--mount" flag: parse error: extraneous or missing " in quoted-field', 125)
    return [*fields, field]


def _bool(value: str, key: str, equals: bool) -> bool:
    if not equals or value.lower() in ("1", "t", "true"):
        return True
    if value.lower() in ("0", "f", "false"):
        return False
    raise CliError(f"invalid value for {key}: {value}", 125)


def mount(text: str, cwd: str) -> dict[str, object]:
    """``--mount type=bind,source=/a,target=/b,readonly``: nothing missing is made, unlike with ``-v``."""
    request: dict[str, object] = {"type": "volume"}
    driver_options: dict[str, str] = {}
    labels: dict[str, str] = {}
    only: dict[str, str] = {}  # option → the type it belongs to
    for field in _csv(text):
        key, equals, value = field.partition("=")
        key = key.strip().lower()
        if key in ("readonly", "ro"):
            request["read_only"] = _bool(value, key, bool(equals))
        elif key == "volume-nocopy":
            request["no_copy"] = _bool(value, key, bool(equals))
            only[key] = "volume"
        elif not equals:
            raise CliError(f'invalid argument "{text}" for "--mount" flag: invalid field \'{field}\' must be a key=value pair', 125)
        elif key == "type":
            request["type"] = value.lower()
        elif key in ("source", "src"):
            request["source"] = value
        elif key in ("target", "dst", "destination"):
            request["target"] = value
        elif key == "bind-propagation":
            request["propagation"] = value.lower()
            only[key] = "bind"
        elif key == "volume-driver":
            request["driver"] = value
            only[key] = "volume"
        elif key in ("volume-opt", "volume-label"):
            name, _, setting = value.partition("=")
            (driver_options if key == "volume-opt" else labels)[name] = setting
            only[key] = "volume"
        elif key == "tmpfs-size":
            request["tmpfs_size_bytes"] = size_bytes(value, "--mount")
            only[key] = "tmpfs"
        elif key == "tmpfs-mode":
            request["tmpfs_mode"] = _mode(value)
            only[key] = "tmpfs"
        elif key == "consistency":
            pass
        else:
            raise CliError(f'invalid argument "{text}" for "--mount" flag: unexpected key \'{key}\' in \'{field}\'', 125)
    kind = request["type"]
    if kind not in ("bind", "volume", "tmpfs"):
        raise CliError(f'invalid argument "{text}" for "--mount" flag: invalid mount type "{kind}": bind, volume or tmpfs', 125)
    if not request.get("target"):
        raise CliError(f'invalid argument "{text}" for "--mount" flag: target is required', 125)
    for option, owner in only.items():
        if owner != kind:
            raise CliError(f"cannot mix '{option}' with mount type '{kind}'", 125)
    request["target"] = _target(str(request["target"]), text)
    source = str(request.get("source", ""))
    if kind == "bind":
        if not source:
            raise CliError(f'invalid argument "{text}" for "--mount" flag: source is required for type bind', 125)
        if source.startswith("."):
            source = posixpath.join(cwd, source)
        if not source.startswith("/"):
            raise CliError(f"invalid mount path: '{source}' must be absolute", 125)
        request["source"] = posixpath.normpath(source)
        if request.get("propagation", "rprivate") not in _PROPAGATION:
            raise CliError(f"invalid propagation mode: {request['propagation']}", 125)
    elif kind == "tmpfs" and source:
        raise CliError("invalid mount config for type \"tmpfs\": source must not be specified", 125)
    if driver_options:
        request["driver_options"] = driver_options
    if labels:
        request["labels"] = labels
    return request


def _mode(text: str) -> int:
    try:
        value = int(text, 8)
    except ValueError:
        value = -1
    if not 0 <= value <= 0o7777:
        raise CliError(f"invalid value for tmpfs-mode: {text}: an octal file mode", 125)
    return value


def tmpfs(text: str) -> dict[str, object]:
    """``--tmpfs /run:size=64m,mode=755,noexec``."""
    path, _, words = text.partition(":")
    request: dict[str, object] = {"type": "tmpfs", "target": _target(path, text)}
    options = []
    for word in words.split(",") if words else ():
        key, _, value = word.partition("=")
        if key == "size":
            request["tmpfs_size_bytes"] = size_bytes(value, "--tmpfs") if not value.endswith("%") else 0
            if value.endswith("%"):
                options.append(word)
        elif key == "mode":
            request["tmpfs_mode"] = _mode(value)
        elif word in ("ro", "rw"):
            request["read_only"] = word == "ro"
        elif word:
            options.append(word)
    if options:
        request["tmpfs_options"] = options
    return request

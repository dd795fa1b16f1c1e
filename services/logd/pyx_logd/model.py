"""What logd talks about: streams, pieces of output, driver options. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NewType

from pyx_bus.errors import InvalidArgument, Unimplemented

ContainerID = NewType("ContainerID", str)

LINE_MAX_BYTES = 16 * 1024
"""A longer line is stored in pieces of this size, as Docker does, so that one line can't take all the memory."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(?:i?b)?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Output of one stream, read at ``time_ns``: whole lines each with its newline, or one piece of a line without.

    A piece is a part of a line longer than `LINE_MAX_BYTES`, or what was left without a newline when the stream ended.
    """

    stream: str
    data: bytes
    time_ns: int


@dataclass(frozen=True, slots=True)
class JsonFileOptions:
    """``max_size_bytes`` 0: no rotation. ``max_files`` counts the current one."""

    max_size_bytes: int = 0
    max_files: int = 1


def is_container_id(value: str) -> bool:
    return _ID.fullmatch(value) is not None


def container_id(value: str) -> ContainerID:
    """The ID if it can be a directory's name, else invalid_argument: nothing a peer sends ever leaves logd's directory."""
    if not is_container_id(value):
        raise InvalidArgument(f'invalid container ID: "{value}"')
    return ContainerID(value)


def check_streams(streams: list[str]) -> None:
    """stdout and stderr (or one of them), or tty alone. Raises invalid_argument."""
    if streams == ["tty"] or (streams and len(set(streams)) == len(streams) and set(streams) <= {"stdout", "stderr"}):
        return
    raise InvalidArgument(f"invalid streams: {streams!r}", hint='["stdout", "stderr"] or ["tty"]')


def parse_size(option: str, value: str) -> int:
    """"10m", "1.5g", "512" → bytes, as go-units' RAMInBytes. Raises invalid_argument."""
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise InvalidArgument(f'invalid value for {option}: "{value}"', hint="a number of bytes, or with a unit: 10m")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def json_file_options(options: dict[str, str]) -> JsonFileOptions:
    """Docker's options of the json-file driver. Raises invalid_argument, or not_implemented for those that need more than bytes."""
    max_size, max_files = 0, 1
    for option, value in options.items():
        if option == "max-size":
            if value == "-1":  # Docker's way to say: no limit
                continue
            max_size = parse_size(option, value)
            if max_size <= 0:
                raise InvalidArgument(f'max-size must be a positive number: "{value}"')
        elif option == "max-file":
            if not value.isascii() or not value.isdigit() or int(value) < 1:
                raise InvalidArgument(f'max-file must be a number of at least 1: "{value}"')
            max_files = int(value)
        elif option == "compress" and value in ("false", "0", "f", "F", "FALSE", "False"):
            continue
        elif option in ("compress", "labels", "labels-regex", "env", "env-regex", "tag"):
            raise Unimplemented(f'log option "{option}" of the json-file log driver isn\'t implemented')
        else:
            raise InvalidArgument(f'unknown log opt "{option}" for json-file log driver')
    if max_files > 1 and not max_size:
        raise InvalidArgument("max-file needs max-size", hint="add the log option max-size, for example max-size=10m")
    return JsonFileOptions(max_size, max_files)

"""Volumes, and the rules of names and paths. Pure."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field

from pyx_bus.errors import InvalidArgument

ANONYMOUS_LABEL = "com.docker.volume.anonymous"

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_NAME_MAX = 255
"""A directory's name on every file system that matters."""


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """A volume as it's kept. ``options`` are its driver's, fixed when it was made."""

    name: str
    driver: str
    created_ns: int
    labels: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)

    @property
    def anonymous(self) -> bool:
        """Made for a mount that named no volume; goes with ``rm -v``."""
        return ANONYMOUS_LABEL in self.labels


def check_name(name: str) -> str:
    """``name`` if it may name a volume: Docker's rule, which also keeps it inside its directory. Raises invalid_argument."""
    if not _NAME.fullmatch(name):
        reason = "is too short" if len(name) < 2 else "includes invalid characters"
        raise InvalidArgument(
            f'volume name "{name}" {reason}: only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed, two or more',
            hint="to pass a host directory, give its absolute path",
        )
    if len(name) > _NAME_MAX:
        raise InvalidArgument(f'volume name "{name[:32]}…" is too long: {len(name)} characters, at most {_NAME_MAX}')
    return name


def clean_path(path: str) -> str:
    """Lexically the shortest form, as Go's filepath.Clean: no ``.``, ``..`` or doubled slash; ``..`` of the root is the root."""
    cleaned = posixpath.normpath(path)
    return "/" + cleaned.lstrip("/") if cleaned.startswith("/") else cleaned


def check_target(target: str) -> str:
    """Where in the container to mount, cleaned. Raises invalid_argument."""
    if "\0" in target:
        raise InvalidArgument(f"invalid mount target: {target!r}")
    if not target.startswith("/"):
        raise InvalidArgument(f'invalid mount target: "{target}": it must be an absolute path')
    cleaned = clean_path(target)
    if cleaned == "/":
        raise InvalidArgument(f'invalid mount target: "{target}": it can\'t be the root directory')
    return cleaned

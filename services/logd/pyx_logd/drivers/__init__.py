"""Log drivers: where a container's output goes. The service picks one by name from `DRIVERS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pyx_bus.errors import InvalidArgument

from .base import Driver, Trouble
from .json_file import JsonFile
from .none import Discard

__all__ = ["DRIVERS", "Driver", "Factory", "factory"]

Factory = Callable[[Path, dict[str, str], Trouble], Driver]

DRIVERS: dict[str, Factory] = {"json-file": JsonFile, "none": Discard}


def factory(name: str) -> Factory:
    """The driver of that name. Raises invalid_argument."""
    try:
        return DRIVERS[name]
    except KeyError:
        raise InvalidArgument(f'unknown log driver: "{name}"', hint="one of " + ", ".join(sorted(DRIVERS))) from None

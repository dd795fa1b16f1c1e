"""Volume drivers: where a volume's files are."""

from __future__ import annotations

from pyx_bus.errors import NotFound

from .base import Driver
from .local import Local

__all__ = ["Driver", "Local", "find"]


def find(drivers: dict[str, Driver], name: str) -> Driver:
    """The driver of that name. Raises not_found."""
    try:
        return drivers[name]
    except KeyError:
        raise NotFound(f'volume driver "{name}" not found', hint="there is: " + ", ".join(sorted(drivers))) from None

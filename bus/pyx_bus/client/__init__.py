"""The async client, for asyncio and trio: ``async with connect() as bus``. For scripts there's ``pyx_bus.sync``."""

from .bus import Bus, connect

__all__ = ["Bus", "connect"]

"""pyx-busd: the broker's process."""

from __future__ import annotations

import functools
import os
import resource
import signal
import sys

import structlog
import trio

from . import errors
from .broker import run_broker
from .service import bus_path, configure_logging, first_error, notify_ready


async def _main() -> None:
    path = bus_path()
    structlog.contextvars.bind_contextvars(service="bus")
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            trace = os.environ.get("PYX_LOG_LEVEL") == "debug"
            await nursery.start(functools.partial(run_broker, trace=trace), path)
            notify_ready()
            structlog.get_logger("bus").info("ready", path=str(path))
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break


def main() -> None:
    """Serve the bus until SIGTERM or SIGINT."""
    configure_logging()
    path = bus_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:  # a descriptor per connection, and those in passing
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    try:
        trio.run(_main)
    except* errors.BusError as group:
        sys.exit(f"pyx-busd: {first_error(group).message}")


if __name__ == "__main__":
    main()

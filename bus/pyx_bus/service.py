"""What every service's process does the same: environment, configuration, logging, the bus, readiness, an orderly end."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import trio

from . import errors
from .client import Bus, connect
from .process import bus_path, load_config, log_level, notify_ready, root_directory, run_directory, stack_prefix
from .server import Call, Service


@dataclass
class Context:
    """What a service is given.

    ``root`` is its durable directory, ``run`` the one that vanishes with the boot; both exist, for its user alone. ``prefix`` starts
    every name that is global to the host (bridge, nftables table, cgroup), so that several stacks live side by side. ``config`` is
    the service's table of the configuration file. ``nursery`` lives as long as the service; ``exit_stack`` is closed at its end.
    ``finish``, if the service has set it, is awaited before an orderly end, ``FINISH_WITHIN_S`` at most, while all goes on as before.
    """

    name: str
    root: Path
    run: Path
    prefix: str
    config: dict[str, Any]
    bus: Bus
    nursery: trio.Nursery
    exit_stack: contextlib.AsyncExitStack
    log: Any
    finish: Callable[[], Awaitable[None]] | None = None


Setup = Callable[[Context], Awaitable[Service]]
FINISH_WITHIN_S = 10.0  # who stops us waits 15 s (the supervisor) or 90 s (systemd) before it kills


class _ToStructlog(logging.Handler):
    """Libraries (ours and others') log through the standard library; their records join ours."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger(record.name).log(record.levelno, record.getMessage(), exc_info=record.exc_info)


def configure_logging() -> None:
    """Structured lines on stderr: JSON for machines ($PYX_LOG_FORMAT=json), key=value else. $PYX_LOG_LEVEL, default info."""
    level = log_level()
    renderer: Any = structlog.processors.JSONRenderer()
    if os.environ.get("PYX_LOG_FORMAT") != "json":
        renderer = structlog.processors.LogfmtRenderer(
            key_order=["timestamp", "level", "service", "event"], bool_as_flag=False
        )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[_ToStructlog()], force=True)


@contextlib.asynccontextmanager
async def service_context(name: str, *, bus: Path, root: Path, run: Path, prefix: str, config: dict[str, Any]) -> Any:
    """The context of a service whose directories and bus are given; everything in it ends with the block."""
    root.mkdir(parents=True, exist_ok=True, mode=0o711)
    run.mkdir(parents=True, exist_ok=True, mode=0o711)
    async with connect(str(bus), name, wait=False, spool=run / "events") as client, trio.open_nursery() as nursery:
        async with contextlib.AsyncExitStack() as exit_stack:
            yield Context(name, root, run, prefix, config, client, nursery, exit_stack, structlog.get_logger(name))
        nursery.cancel_scope.cancel()


async def serve(context: Context, setup: Setup) -> None:
    """Set the service up and register it."""
    service = await setup(context)
    while True:
        try:
            await context.bus.serve(service)
        except errors.Unavailable:
            continue  # the broker isn't up yet: systemd and the supervisor start everything at once
        except errors.AlreadyExists as error:
            # Our predecessor's connection may not have been noticed as closed yet; a living one keeps the name.
            context.log.warning("name is taken", error=error.message)
            await trio.sleep(0.2)
            continue
        return


async def _main(name: str, setup: Setup) -> None:
    run = run_directory()
    structlog.contextvars.bind_contextvars(service=name)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            ready, ending = trio.Event(), trio.Event()

            async def serve_until_cancelled() -> None:
                async with service_context(
                    name,
                    bus=bus_path(),
                    root=root_directory() / name,
                    run=run / name,
                    prefix=stack_prefix(run),
                    config=load_config(name),
                ) as context:
                    await serve(context, setup)
                    gc.collect()
                    gc.freeze()
                    notify_ready()
                    context.log.info("ready")
                    ready.set()
                    await ending.wait()
                    if context.finish is not None:
                        with trio.move_on_after(FINISH_WITHIN_S):
                            await context.finish()
                    nursery.cancel_scope.cancel()
                    await trio.sleep_forever()

            nursery.start_soon(serve_until_cancelled)
            async for _ in signals:
                if not ready.is_set() or ending.is_set():  # the second one doesn't wait for what the first has asked for
                    nursery.cancel_scope.cancel()
                    break
                ending.set()


def first_error(group: BaseExceptionGroup[errors.BusError]) -> errors.BusError:
    """The first of what a nursery collected, whatever the nesting."""
    for error in group.exceptions:
        return first_error(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")


def run(name: str, setup: Setup) -> None:
    """A service's whole ``main``. Ends the process with status 1 and one line if it can't start."""
    configure_logging()
    try:
        trio.run(_main, name, setup)
    except* errors.BusError as group:
        sys.exit(f"pyx-{name}: {first_error(group).message}")


__all__ = ["Call", "Context", "Service", "run"]

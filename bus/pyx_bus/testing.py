"""For tests of services and of tools on the bus: a real broker, and a real service, inside the test's own event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from . import service as _service
from .broker.server import Broker, make
from .process import stack_prefix
from .service import Context, Setup, service_context


@asynccontextmanager
async def broker(directory: Path) -> AsyncIterator[Path]:
    """A broker on ``directory``/bus.sock for the length of the block, its journal beside it; its socket's path."""
    path = directory / "bus.sock"
    made = make(path, directory / "bus")
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_turn, made)
            yield path
            nursery.cancel_scope.cancel()
    finally:
        path.unlink(missing_ok=True)
        made.close()


async def _turn(made: Broker) -> None:
    while True:
        with trio.move_on_after(made.timeout_s()):
            await trio.lowlevel.wait_readable(made.fileno())
        made.step(0)


@asynccontextmanager
async def serve(
    bus: Path,
    name: str,
    setup: Setup,
    *,
    root: Path | None = None,
    run: Path | None = None,
    config: dict[str, Any] | None = None,
) -> AsyncIterator[Context]:
    """A registered service, its state in ``root`` and ``run`` (beside the bus's socket if not given)."""
    run = run or bus.parent / "run" / name
    root = root or bus.parent / "root" / name
    async with service_context(
        name, bus=bus, root=root, run=run, prefix=stack_prefix(run.parent), config=config or {}
    ) as context:
        await _service.serve(context, setup)
        yield context
        context.nursery.cancel_scope.cancel()

"""The process ``pyx-volumed``."""

from __future__ import annotations

import trio

from pyx_bus.service import Context, Service, run

from .api import serve
from .drivers import Local
from .service import VolumeService
from .store import Store


async def setup(context: Context) -> Service:
    """Wire the service up."""
    store = Store(context.root / "volumed.db")
    context.exit_stack.callback(store.close)
    volumes = VolumeService(store, {"local": Local(context.root)}, context.bus.publish, context.log)
    volumes.tell_found(await trio.to_thread.run_sync(volumes.start))
    return serve(volumes)


def main() -> None:
    run("volumed", setup)


if __name__ == "__main__":
    main()

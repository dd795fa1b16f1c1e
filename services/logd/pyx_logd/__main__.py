"""The process ``pyx-logd``."""

from __future__ import annotations

from pyx_bus.service import Context, Service, run

from .api import serve
from .service import LogService
from .store import Store


async def setup(context: Context) -> Service:
    """Wire the service up; everything that runs lives in the context's nursery."""
    logs = LogService(Store(context.root, context.run), context.nursery, context.log)
    logs.start()
    return serve(logs)


def main() -> None:
    run("logd", setup)


if __name__ == "__main__":
    main()

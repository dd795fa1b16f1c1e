"""The process ``pyx-logd``."""

from __future__ import annotations

import resource

from pyx_bus.service import Context, Service, run

from .api import serve
from .service import LogService
from .store import Store


async def setup(context: Context) -> Service:
    """Wire the service up; everything that runs lives in the context's nursery."""
    _allow_many_descriptors()
    logs = LogService(Store(context.root, context.run), context.nursery, context.bus.publish, context.log)
    logs.start()
    return serve(logs)


def _allow_many_descriptors() -> None:
    """Three a container, and more per client: the usual soft limit of 1024 would be reached soon. select(2) isn't used here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    run("logd", setup)


if __name__ == "__main__":
    main()

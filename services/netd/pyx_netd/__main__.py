"""pyx-netd: the process. Configuration, signals and readiness are the bus library's ``run``."""

from __future__ import annotations

from pyx_bus.service import run

from .api import setup


def main() -> None:
    run("netd", setup)


if __name__ == "__main__":
    main()

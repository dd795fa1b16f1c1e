"""``pyx-imaged``."""

from __future__ import annotations

from pyx_bus.service import run

from .api import setup


def main() -> None:
    run("imaged", setup)


if __name__ == "__main__":
    main()

"""``pyx-containerd``: wiring only."""

from __future__ import annotations

from pyx_bus import service

from .api import setup


def main() -> None:
    service.run("containerd", setup)


if __name__ == "__main__":
    main()

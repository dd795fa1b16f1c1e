"""The ``none`` driver: output goes to whoever is attached and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pyx_bus.errors import InvalidArgument

from ..model import Chunk
from ..window import Mark
from .base import Segment, Trouble


class Discard:
    """Keeps nothing."""

    path = ""
    readable = False

    def __init__(self, directory: Path, options: dict[str, str], trouble: Trouble) -> None:
        for option in options:
            raise InvalidArgument(f'unknown log opt "{option}" for none log driver')

    def open(self) -> None: ...

    def write(self, chunks: Sequence[Chunk]) -> None: ...

    async def wait_ready(self) -> None: ...

    def mark(self) -> Mark:
        return 0, 0

    def rewind(self, mark: Mark) -> None: ...

    def segments(self) -> list[Segment]:
        return []

    def on_rotate(self, listener: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    async def aclose(self) -> None: ...

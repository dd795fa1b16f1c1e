"""What a snapshotter is. ``tests/conformance/test_imaged_snapshotters.py`` runs every one of them through the same suite.

Layers are directories in overlayfs's own form (whiteouts are character devices 0:0, opaque directories carry
``trusted.overlay.opaque``), bottom first; a snapshotter never writes into one. What it keeps for a snapshot lies in the directory
it's given, so that removing that directory removes the snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pyx_bus.contract.imaged import Mount


class Snapshotter(Protocol):
    """``name`` as in the configuration. ``instant``: ``prepare`` takes well under a millisecond, so it needs no thread.

    ``overlay``: what's in ``writable`` is in overlayfs's form and holds the changes alone; else it's the whole tree.
    """

    name: str
    instant: bool
    overlay: bool

    def probe(self, scratch: Path) -> None:
        """Try it for real below the empty directory ``scratch``. Raises OSError with the reason where this host can't."""

    def prepare(self, directory: Path, layers: Sequence[Path]) -> None:
        """Make what a snapshot needs in the empty ``directory``, which is renamed afterwards: nothing may remember its path.

        The root directory has owner and mode of the topmost layer's. Blocks. Raises OSError.
        """

    def mounts(self, directory: Path, layers: Sequence[Path]) -> list[Mount]:
        """What to mount for the snapshot in ``directory``. Errors: failed_precondition (more layers than the kernel takes)."""

    def writable(self, directory: Path) -> Path:
        """Where a container's changes are."""

"""What a volume driver is. Every method but `check` may block and runs in a thread, one at a time for one volume."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from ..model import VolumeRecord


class Driver(Protocol):
    """Makes, mounts and deletes volumes of one kind.

    A volume is made in two steps, so that a kill at any instant leaves either a whole volume or nothing: `prepare`, which leaves it
    marked as unsettled; then the service records it, and `settle` takes the mark away. `withdraw` marks it again before the record
    goes. `recover` finds what was marked when the last process ended.
    """

    def check(self, options: dict[str, str]) -> None:
        """Whether a volume can have these options. Pure. Raises invalid_argument or not_implemented."""
        ...

    def prepare(self, volume: VolumeRecord) -> None:
        """Make an empty volume, unsettled. What an unsettled one of that name left is deleted."""
        ...

    def settle(self, name: str) -> None:
        """It's recorded now. Idempotent."""
        ...

    def withdraw(self, name: str) -> None:
        """It's about to be removed. Idempotent."""
        ...

    def delete(self, name: str) -> None:
        """Delete an unsettled volume with all that's in it. Out of sight at once. Idempotent."""
        ...

    def mountpoint(self, name: str) -> str:
        """The host's path of its files. Pure."""
        ...

    def mount(self, volume: VolumeRecord) -> str:
        """Make its files reachable at the mountpoint, and return that. Idempotent."""
        ...

    def unmount(self, volume: VolumeRecord) -> None:
        """Nobody uses it any more. Idempotent."""
        ...

    def fill(self, volume: VolumeRecord, source_fd: int) -> bool:
        """Copy the directory ``source_fd`` into it if it's empty; whether it was. After a kill: all of it, or nothing."""
        ...

    def recover(self, recorded: Collection[VolumeRecord]) -> list[str]:
        """Finish or undo what was going on when the last process ended. Returns volumes that are there but not recorded."""
        ...

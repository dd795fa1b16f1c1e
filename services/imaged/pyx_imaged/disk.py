"""imaged's files: blobs, layers, snapshots, and what's on its way in or out.

Below the service's root, all on one file system so that everything arrives and leaves by rename::

    blobs/sha256/<hex>     content as it came, named by its digest
    layers/<number>        a layer unpacked (overlayfs's form); ``l`` is a short link to it for mount options;
                           ``empty`` stands below an image without layers: overlayfs wants one
    snapshots/<container>  what the snapshotter made, and ``image``: a link whose target says what it's of
    ingest/<n>             half-made things; emptied at start
    trash/<n>              what nobody needs any more, being deleted; emptied at start

A snapshot has no row anywhere: it exists when its directory does. Containers' records are made durable by containerd after they
got their snapshot; on a journalling file system that makes the directory durable too, and a snapshot lost to a power cut before
that is made again by the next ``prepare``.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from . import kernel
from .drivers.base import Snapshotter
from .model import Digest, ImageID, SnapshotRecord

_DELETE_DEPTH = 100  # directories open at once, and Python's calls on its stack
_DIRECTORIES = ("blobs/sha256", "layers", "layers/empty", "snapshots", "ingest", "trash")


class Disk:
    """Paths and renames; every call blocks for as long as a few directory operations take, unless it says otherwise."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in _DIRECTORIES:
            (root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (root / "l").is_symlink():
            os.symlink("layers", root / "l")
        self._numbers = itertools.count()
        self._session = os.urandom(6).hex()  # not the process's ID: that comes again, and the trash may outlast a process
        for leftover in [*(root / "ingest").iterdir()]:
            self.discard(leftover)

    # On the way in

    def ingest(self) -> Path:
        """A path for something half-made; nothing is there yet."""
        return self.root / "ingest" / str(next(self._numbers))

    def ingest_directory(self) -> Path:
        path = self.ingest()
        path.mkdir(mode=0o755)
        os.chmod(path, 0o755)  # a layer's root is this directory: the umask has no say,
        kernel.give_to_root(path)  # nor who we are
        return path

    # Blobs

    def blob(self, digest: str) -> Path:
        return self.root / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def blobs(self) -> set[Digest]:
        return {Digest(f"sha256:{path.name}") for path in (self.root / "blobs" / "sha256").iterdir()}

    def keep_blob(self, file: Path, digest: str) -> None:
        """A verified file takes its place in the content store."""
        os.rename(file, self.blob(digest))

    def write_blob(self, data: bytes, digest: str) -> None:
        path = self.ingest()
        path.write_bytes(data)
        os.chmod(path, 0o600)
        self.keep_blob(path, digest)

    # Layers

    def layer(self, number: int) -> Path:
        return self.root / "layers" / str(number)

    def layer_numbers(self) -> set[int]:
        return {int(path.name) for path in (self.root / "layers").iterdir() if path.name.isdigit()}

    def keep_layer(self, directory: Path, number: int) -> None:
        os.rename(directory, self.layer(number))

    # Snapshots

    def snapshot(self, container_id: str) -> Path:
        return self.root / "snapshots" / container_id

    def snapshots(self) -> list[SnapshotRecord]:
        """Every snapshot on the disk. One without a readable record is discarded: it's of no use to anybody."""
        found = []
        for path in (self.root / "snapshots").iterdir():
            try:
                link = path / "image"
                image_id, snapshotter, asked, name = os.readlink(link).split(" ")
                created_ns = link.lstat().st_mtime_ns
                found.append(SnapshotRecord(path.name, ImageID(image_id), asked, name, created_ns, snapshotter))
            except (OSError, ValueError):
                self.discard(path)
        return found

    def make_snapshot(
        self,
        container_id: str,
        image_id: ImageID,
        asked: str,
        name: str,
        layers: Sequence[Path],
        snapshotter: Snapshotter,
    ) -> SnapshotRecord:
        """Make it aside and rename it into place: it's there as a whole or not at all. ``asked`` and ``name`` have no spaces."""
        directory = self.ingest()
        os.mkdir(directory, 0o711)
        try:
            snapshotter.prepare(directory, layers)
            link = directory / "image"
            os.symlink(f"{image_id} {snapshotter.name} {asked} {name}", link)
            created_ns = time.time_ns()  # the kernel's own stamp may lie some milliseconds back, before a ``Retain`` drawn earlier
            os.utime(link, ns=(created_ns, created_ns), follow_symlinks=False)
            os.rename(directory, self.snapshot(container_id))
        except BaseException:
            self.discard(directory)
            raise
        return SnapshotRecord(container_id, image_id, asked, name, created_ns, snapshotter.name)

    # On the way out

    def discard(self, path: Path) -> None:
        """Take it out of sight at once; ``empty_trash`` deletes it. Nothing there is fine."""
        try:
            os.rename(path, self._trash_path())
        except FileNotFoundError:
            pass

    def _trash_path(self) -> Path:
        return self.root / "trash" / f"{self._session}-{next(self._numbers)}"

    def empty_trash(self) -> list[OSError]:
        """Delete what was discarded. Blocks for as long as that takes; goes on past failures and gives them back."""
        failures: list[OSError] = []
        for path in (self.root / "trash").iterdir():
            try:
                if path.is_dir() and not path.is_symlink():
                    self._delete_tree(path, failures)
                else:
                    path.unlink()
            except OSError as error:
                failures.append(error)
        return failures

    def _delete_tree(self, path: Path, failures: list[OSError]) -> None:
        """A container can nest directories without end: below some depth they become trash of their own, to be gone through later."""
        waiting = [path]
        while waiting:
            top = waiting.pop()
            fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self._empty(fd, 0, waiting, failures)
            finally:
                os.close(fd)
            try:
                os.rmdir(top)
            except OSError as error:
                failures.append(error)

    def _empty(self, directory: int, depth: int, waiting: list[Path], failures: list[OSError]) -> None:
        with os.scandir(directory) as found:
            entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
        for name, is_directory in entries:
            try:
                if not is_directory:
                    os.unlink(name, dir_fd=directory)
                elif depth >= _DELETE_DEPTH:
                    aside = self._trash_path()
                    os.rename(name, aside, src_dir_fd=directory)
                    waiting.append(aside)
                else:
                    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
                    try:
                        self._empty(fd, depth + 1, waiting, failures)
                    finally:
                        os.close(fd)
                    os.rmdir(name, dir_fd=directory)
            except OSError as error:
                failures.append(error)

    def discard_unknown(self, layers: Collection[int], blobs: Collection[str]) -> int:
        """At start: what a crash left without a row. How many things that were."""
        unknown = [self.layer(number) for number in self.layer_numbers() - set(layers)]
        unknown += [self.blob(digest) for digest in self.blobs() - set(blobs)]
        for path in unknown:
            self.discard(path)
        return len(unknown)


def adopt_attributes(layer: Path, implied: Sequence[str], below: Sequence[Path]) -> None:
    """Give directories that a layer only implies (``""`` is its root) owner, mode and times of those below them (topmost first).

    Without this, putting a file into /tmp would hide /tmp's sticky bit under a directory made on the way. Blocks.
    """
    for name in sorted(implied, reverse=True):
        for parent in below:
            status = _directory_status(parent, name)
            if status is None:
                continue
            target = layer / name if name else layer
            os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
            os.chmod(target, status.st_mode & 0o7777)
            os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))
            break


def _directory_status(root: Path, name: str) -> os.stat_result | None:
    """The status of a directory in a layer if it's one, and no component of the way is a link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(root, flags)
    try:
        for part in name.split("/") if name else ():
            try:
                below = os.open(part, flags, dir_fd=fd)
            except OSError:
                return None
            os.close(fd)
            fd = below
        return os.fstat(fd)
    finally:
        os.close(fd)

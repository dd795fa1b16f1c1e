"""What's here right now: images, names, layers, snapshots, in memory and kept in step with the disk.

Every question is answered from memory. Changes go to the disk first (one at a time, in a thread), then to memory, and are told as
events with no await between the two: what list and inspect answer and the events after it fit together. What a transfer
in progress needs is *held*, so that a clean-up at the same time leaves it alone.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from pyx_bus.contract.imaged import ImageConfig
from pyx_bus.errors import NotFound

from . import kernel, manifest, plan
from .disk import Disk, adopt_attributes
from .model import ChainID, DiffID, Digest, Image, ImageID, Layer, SnapshotRecord, UnpackResult
from .store import Store


class Library:
    def __init__(self, root: Path) -> None:
        """Blocks: reads everything and clears away what a crash left."""
        self.disk = Disk(root)
        self.store = Store(root / "imaged.sqlite")
        self.images: dict[ImageID, Image] = {image.id: image for image in self.store.images()}
        self.names: dict[str, ImageID] = self.store.names()
        self.layers: dict[ChainID, Layer] = {layer.chain_id: layer for layer in self.store.layers()}
        self.going: set[ImageID] = set()  # being removed: still there to be seen, but no snapshot of them may begin
        self._unstored: dict[ChainID, list[str]] = {}  # → directories the layer implies
        self._held_layers: Counter[ChainID] = Counter()
        self._held_blobs: Counter[Digest] = Counter()
        self._lock = trio.Lock()
        self._configs: dict[ImageID, dict[str, Any]] = {}
        self._trash = trio.Event()
        waste = plan.garbage(self.images.values(), self.layers, (), (), ())
        if waste.layers:
            self.store.remove((), (), [layer.chain_id for layer in waste.layers])
            for layer in waste.layers:
                del self.layers[layer.chain_id]
        live = {layer.blob for layer in self.layers.values()}.union(*(image.blobs for image in self.images.values()))
        self.disk.discard_unknown([layer.number for layer in self.layers.values()], live)
        self.blobs = self.disk.blobs()
        self.snapshots: dict[str, SnapshotRecord] = {record.container_id: record for record in self.disk.snapshots()}
        self._next_number = max([0, *(layer.number for layer in self.layers.values()), *self.disk.layer_numbers()]) + 1
        self._trash.set()

    # Questions

    def config(self, image_id: ImageID) -> dict[str, Any]:
        """The parsed config of an image that's here."""
        if image_id not in self._configs:
            self._configs[image_id] = json.loads(self.images[image_id].config)
        return self._configs[image_id]

    @functools.lru_cache(maxsize=512)  # noqa: B019  one library lives as long as the process
    def image_config(self, image_id: ImageID, name: str) -> ImageConfig:
        return manifest.image_config(image_id, name, self.config(image_id))

    def labels(self, image_id: ImageID) -> dict[str, str]:
        return self.image_config(image_id, "").labels

    def layer_paths(self, image: Image) -> list[Path]:
        """The layers' directories, bottom first."""
        return [self.disk.layer(self.layers[chain_id].number) for chain_id in image.layers]

    def diff_ids(self, image: Image) -> list[DiffID]:
        return [self.layers[chain_id].diff_id for chain_id in image.layers]

    def size_bytes(self, image: Image) -> int:
        return sum(self.layers[chain_id].size_bytes for chain_id in image.layers)

    def names_of(self, image_id: ImageID) -> list[str]:
        return sorted(name for name, owner in self.names.items() if owner == image_id)

    def users(self, image_id: ImageID) -> list[SnapshotRecord]:
        return [record for record in self.snapshots.values() if record.image_id == image_id]

    # Changes

    @contextmanager
    def holding(self, layers: Iterable[ChainID], blobs: Iterable[Digest]) -> Iterator[None]:
        """For the length of the block these are no garbage, be they here already or not."""
        held_layers, held_blobs = Counter(layers), Counter(blobs)
        self._held_layers += held_layers
        self._held_blobs += held_blobs
        try:
            yield
        finally:
            self._held_layers -= held_layers
            self._held_blobs -= held_blobs

    def add_layer(
        self, directory: Path, blob: Path | None, chain_id: ChainID, diff_id: DiffID, found: UnpackResult, media_type: str
    ) -> None:
        """An unpacked and verified layer takes its place. It's not durable before an image with it is stored."""
        number, self._next_number = self._next_number, self._next_number + 1
        digest = Digest(found.digest)
        if blob is not None:
            self.disk.keep_blob(blob, digest)
        self.blobs.add(digest)
        self.disk.keep_layer(directory, number)
        self.layers[chain_id] = Layer(chain_id, diff_id, number, found.unpacked_size, digest, found.size, media_type)
        self._unstored[chain_id] = found.implied

    async def add_image(
        self, image: Image, documents: dict[Digest, bytes], names: list[str], tell: Callable[[], None]
    ) -> None:
        """Store an image whose layers are all here, with its small blobs and its names. Durable when it returns.

        ``tell`` publishes what it became part of; it's called at the moment the image can be seen.
        """
        async with self._lock:
            new = [self.layers[chain_id] for chain_id in image.layers if chain_id in self._unstored]
            stored = self.images.get(image.id)
            if stored is not None:
                image = Image(
                    image.id, image.config, image.layers, image.manifest or stored.manifest,
                    tuple(sorted({*image.blobs, *stored.blobs})), stored.stored_at_ns,
                )  # fmt: skip

            def write() -> None:
                paths = self.layer_paths(image)
                for position, chain_id in enumerate(image.layers):
                    if implied := self._unstored.get(chain_id):
                        adopt_attributes(paths[position], implied, paths[:position][::-1])
                for digest, data in documents.items():
                    if digest not in self.blobs:
                        self.disk.write_blob(data, digest)
                kernel.syncfs(self.disk.root)  # files first, then the row that says they're here
                self.store.put_image(image, names, new)

            if stored != image or new or any(self.names.get(name) != image.id for name in names):
                await trio.to_thread.run_sync(write)
            self.blobs.update(documents)
            for layer in new:
                self._unstored.pop(layer.chain_id, None)
            self.images[image.id] = image
            self.names.update(dict.fromkeys(names, image.id))
            tell()

    async def add_name(self, name: str, image_id: ImageID, tell: Callable[[], None]) -> None:
        """``tell`` is called with the change, also if the image had the name already."""
        async with self._lock:
            if image_id not in self.images:
                raise NotFound(f'image "{image_id}" was removed meanwhile')
            if self.names.get(name) != image_id:
                await trio.to_thread.run_sync(self.store.put_names, image_id, [name])
                self.names[name] = image_id
            tell()

    async def remove(
        self, decide: Callable[[], plan.Removal], tell: Callable[[plan.Removal], None]
    ) -> tuple[plan.Removal, list[Layer]]:
        """Forget names and, if said so, the image; and with it the layers and blobs nobody else needs: those are given back.

        ``decide`` says what is to go. It's asked when no other change is under way any more: a pull of the same image may just have
        ended. From then on no snapshot of the image can begin, unless the disk fails. ``tell`` is called at the moment it's gone.
        """
        async with self._lock:
            removal = decide()
            gone = [removal.image] if removal.image is not None else []
            self.going.update(gone)
            try:
                waste = self._garbage()
                stored = [layer.chain_id for layer in waste.layers]
                await trio.to_thread.run_sync(self.store.remove, removal.names, gone, stored)
                for image_id in gone:
                    del self.images[image_id]
                    self._configs.pop(image_id, None)
                for name in removal.names:
                    self.names.pop(name, None)
                tell(removal)
            finally:
                self.going.difference_update(gone)
            self._forget(waste)
        return removal, waste.layers

    async def collect(self) -> None:
        """Drop what a failed transfer left: layers and blobs that no image got to use."""
        async with self._lock:
            waste = self._garbage()
            stored = [layer.chain_id for layer in waste.layers if layer.chain_id not in self._unstored]
            if stored:
                await trio.to_thread.run_sync(self.store.remove, (), (), stored)
            self._forget(waste)

    def _garbage(self) -> plan.Garbage:
        needed = [image for image in self.images.values() if image.id not in self.going]
        return plan.garbage(needed, self.layers, self.blobs, self._held_layers, self._held_blobs)

    def _forget(self, waste: plan.Garbage) -> None:
        for layer in waste.layers:
            self.layers.pop(layer.chain_id, None)
            self._unstored.pop(layer.chain_id, None)
            self.disk.discard(self.disk.layer(layer.number))
        for digest in waste.blobs:
            self.blobs.discard(digest)
            self.disk.discard(self.disk.blob(digest))
        self.empty_trash_soon()

    def discard(self, path: Path) -> None:
        self.disk.discard(path)
        self.empty_trash_soon()

    def empty_trash_soon(self) -> None:
        self._trash.set()

    async def keep_trash_empty(self, log: Any) -> None:
        """Runs as long as the service: deletes what was discarded, in a thread, nobody waiting for it."""
        while True:
            await self._trash.wait()
            self._trash = trio.Event()
            for failure in await trio.to_thread.run_sync(self.disk.empty_trash):
                log.warning("cannot delete", error=str(failure))

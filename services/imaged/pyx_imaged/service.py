"""imaged's use cases that need no transfer: resolve, prepare, release, list, inspect, tag, remove."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import trio

from pyx_bus.contract import imaged as contract
from pyx_bus.contract.base import Event, Released, Retain
from pyx_bus.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted

from . import describe, manifest, plan, platforms, reference
from .drivers.base import Snapshotter
from .library import Library
from .model import Image, ImageID, SnapshotRecord

_CONTAINER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_NO_SPACE = (28, 122)  # ENOSPC, EDQUOT
Publish = Callable[[Event], None]


def event(kind: type[Event], image_id: str, name: str, labels: Mapping[str, str]) -> Event:
    return kind(id=image_id, time_ns=time.time_ns(), attributes={**labels, "name": name or image_id})


class Images:
    """``host`` is the platform images are chosen for; ``snapshotters`` by name, the first one for new snapshots."""

    def __init__(
        self, library: Library, snapshotters: dict[str, Snapshotter], host: platforms.Platform, publish: Publish
    ) -> None:
        self._library = library
        self._snapshotters = snapshotters
        self._snapshotter = next(iter(snapshotters.values()))
        self._host = host
        self._publish = publish
        self._preparing: dict[str, trio.Event] = {}

    def _find(self, text: str, platform: str) -> tuple[Image, str]:
        """An image and the familiar name it goes by: the one asked for, else its first, else its ID."""
        library = self._library
        image_id, named = plan.find(text, library.images, library.names)
        if platform:
            wanted = platforms.parse(platform, self._host)
            has = manifest.platform_of(library.config(image_id))
            if not platforms.runs_on(has, wanted):
                raise NotFound(f'image "{text}" is here for "{has}", not for "{wanted}"', hint="pull it for that platform")
        if named is not None:
            return library.images[image_id], named.familiar
        names = library.names_of(image_id)
        return library.images[image_id], plan.familiar(names[0]) if names else image_id

    def resolve(self, request: contract.ResolveImage) -> contract.ImageConfig:
        image, name = self._find(request.reference, request.platform)
        return self._library.image_config(image.id, name)

    # Snapshots

    async def prepare(self, request: contract.PrepareSnapshot) -> contract.Snapshot:
        container_id = request.container_id
        if not _CONTAINER_ID.fullmatch(container_id):
            raise InvalidArgument(f'invalid container ID: "{container_id}"')
        while container_id in self._preparing:  # a retried call whose first one is still copying
            await self._preparing[container_id].wait()
        record = self._library.snapshots.get(container_id)
        if record is not None:
            return self._again(record, request)
        image, name = self._find(request.image, request.platform)
        if image.id in self._library.going:
            raise NotFound(f'image "{name}" is being removed')
        snapshotter = self._snapshotter
        paths = self._library.layer_paths(image)
        make = functools.partial(self._library.disk.make_snapshot, container_id, image.id, request.image, name, paths, snapshotter)
        snapshotter.mounts(self._library.disk.snapshot(container_id), paths)  # refuses what couldn't be mounted before it's made
        try:
            record = make() if snapshotter.instant else await self._prepare_slowly(container_id, image, make)
        except OSError as error:
            self._library.empty_trash_soon()
            if error.errno in _NO_SPACE:
                raise ResourceExhausted(f'no space left for the snapshot of container "{container_id}"') from error
            raise
        self._library.snapshots[container_id] = record
        return self._snapshot(record, image, name)

    async def _prepare_slowly(
        self, container_id: str, image: Image, make: Callable[[], SnapshotRecord]
    ) -> SnapshotRecord:
        """In a thread, with the image's layers held. Not cancellable in the middle: a half copy is discarded by ``make``."""
        done = self._preparing[container_id] = trio.Event()
        try:
            with self._library.holding(image.layers, ()):
                record = await trio.to_thread.run_sync(make)
            if image.id not in self._library.images or image.id in self._library.going:
                self._library.discard(self._library.disk.snapshot(container_id))
                raise NotFound(f'image "{image.id}" was removed meanwhile')
            return record
        finally:
            del self._preparing[container_id]
            done.set()

    def _again(self, record: SnapshotRecord, request: contract.PrepareSnapshot) -> contract.Snapshot:
        """The snapshot that's there already. The name it was made under may have moved on meanwhile: it keeps its image."""
        image = self._library.images.get(record.image_id)
        asked_again = request.image == record.asked
        if image is None or not (asked_again or self._find(request.image, request.platform)[0].id == record.image_id):
            raise FailedPrecondition(
                f'container "{request.container_id[:12]}" has a snapshot of another image: {record.image_id}'
            )
        return self._snapshot(record, image, record.name)

    def _snapshot(self, record: SnapshotRecord, image: Image, name: str) -> contract.Snapshot:
        snapshotter = self._snapshotters.get(record.snapshotter)
        if snapshotter is None:
            raise FailedPrecondition(f'the snapshotter "{record.snapshotter}" of this snapshot is not usable on this host')
        directory = self._library.disk.snapshot(record.container_id)
        return contract.Snapshot(
            image=self._library.image_config(image.id, name),
            mounts=snapshotter.mounts(directory, self._library.layer_paths(image)),
            writable_path=str(snapshotter.writable(directory)),
            snapshotter=record.snapshotter,
        )

    async def release(self, container_id: str) -> None:
        while container_id in self._preparing:  # its caller gave up; the copy is made to its end all the same
            await self._preparing[container_id].wait()
        if self._library.snapshots.pop(container_id, None) is not None:
            self._library.discard(self._library.disk.snapshot(container_id))

    async def retain(self, request: Retain) -> Released:
        live = set(request.container_ids)
        gone = [
            record.container_id
            for record in self._library.snapshots.values()
            if record.container_id not in live and record.created_ns < request.before_ns
        ]
        for container_id in gone:
            await self.release(container_id)
        return Released(container_ids=gone)

    # Images

    def _listed(self) -> list[plan.Listed]:
        tags: dict[ImageID, list[str]] = {}
        for name, image_id in self._library.names.items():
            if "@" not in name:
                tags.setdefault(image_id, []).append(name)
        return [
            plan.Listed(
                image,
                tags.get(image_id, []),
                manifest.created_ns(self._library.config(image_id)),
                self._library.labels(image_id),
            )
            for image_id, image in self._library.images.items()
        ]

    def list(self, request: contract.ListImages) -> contract.ImageList:
        def created_of(text: str) -> int:
            return manifest.created_ns(self._library.config(self._find(text, "")[0].id))

        found = plan.keep(self._listed(), request.filters, created_of)
        summaries = []
        for item in sorted(found, key=lambda item: (-item.created_ns, item.image.id)):
            tags, digests = describe.names_of(self._library.names_of(item.image.id))
            summaries.append(
                contract.ImageSummary(
                    id=item.image.id,
                    references=tags,
                    digests=digests,
                    created_ns=item.created_ns,
                    size_bytes=self._library.size_bytes(item.image),
                    containers=len(self._library.users(item.image.id)),
                    labels=dict(item.labels),
                )
            )
        return contract.ImageList(images=summaries)

    def inspect(self, request: contract.ResolveImage) -> contract.Document:
        image, _ = self._find(request.reference, request.platform)
        library = self._library
        document = describe.document(
            image,
            library.config(image.id),
            library.names_of(image.id),
            library.size_bytes(image),
            library.diff_ids(image),
            self._snapshotter.name,
            [str(path) for path in reversed(library.layer_paths(image))],
        )
        return contract.Document(document=document)

    async def tag(self, request: contract.TagImage) -> None:
        target = reference.parse(request.target)
        if target.digest:
            raise InvalidArgument(f'a name to be given cannot have a digest: "{request.target}"')
        image, _ = self._find(request.source, "")
        tagged = event(contract.ImageTagged, image.id, target.familiar, self._library.labels(image.id))
        await self._library.add_name(target.canonical, image.id, lambda: self._publish(tagged))

    async def remove(self, request: contract.RemoveImage) -> contract.RemovedImage:
        library = self._library
        image_id = ImageID("")
        labels: dict[str, str] = {}

        def decide() -> plan.Removal:
            nonlocal image_id, labels
            image_id = plan.find(request.reference, library.images, library.names)[0]
            labels = library.labels(image_id)
            return plan.remove(request.reference, request.force, library.images, library.names, library.users)

        def tell(removal: plan.Removal) -> None:
            for name in removal.names:
                self._publish(event(contract.ImageUntagged, image_id, plan.familiar(name), labels))
            if removal.image is not None:
                self._publish(event(contract.ImageDeleted, image_id, image_id, labels))

        removal, layers = await library.remove(decide, tell)
        untagged = [plan.familiar(name) for name in removal.names]
        deleted: list[str] = []
        if removal.image is not None:
            deleted = [image_id, *(layer.chain_id for layer in reversed(layers))]
        return contract.RemovedImage(untagged=untagged, deleted=deleted)

    def describe(self) -> dict[str, Any]:
        """For the log at start."""
        return {
            "images": len(self._library.images),
            "layers": len(self._library.layers),
            "snapshots": len(self._library.snapshots),
            "snapshotter": self._snapshotter.name,
            "platform": str(self._host),
        }

"""What a container changed: listed (``diff``), or made an image of (``commit``).

The changes are read by a worker process, which makes the layer's blob of them; then the blob is unpacked like any other layer, so that
what is kept is what anybody else will get of it. Until the image's row is written all of it lies in ``ingest``, which is emptied at start.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pyx_bus.contract import imaged as contract
from pyx_bus.errors import FailedPrecondition, Internal, NotFound

from . import changes, manifest
from .drivers.base import Snapshotter
from .library import Library
from .model import ChainID, DiffID, Digest, Image, ImageID, PackResult, SnapshotRecord, chain_ids, sha256
from .service import Publish, event
from .transfer import Transfers
from .workers import Workers

_CLOCK_NS = 20_000_000  # how far the stamps of the kernel may lie behind the clock, and more
_KEPT = ("architecture", "variant", "os", "os.version", "os.features")
Send = Callable[[contract.SnapshotRead], Awaitable[None]]


class Commits:
    def __init__(
        self,
        library: Library,
        workers: Workers,
        transfers: Transfers,
        snapshotters: Mapping[str, Snapshotter],
        publish: Publish,
    ) -> None:
        self._library = library
        self._workers = workers
        self._transfers = transfers
        self._snapshotters = snapshotters
        self._publish = publish

    async def diff(self, container_id: str, out: int) -> None:
        """Errors: see ``contract.DiffSnapshot``. ``out`` stays the caller's."""
        record, image = self._find(container_id)
        with self._library.holding(image.layers, ()):
            await self._workers.diff(self._sides(record, image), out)
        self._check_still_there(record)

    async def commit(self, request: contract.CommitSnapshot, send: Send) -> contract.ImageID:
        """Errors: see ``contract.CommitSnapshot``."""
        library, transfers = self._library, self._transfers
        record, image = self._find(request.container_id)
        target = transfers.new_name(request.reference)
        inner = changes.commit(_config(request.config), request.changes)
        if len(image.layers) >= manifest.LAYERS_LIMIT:
            raise FailedPrecondition(f"the container's image has {len(image.layers)} layers, and there can't be more")
        parent, diff_ids = library.config(image.id), library.diff_ids(image)
        async with transfers.clearing_up():
            with library.holding(image.layers, ()), transfers.scratch() as (directory, blob):
                packed = await self._workers.pack(self._sides(record, image), blob)
                self._check_still_there(record)
                await send(contract.SnapshotRead(size_bytes=packed.size if packed.entries else 0))
                if packed.entries:
                    diff_ids = [*diff_ids, DiffID(packed.diff_id)]
                config = _document(parent, diff_ids, inner, request, empty=not packed.entries)
                made = Image(ImageID(sha256(config)), config, chain_ids(diff_ids), "", (sha256(config),), time.time_ns())

                def tell() -> None:
                    labels, name = library.labels(made.id), target.familiar if target else ""
                    self._publish(event(contract.ImageCreated, made.id, name, labels))
                    if target:
                        self._publish(event(contract.ImageTagged, made.id, name, labels))

                names = [target.canonical] if target else []
                if not packed.entries:
                    await library.add_image(made, {sha256(config): config}, names, tell)
                else:
                    top = made.layers[-1]
                    async with transfers.only_one(top):
                        with library.holding([top], [Digest(packed.digest)]):
                            if top not in library.layers:
                                await self._unpack(packed, directory, blob, top, base=not image.layers)
                            await library.add_image(made, {sha256(config): config}, names, tell)
        return contract.ImageID(id=made.id, reference=target.familiar if target else "")

    async def _unpack(self, packed: PackResult, directory: Any, blob: Any, chain_id: ChainID, *, base: bool) -> None:
        with open(blob, "rb", buffering=0) as source:  # noqa: ASYNC230  a local file's open doesn't wait
            result = await self._workers.unpack(
                source.fileno(), directory, base=base, blob=None, strict_end=True, progress=lambda _: None
            )
        if (result.digest, result.diff_id) != (packed.digest, packed.diff_id):
            raise Internal(f"the layer was made as {packed.digest}, but is read as {result.digest}")
        self._library.add_layer(directory, blob, chain_id, DiffID(packed.diff_id), result, manifest.OCI_LAYER + "+gzip")

    def _find(self, container_id: str) -> tuple[SnapshotRecord, Image]:
        record = self._library.snapshots.get(container_id)
        image = self._library.images.get(ImageID(record.image_id)) if record is not None else None
        if record is None or image is None:
            raise NotFound(f'no snapshot of a container "{container_id}"')
        return record, image

    def _check_still_there(self, record: SnapshotRecord) -> None:
        """Else what was read may have been half deleted."""
        if self._library.snapshots.get(record.container_id) is not record:
            raise FailedPrecondition(f'container "{record.container_id[:12]}" was removed meanwhile')

    def _sides(self, record: SnapshotRecord, image: Image) -> dict[str, Any]:
        snapshotter = self._snapshotters.get(record.snapshotter)
        if snapshotter is None:
            raise FailedPrecondition(f'the snapshotter "{record.snapshotter}" of this container is not usable on this host')
        disk = self._library.disk
        return {
            "own": str(snapshotter.writable(disk.snapshot(record.container_id))),
            "layers": [str(path) for path in reversed(self._library.layer_paths(image))],
            "overlay": snapshotter.overlay,
            "since_ns": record.created_ns - _CLOCK_NS,
            "empty": str(disk.root / "layers" / "empty"),
        }


def _config(given: contract.ImageConfig) -> dict[str, Any]:
    """A container's config as an image config has it (image-spec config.md; Docker's Healthcheck and Shell): without what's empty."""
    check = given.healthcheck
    health = {}
    if check is not None:
        durations = (check.interval_ns, check.timeout_ns, check.start_period_ns, check.start_interval_ns, check.retries)
        names = ("Interval", "Timeout", "StartPeriod", "StartInterval", "Retries")
        health = {"Test": check.test, **{name: value for name, value in zip(names, durations, strict=True) if value}}
    found = {
        "User": given.user,
        "ExposedPorts": {port: {} for port in given.exposed_ports},
        "Env": list(given.env),
        "Entrypoint": list(given.entrypoint),
        "Cmd": list(given.cmd),
        "Volumes": {path: {} for path in given.volumes},
        "WorkingDir": given.working_dir,
        "Labels": dict(given.labels),
        "StopSignal": given.stop_signal,
        "Healthcheck": health,
        "Shell": list(given.shell),
    }
    return {key: value for key, value in found.items() if value}


def _document(
    parent: Mapping[str, Any], diff_ids: list[DiffID], inner: Mapping[str, Any], request: contract.CommitSnapshot, *, empty: bool
) -> bytes:
    """The new image's config: its parent's platform and history, and one entry more."""
    now = manifest.rfc3339(time.time_ns())
    said = {"created_by": request.created_by, "author": request.author, "comment": request.message}
    before = parent.get("history")
    document = {
        "created": now,
        **({"author": request.author} if request.author else {}),
        **{key: parent[key] for key in _KEPT if parent.get(key)},
        "config": inner,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [
            *(before if isinstance(before, list) else []),
            {"created": now, **{key: value for key, value in said.items() if value}, **({"empty_layer": True} if empty else {})},
        ],
    }
    return json.dumps(document).encode()

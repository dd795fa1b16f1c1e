"""Images on their way in: import, load, pull. All of them end in ``Library.add_image``, or leave nothing.

Layers are unpacked in worker processes, in parallel: in overlayfs's form a layer's directory doesn't depend on those below it. Two
transfers that need the same layer share the work: the second one waits for the first.
"""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from pyx_bus.contract import imaged as contract
from pyx_bus.contract.base import Event
from pyx_bus.errors import BusError, InvalidArgument, NotFound, Unavailable

from . import archive, changes, manifest, platforms, reference
from .library import Library
from .model import ChainID, DiffID, Digest, Image, ImageID, Member, UnpackResult, chain_ids, sha256, short
from .progress import Reporter, Send
from .registry import Registry
from .service import Publish, event
from .workers import Workers

_PARALLEL_LAYERS = 3
_RESUME_WITHIN_S = 3600.0  # how long an interrupted pull's whole layers are kept
_MEDIA_TYPES = {"gzip": manifest.OCI_LAYER + "+gzip", "zstd": manifest.OCI_LAYER + "+zstd"}


@dataclass(slots=True)
class WantedLayer:
    """A layer to be had. ``digest``, ``size`` and ``diff_id`` must come out so; empty or -1 where nobody says."""

    chain_id: ChainID
    diff_id: DiffID
    digest: str
    size: int
    media_type: str
    base: bool


@dataclass(frozen=True, slots=True)
class _Told:
    """As what an image's coming is told, and under which name (empty: its ID)."""

    kind: type[Event]
    name: str


Fetch = Callable[[WantedLayer, Path, Path], Awaitable[UnpackResult]]
"""Unpack a layer into a directory, keeping its bytes as a file."""


class Transfers:
    def __init__(
        self,
        library: Library,
        workers: Workers,
        registry: Registry,
        host: platforms.Platform,
        publish: Publish,
        nursery: trio.Nursery,
    ) -> None:
        self._library = library
        self._workers = workers
        self._registry = registry
        self._host = host
        self._publish = publish
        self._nursery = nursery
        self._busy: dict[ChainID, trio.Lock] = {}

    # Import

    async def import_image(self, request: contract.ImportImage, source: int) -> contract.ImageID:
        """A root file system's tar from descriptor ``source`` (not closed here) as an image of one layer."""
        target = self.new_name(request.reference)
        platform = platforms.parse(request.platform, self._host) if request.platform else self._host
        inner = changes.apply({}, request.changes)
        with self.scratch() as (directory, blob):
            result = await self._workers.unpack(
                source, directory, base=True, blob=blob, strict_end=True, progress=lambda _: None
            )
            diff_id = DiffID(result.diff_id)
            now = manifest.rfc3339(time.time_ns())
            config = json.dumps(
                {
                    "created": now,
                    "architecture": platform.architecture,
                    **({"variant": platform.variant} if platform.architecture == "arm" else {}),
                    "os": platform.os,
                    "config": inner,
                    "rootfs": {"type": "layers", "diff_ids": [diff_id]},
                    "history": [{"created": now, "comment": request.message or "Imported from -"}],
                }
            ).encode()
            chain_id = ChainID(diff_id)
            async with self.clearing_up(), self.only_one(chain_id):
                with self._library.holding([chain_id], [Digest(result.digest)]):
                    if chain_id not in self._library.layers:
                        media_type = _MEDIA_TYPES.get(result.compression, manifest.OCI_LAYER)
                        self._library.add_layer(directory, blob, chain_id, diff_id, result, media_type)
                    names = [target.canonical] if target else []
                    told = _Told(contract.ImageImported, target.familiar if target else "")
                    image_id = await self._add(config, (chain_id,), "", {sha256(config): config}, names, told)
        return contract.ImageID(id=image_id, reference=told.name)

    def new_name(self, text: str) -> reference.Reference | None:
        if not text:
            return None
        parsed = reference.parse(text)
        if parsed.digest:
            raise InvalidArgument(f'a name to be given cannot have a digest: "{text}"')
        return parsed

    # Load

    async def load(self, request: contract.LoadImages, source: int, send: Send) -> contract.LoadedImages:
        """Every image of an archive read from descriptor ``source`` (not closed here)."""
        wanted = platforms.parse(request.platform, self._host) if request.platform else self._host
        reporter = Reporter(send)
        spool = self._library.disk.ingest_directory()
        names: list[str] = []
        ids: list[str] = []
        try:
            async with self._reporting(reporter):
                spooled = await self._workers.spool(source, spool, lambda done: reporter.now("", "Reading", done))
                images = archive.Archive(spooled.members, functools.partial(_read_member, spool)).images(wanted)
                for found in images:
                    image_id = await self._load_one(found, spool, reporter)
                    familiar = [reference.parse(name).familiar for name in found.names]
                    names += familiar
                    if not familiar:
                        ids.append(image_id)
            await reporter.flush()
        finally:
            self._library.discard(spool)
        return contract.LoadedImages(references=names, ids=ids)

    async def _load_one(self, found: archive.ArchiveImage, spool: Path, reporter: Reporter) -> ImageID:
        chains = chain_ids([layer.diff_id for layer in found.layers])
        members = dict(zip(chains, (layer.member for layer in found.layers), strict=True))
        wanted = [
            WantedLayer(chain_id, layer.diff_id, layer.member.digest, layer.member.size, layer.media_type, index == 0)
            for index, (chain_id, layer) in enumerate(zip(chains, found.layers, strict=True))
        ]

        async def fetch(layer: WantedLayer, directory: Path, blob: Path) -> UnpackResult:
            file = spool / str(members[layer.chain_id].number)
            result = await self._unpack_file(file, directory, layer, reporter)
            os.link(file, blob)  # the archive may have the same layer twice
            return result

        parsed = [reference.parse(name) for name in found.names]
        documents = archive.documents_by_digest(found)
        told = _Told(contract.ImageLoaded, parsed[0].familiar if parsed else "")
        names = [name.canonical for name in parsed]
        return await self._store(found.config, wanted, found.digest, documents, names, fetch, reporter, told)

    # Pull

    async def pull(self, request: contract.PullImage, send: Send) -> contract.PulledImage:
        """An image from its registry."""
        name = reference.parse(request.reference)
        wanted = platforms.parse(request.platform, self._host) if request.platform else self._host
        reporter = Reporter(send)
        async with self._reporting(reporter), self._registry.repository(name) as repository:
            reporter.now("", f"Pulling from {name.path}")
            top = await repository.manifest(name.target)
            documents = {top.digest: top.data}
            chosen = top
            if manifest.is_index(top.document, top.media_type):
                entries = [entry for entry in manifest.parse_index(top.document) if entry.platform is not None]
                digest = platforms.select([(e.platform, e.descriptor.digest) for e in entries if e.platform], wanted)
                if digest is None:
                    there = ", ".join(sorted({str(entry.platform) for entry in entries})) or "none"
                    raise NotFound(
                        f'no image for the platform "{wanted}" in "{name.familiar}"', hint=f"it has: {there}"
                    )
                chosen = await repository.manifest(digest)
                documents[chosen.digest] = chosen.data
            parsed = manifest.parse_manifest(chosen.document)
            config = await repository.blob(parsed.config, manifest.CONFIG_LIMIT)
            documents[parsed.config.digest] = config
            loaded = manifest.load(config, "image config", manifest.CONFIG_LIMIT)
            has = manifest.platform_of(loaded)
            if chosen is top and request.platform and not platforms.runs_on(has, wanted):
                raise NotFound(f'"{name.familiar}" is for the platform "{has}", not for "{wanted}"')
            diff_ids = manifest.diff_ids(loaded)
            if len(diff_ids) != len(parsed.layers):
                raise InvalidArgument(
                    f"image config names {len(diff_ids)} layers, the manifest has {len(parsed.layers)}"
                )
            layers = [
                WantedLayer(chain_id, diff_id, item.digest, item.size, item.media_type, index == 0)
                for index, (chain_id, diff_id, item) in enumerate(
                    zip(chain_ids(diff_ids), diff_ids, parsed.layers, strict=True)
                )
            ]
            image_id = ImageID(sha256(config))
            names = [f"{name.repository}@{top.digest}", *([] if name.digest else [name.canonical])]
            known = self._library.names
            up_to_date = image_id in self._library.images and all(known.get(x) == image_id for x in names)

            async def fetch(layer: WantedLayer, directory: Path, blob: Path) -> UnpackResult:
                if Digest(layer.digest) in self._library.blobs:  # known from another image, on top of other layers
                    file = self._library.disk.blob(layer.digest)
                    result = await self._unpack_file(file, directory, layer, reporter)
                    os.link(file, blob)
                    return result
                return await self._download(repository.blob_stream, layer, directory, blob, reporter)

            told = _Told(contract.ImagePulled, name.familiar)
            await self._store(config, layers, chosen.digest, documents, names, fetch, reporter, told, resumable=True)
        reporter.now("", f"Digest: {top.digest}")
        await reporter.flush()
        state = "Image is up to date for" if up_to_date else "Downloaded newer image for"
        reporter.now("", f"Status: {state} {name.familiar}")
        await reporter.flush()
        return contract.PulledImage(id=image_id, reference=name.familiar, digest=top.digest, up_to_date=up_to_date)

    async def _download(
        self, open_stream: Any, layer: WantedLayer, directory: Path, blob: Path, reporter: Reporter
    ) -> UnpackResult:
        """Registry → pipe → worker, which digests, keeps and unpacks while the rest is still on its way."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        label = short(layer.digest)
        results: list[UnpackResult] = []
        failures: list[BusError] = []
        sink = trio.lowlevel.FdStream(write_end)
        try:
            _widen(write_end)
            async with trio.open_nursery() as nursery:

                async def work() -> None:
                    try:
                        results.append(
                            await self._workers.unpack(
                                read_end, directory, base=layer.base, blob=blob, strict_end=False,
                                progress=lambda done: reporter.now(label, "Downloading", done, layer.size),
                            )
                        )  # fmt: skip
                    except BusError as error:
                        failures.append(error)
                        nursery.cancel_scope.cancel()

                nursery.start_soon(work)
                try:
                    async for chunk in open_stream(layer.digest, layer.size):
                        await sink.send_all(chunk)
                    await sink.aclose()
                except trio.BrokenResourceError:
                    pass  # the worker has given up, and says why
                except BusError as error:
                    failures.append(error)
                    nursery.cancel_scope.cancel()
        finally:
            os.close(read_end)
            with trio.CancelScope(shield=True):
                await sink.aclose()
        if failures:
            raise failures[0]
        return results[0]

    # What all of them share

    async def _unpack_file(
        self, file: Path, directory: Path, layer: WantedLayer, reporter: Reporter
    ) -> UnpackResult:
        label = short(layer.digest or layer.diff_id)
        with open(file, "rb", buffering=0) as source:  # noqa: ASYNC230  a local file's open doesn't wait
            return await self._workers.unpack(
                source.fileno(), directory, base=layer.base, blob=None, strict_end=False,
                progress=lambda done: reporter.now(label, "Extracting", done, layer.size),
            )  # fmt: skip

    async def _store(
        self,
        config: bytes,
        layers: Sequence[WantedLayer],
        manifest_digest: str,
        documents: dict[Digest, bytes],
        names: list[str],
        fetch: Fetch,
        reporter: Reporter,
        told: _Told,
        *,
        resumable: bool = False,
    ) -> ImageID:
        """Get every layer that isn't here, then store the image. On failure what came with it goes again."""
        chains = tuple(layer.chain_id for layer in layers)
        held = [*(Digest(layer.digest) for layer in layers if layer.digest), *documents]
        async with self.clearing_up(resumable=resumable):
            with self._library.holding(chains, held):
                limiter = trio.CapacityLimiter(_PARALLEL_LAYERS)
                failures: list[BusError] = []
                async with trio.open_nursery() as nursery:
                    for layer in layers:
                        nursery.start_soon(
                            self._get_layer, layer, fetch, limiter, reporter, failures, nursery.cancel_scope
                        )
                if failures:
                    raise failures[0]
                return await self._add(config, chains, manifest_digest, documents, names, told)

    async def _get_layer(
        self,
        layer: WantedLayer,
        fetch: Fetch,
        limiter: trio.CapacityLimiter,
        reporter: Reporter,
        failures: list[BusError],
        scope: trio.CancelScope,
    ) -> None:
        label = short(layer.digest or layer.diff_id)
        library = self._library
        try:
            async with limiter, self.only_one(layer.chain_id):
                if layer.chain_id in library.layers:
                    reporter.now(label, "Already exists")
                    return
                with self.scratch() as (directory, blob):
                    result = await fetch(layer, directory, blob)
                    _verify(layer, result)
                    kept = blob if blob.exists() else None
                    media_type = layer.media_type or _MEDIA_TYPES.get(result.compression, manifest.OCI_LAYER)
                    library.add_layer(directory, kept, layer.chain_id, layer.diff_id, result, media_type)
                reporter.now(label, "Pull complete", layer.size, layer.size)
        except BusError as error:
            failures.append(error)
            scope.cancel()

    async def _add(
        self,
        config: bytes,
        chains: tuple[ChainID, ...],
        manifest_digest: str,
        documents: dict[Digest, bytes],
        names: list[str],
        told: _Told,
    ) -> ImageID:
        image = Image(
            ImageID(sha256(config)), config, chains, manifest_digest, tuple(sorted(documents)), time.time_ns()
        )

        def tell() -> None:
            self._publish(event(told.kind, image.id, told.name, self._library.labels(image.id)))

        await self._library.add_image(image, documents, names, tell)
        return image.id

    @contextmanager
    def scratch(self) -> Iterator[tuple[Path, Path]]:
        """An empty directory and the path of a file to be; whatever is still there at the end is discarded."""
        directory, blob = self._library.disk.ingest_directory(), self._library.disk.ingest()
        try:
            yield directory, blob
        finally:
            self._library.discard(directory)
            self._library.discard(blob)

    @asynccontextmanager
    async def clearing_up(self, *, resumable: bool = False) -> AsyncIterator[None]:
        """If the block fails, layers and blobs it brought and no image uses go again.

        If it's ``resumable`` and was interrupted (cancelled, or the registry went away), whole layers stay for a while: who asks
        again needn't fetch them again.
        """
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, Unavailable) or trio.current_effective_deadline() == -math.inf
            if resumable and interrupted:
                self._nursery.start_soon(self._collect_later)
            else:
                with trio.CancelScope(shield=True):
                    await self._library.collect()
            raise

    async def _collect_later(self) -> None:
        await trio.sleep(_RESUME_WITHIN_S)
        with suppress(OSError, sqlite3.Error):  # a full disk; the next clean-up or start does it. It mustn't end the service.
            await self._library.collect()

    @asynccontextmanager
    async def only_one(self, chain_id: ChainID) -> AsyncIterator[None]:
        """One transfer at a time gets a layer; the others wait, and find it there."""
        lock = self._busy.setdefault(chain_id, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and self._busy.get(chain_id) is lock:
                del self._busy[chain_id]

    @asynccontextmanager
    async def _reporting(self, reporter: Reporter) -> AsyncIterator[None]:
        failure: BusError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reporter.run)
            try:
                yield
            except BusError as error:
                failure = error  # out of the nursery as it is, not in a group
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure


def _verify(layer: WantedLayer, result: UnpackResult) -> None:
    """Errors: invalid_argument if what came isn't what was promised."""
    if layer.digest and result.digest != layer.digest:
        raise InvalidArgument(f"layer {layer.digest} has the wrong digest {result.digest}")
    if layer.size >= 0 and result.size != layer.size:
        raise InvalidArgument(f"layer {layer.digest} has {result.size} bytes instead of {layer.size}")
    if result.diff_id != layer.diff_id:
        raise InvalidArgument(f"layer {layer.diff_id} has the wrong digest {result.diff_id} when uncompressed")


def _read_member(spool: Path, member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise InvalidArgument(f'image archive with a "{member.name}" of {member.size} bytes (at most {limit})')
    return (spool / str(member.number)).read_bytes()


def _widen(pipe: int) -> None:
    """A pipe of 1 MiB, so that downloading and unpacking don't wait for each other all the time; fewer pages where that's refused."""
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
    except OSError:
        pass

"""imaged on the bus: request → use case → reply."""

from __future__ import annotations

import errno
import os
import platform
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import trio

from pyx_bus import masking
from pyx_bus.contract import imaged as contract
from pyx_bus.contract.base import Empty, Released, Retain
from pyx_bus.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from pyx_bus.service import Call, Context, Service

from . import kernel, platforms
from .commit import Commits
from .drivers.base import Snapshotter
from .drivers.copy import Copy
from .drivers.overlayfs import Overlayfs
from .extract import Limits
from .library import Library
from .registry import Registry
from .service import Images
from .transfer import Transfers
from .workers import Workers

_LOCK_WAIT_S = 5.0


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The table ``[imaged]``. ``snapshotter``: overlayfs, copy, or empty for the first one that works.

    ``insecure_registries``: host[:port] or CIDR that may speak plain HTTP, besides loopback. ``max_image_bytes``: bound of one layer
    unpacked, and of one archive loaded. ``max_layer_entries``: files of one layer. ``min_free_bytes``: unpacking stops before less is
    free. ``allow_absolute_names``: take archive entries with absolute paths as relative ones, instead of refusing them.
    """

    snapshotter: str = ""
    insecure_registries: list[str] = []
    max_image_bytes: int = 64 << 30
    max_layer_entries: int = 4_000_000
    min_free_bytes: int = 64 << 20
    allow_absolute_names: bool = False


def _host() -> platforms.Platform:
    flags: list[str] = []
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                flags = line.partition(":")[2].split()
                break
    except OSError:
        pass  # no /proc: the baseline of the architecture
    return platforms.host_platform(platform.machine(), flags)


def _snapshotters(root: Path, library: Library, wanted: str, context: Context) -> dict[str, Snapshotter]:
    """Those that work on this host, tried for real; the one for new snapshots first. Blocks."""
    usable: dict[str, Snapshotter] = {}
    known: list[Snapshotter] = [Overlayfs(root / "l"), Copy()]
    if wanted and wanted not in {snapshotter.name for snapshotter in known}:
        raise InvalidArgument(f'unknown snapshotter: "{wanted}"', hint="overlayfs or copy")
    for snapshotter in sorted(known, key=lambda snapshotter: snapshotter.name != wanted):
        scratch = library.disk.ingest_directory()
        try:
            snapshotter.probe(scratch)
            usable[snapshotter.name] = snapshotter
        except OSError as error:
            context.log.warning("snapshotter can't be used here", snapshotter=snapshotter.name, reason=str(error))
        finally:
            library.discard(scratch)
    if not usable or (wanted and wanted not in usable):
        raise FailedPrecondition(f'no usable snapshotter on "{root}"', hint="the log says why each of them failed")
    return usable


@contextmanager
def _disk_full_is_no_bug() -> Iterator[None]:
    """Errors: resource_exhausted where a call met the end of the disk outside a worker."""
    try:
        yield
    except Exception as error:
        if _disk_full(error):
            raise ResourceExhausted("no space left where images are kept", hint="remove images or containers") from error
        raise


def _disk_full(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):  # a nursery was in between
        return any(_disk_full(inner) for inner in error.exceptions)
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _descriptor(call: Call) -> Iterator[int]:
    """The one descriptor a request must bring; closed at the end."""
    fds = call.take_fds()
    try:
        if len(fds) != 1:
            raise InvalidArgument(f"the request must bring one descriptor, it brought {len(fds)}")
        yield fds[0]
    finally:
        for fd in fds:
            os.close(fd)


async def setup(context: Context) -> Service:
    try:
        config = msgspec.convert(context.config, Config)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"invalid configuration of imaged: {error}") from None
    root = context.root
    if set(str(root)) & set(":,\\"):
        raise InvalidArgument(f'the data directory\'s path can\'t have ":", "," or a backslash: "{root}"')
    root.chmod(0o711)
    try:
        lock = await trio.to_thread.run_sync(kernel.lock_directory, root, _LOCK_WAIT_S)
    except BlockingIOError:
        raise FailedPrecondition(f'another imaged works on "{root}"') from None
    context.exit_stack.callback(os.close, lock)
    library = await trio.to_thread.run_sync(Library, root)
    context.exit_stack.callback(library.store.close)
    snapshotters = await trio.to_thread.run_sync(_snapshotters, root, library, config.snapshotter, context)
    context.nursery.start_soon(library.keep_trash_empty, context.log)
    host = _host()
    images = Images(library, snapshotters, host, context.bus.publish)
    limits = Limits(config.max_image_bytes, config.max_layer_entries, config.min_free_bytes)
    workers = Workers(limits, allow_absolute=config.allow_absolute_names)
    registry = Registry(config.insecure_registries)
    transfers = Transfers(library, workers, registry, host, context.bus.publish, context.nursery)
    commits = Commits(library, workers, transfers, snapshotters, context.bus.publish)
    context.log.info("ready", **images.describe())
    return _service(images, transfers, commits)


def _service(images: Images, transfers: Transfers, commits: Commits) -> Service:
    service = Service("imaged")

    @service.method(contract.RESOLVE)
    async def resolve(call: Call, request: contract.ResolveImage) -> contract.ImageConfig:
        call.snapshot()
        found = images.resolve(request)
        return msgspec.structs.replace(found, env=masking.environment(found.env)) if call.monitor else found

    @service.method(contract.PREPARE)
    async def prepare(call: Call, request: contract.PrepareSnapshot) -> contract.Snapshot:
        return await images.prepare(request)

    @service.method(contract.RELEASE)
    async def release(call: Call, request: contract.ReleaseSnapshot) -> Empty:
        await images.release(request.container_id)
        return Empty()

    @service.method(contract.RETAIN)
    async def retain(call: Call, request: Retain) -> Released:
        return await images.retain(request)

    @service.method(contract.IMPORT)
    async def import_image(call: Call, request: contract.ImportImage) -> contract.ImageID:
        with _descriptor(call) as fd, _disk_full_is_no_bug():
            return await transfers.import_image(request, fd)

    @service.method(contract.COMMIT)
    async def commit(call: Call, request: contract.CommitSnapshot) -> contract.ImageID:
        with _disk_full_is_no_bug():
            return await commits.commit(request, call.send)

    @service.method(contract.DIFF)
    async def diff(call: Call, request: contract.DiffSnapshot) -> Empty:
        with _descriptor(call) as fd:
            await commits.diff(request.container_id, fd)
        return Empty()

    @service.method(contract.LOAD)
    async def load(call: Call, request: contract.LoadImages) -> contract.LoadedImages:
        with _descriptor(call) as fd, _disk_full_is_no_bug():
            return await transfers.load(request, fd, call.send)

    @service.method(contract.PULL)
    async def pull(call: Call, request: contract.PullImage) -> contract.PulledImage:
        with _disk_full_is_no_bug():
            return await transfers.pull(request, call.send)

    @service.method(contract.LIST)
    async def list_images(call: Call, request: contract.ListImages) -> contract.ImageList:
        call.snapshot()
        return images.list(request)

    @service.method(contract.INSPECT)
    async def inspect(call: Call, request: contract.ResolveImage) -> contract.Document:
        call.snapshot()
        found = images.inspect(request)
        return contract.Document(document=masking.image(found.document)) if call.monitor else found

    @service.method(contract.TAG)
    async def tag(call: Call, request: contract.TagImage) -> Empty:
        with _disk_full_is_no_bug():
            await images.tag(request)
        return Empty()

    @service.method(contract.REMOVE)
    async def remove(call: Call, request: contract.RemoveImage) -> contract.RemovedImage:
        with _disk_full_is_no_bug():
            return await images.remove(request)

    return service

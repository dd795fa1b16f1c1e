"""What imaged's tests share: a real imaged over a real broker, and looks at what it keeps on the disk."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from pyx_bus import errors, testing
from pyx_bus.client import Bus, connect
from pyx_bus.contract import imaged as contract
from pyx_imaged.api import setup


class Imaged:
    """A client of a running imaged, with its data directory."""

    def __init__(self, bus: Bus, root: Path) -> None:
        self.bus = bus
        self.root = root

    async def import_tar(self, path: Path | str, name: str = "", **fields: Any) -> contract.ImageID:
        with open(path, "rb", buffering=0) as file:
            return await self.bus.call(
                contract.IMPORT, contract.ImportImage(reference=name, **fields), fds=[file.fileno()]
            )

    async def import_bytes(self, data: bytes, name: str = "", **fields: Any) -> contract.ImageID:
        """As a client at the other end of a pipe sends it."""
        read_end, write_end = os.pipe()
        result: list[contract.ImageID] = []
        failures: list[errors.BusError] = []

        async def call() -> None:
            try:
                request = contract.ImportImage(reference=name, **fields)
                result.append(await self.bus.call(contract.IMPORT, request, fds=[read_end]))
            except errors.BusError as error:
                failures.append(error)
            finally:
                os.close(read_end)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            async with trio.lowlevel.FdStream(write_end) as sink:
                try:
                    await sink.send_all(data)
                except trio.BrokenResourceError:
                    pass  # imaged has seen enough
        if failures:
            raise failures[0]
        return result[0]

    async def load(self, path: Path | str, **fields: Any) -> contract.LoadedImages:
        with open(path, "rb", buffering=0) as file:
            return await self.finish(contract.LOAD, contract.LoadImages(**fields), [file.fileno()])

    async def pull(self, reference: str, **fields: Any) -> contract.PulledImage:
        return await self.finish(contract.PULL, contract.PullImage(reference=reference, **fields))

    async def finish(self, method: Any, request: Any, fds: list[int] | None = None) -> Any:
        self.progress: list[contract.Progress] = []
        async with self.bus.stream(method, request, fds=fds or []) as stream:
            async for item in stream:
                self.progress.append(item)
            return await stream.result()

    async def prepare(self, container_id: str, image: str) -> contract.Snapshot:
        return await self.bus.call(contract.PREPARE, contract.PrepareSnapshot(container_id=container_id, image=image))

    async def names(self) -> list[str]:
        listed = await self.bus.call(contract.LIST, contract.ListImages())
        return sorted(name for image in listed.images for name in image.references)

    async def inspect(self, reference: str) -> dict[str, Any]:
        return (await self.bus.call(contract.INSPECT, contract.ResolveImage(reference=reference))).document

    def kept(self) -> dict[str, int]:
        """How many things lie in each of its directories: what a failure must not change."""
        return {
            name: len([path for path in (self.root / name).iterdir() if path.name != "empty"])
            for name in ("blobs/sha256", "layers", "snapshots", "ingest", "trash")
        }

    async def settled(self) -> dict[str, int]:
        """``kept`` once the trash is empty; fails if it isn't within ten seconds."""
        with trio.fail_after(10):
            while self.kept()["trash"]:
                await trio.sleep(0.01)
        return self.kept()


@asynccontextmanager
async def imaged(directory: Path, **config: Any) -> AsyncIterator[Imaged]:
    """A running imaged whose state stays in ``directory`` for the next one."""
    directory.mkdir(exist_ok=True)
    root = directory / "imaged"
    async with (
        testing.broker(directory) as path,
        testing.serve(path, "imaged", setup, root=root, run=directory / "run", config=config),
        connect(str(path)) as bus,
    ):
        yield Imaged(bus, root)


def tar_of(*members: tuple[str, str, Any], **fields: Any) -> bytes:
    """A tar in memory: (name, kind, data or link), kind one of f(ile), d(irectory), s(ymlink), h(ard link), c(haracter device)."""
    kinds = {"f": tarfile.REGTYPE, "d": tarfile.DIRTYPE, "s": tarfile.SYMTYPE, "h": tarfile.LNKTYPE, "c": tarfile.CHRTYPE}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, value in members:
            info = tarfile.TarInfo(name)
            info.type, info.mtime = kinds[kind], 1_700_000_000
            info.mode = 0o755 if kind == "d" else 0o644
            for key, given in fields.items():
                setattr(info, key, given)
            if kind == "f":
                data = value if isinstance(value, bytes) else str(value).encode()
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                continue
            if kind in "sh":
                info.linkname = value
            tar.addfile(info)
    return out.getvalue()


def tree(directory: Path | str) -> dict[str, str]:
    """What's in a directory: relative path → "dir", "link → target", "dev", or a file's content."""
    found: dict[str, str] = {}
    base = os.fspath(directory)
    for here, directories, files in os.walk(base):
        for name in directories + files:
            path = os.path.join(here, name)
            key = os.path.relpath(path, base)
            if os.path.islink(path):
                found[key] = f"link → {os.readlink(path)}"
            elif os.path.isdir(path):
                found[key] = "dir"
            elif os.path.isfile(path):
                found[key] = Path(path).read_text(errors="replace")
            else:
                found[key] = "dev"
    return found

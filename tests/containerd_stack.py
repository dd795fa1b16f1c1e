"""A containerd for tests, with the real logd beside it and recording holders in place of imaged, netd and volumed.

The holders do just enough to run a real container: an overlay of a busybox root, the host's network, bind mounts. They keep account
of what they hold for whom, so that a test can see that nothing is left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tarfile
import traceback
from collections.abc import AsyncIterator
from pathlib import Path

import trio
from tests.images import busybox_tar

import pyx_containerd.api
import pyx_logd.__main__
from pyx_bus import client, errors, testing
from pyx_bus.contract import imaged, netd, volumed
from pyx_bus.contract.base import Empty, Message, Released, Retain
from pyx_bus.service import Call, Context, Service


class Holders:
    """imaged, netd and volumed as containerd sees them: what they hold, by container."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rootfs = directory / "busybox"
        self.snapshots: set[str] = set()
        self.sandboxes: set[str] = set()
        self.volumes: dict[str, list[volumed.MountPoint]] = {}
        self.retained: list[str] = []
        self.calls: list[str] = []
        self.fail: dict[str, errors.BusError] = {}
        self.block = trio.Event()
        self.block.set()
        self.commits: list[imaged.CommitSnapshot] = []
        self.read, self.stored = trio.Event(), trio.Event()  # how far a commit gets: the container's changes are read, the image is there
        self.read.set()
        self.stored.set()

    def make_image(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        tar = self.directory / "busybox.tar"
        busybox_tar(tar)
        self.rootfs.mkdir()
        with tarfile.open(tar) as archive:
            archive.extractall(self.rootfs)  # our own archive, made a line ago

    async def setup_imaged(self, context: Context) -> Service:
        service = Service("imaged")

        @service.method(imaged.PREPARE)
        async def prepare(call: Call, request: imaged.PrepareSnapshot) -> imaged.Snapshot:
            self._call("imaged.prepare")
            if request.image not in ("busybox", "busybox:latest"):
                raise errors.NotFound(f'no such image: "{request.image}"')
            self.snapshots.add(request.container_id)
            await self.block.wait()
            place = self.directory / "snapshots" / request.container_id
            for name in ("upper", "work"):
                (place / name).mkdir(parents=True, exist_ok=True)
            options = [f"lowerdir={self.rootfs}", f"upperdir={place / 'upper'}", f"workdir={place / 'work'}"]
            image = imaged.ImageConfig(id="sha256:" + "b" * 64, reference="docker.io/library/busybox:latest", cmd=["sh"])
            mount = imaged.Mount(type="overlay", source="overlay", options=options)
            return imaged.Snapshot(image=image, mounts=[mount], writable_path=str(place / "upper"))

        @service.method(imaged.RELEASE)
        async def release(call: Call, request: imaged.ReleaseSnapshot) -> Empty:
            self._call("imaged.release")
            self.snapshots.discard(request.container_id)
            shutil.rmtree(self.directory / "snapshots" / request.container_id, ignore_errors=True)
            return Empty()

        @service.method(imaged.COMMIT)
        async def commit(call: Call, request: imaged.CommitSnapshot) -> imaged.ImageID:
            self.commits.append(request)
            await self.read.wait()
            self._call("imaged.commit")
            await call.send(imaged.SnapshotRead())
            await self.stored.wait()
            return imaged.ImageID(id="sha256:" + "c" * 64, reference=request.reference)

        @service.method(imaged.DIFF)
        async def diff(call: Call, request: imaged.DiffSnapshot) -> Empty:
            self._call("imaged.diff")
            os.write(call.fds[0], b"A /" + request.container_id.encode() + b"\0")
            return Empty()

        @service.method(imaged.PULL)
        async def pull(call: Call, request: imaged.PullImage) -> imaged.PulledImage:
            self._call("imaged.pull")
            await call.send(imaged.Progress(status="trying"))
            raise errors.NotFound(f'no such image: "{request.reference}"')

        @service.method(imaged.RETAIN)
        async def retain(call: Call, request: Retain) -> Released:
            return self._retain("imaged", self.snapshots, request)

        return service

    async def setup_netd(self, context: Context) -> Service:
        service = Service("netd")

        @service.method(netd.ATTACH)
        async def attach(call: Call, request: netd.AttachContainer) -> netd.Sandbox:
            self._call("netd.attach")
            self.sandboxes.add(request.container_id)
            return netd.Sandbox(nameservers=["192.0.2.53"], ports=request.ports)

        @service.method(netd.DETACH)
        async def detach(call: Call, request: netd.DetachContainer) -> Empty:
            self._call("netd.detach")
            self.sandboxes.discard(request.container_id)
            return Empty()

        @service.method(netd.INSPECT)
        async def inspect(call: Call, request: netd.NetworkRef) -> imaged.Document:
            if request.network != "bridge":
                raise errors.NotFound(f'no such network: "{request.network}"')
            return imaged.Document(document={"Name": "bridge"})

        @service.method(netd.RETAIN)
        async def retain(call: Call, request: Retain) -> Released:
            return self._retain("netd", self.sandboxes, request)

        return service

    async def setup_volumed(self, context: Context) -> Service:
        service = Service("volumed")

        @service.method(volumed.ATTACH)
        async def attach(call: Call, request: volumed.AttachVolumes) -> volumed.AttachedVolumes:
            self._call("volumed.attach")
            assert len(call.fds) == 1
            assert "bin" in os.listdir(call.fds[0])
            points = []
            for mount in request.mounts:
                source = mount.source or str(self.directory / f"anonymous-{mount.target.strip('/')}")
                os.makedirs(source, exist_ok=True)
                points.append(
                    volumed.MountPoint(type="bind", source=source, target=mount.target, options=["rbind", "rprivate"], name="v")
                )
            self.volumes[request.container_id] = points
            return volumed.AttachedVolumes(mounts=points)

        @service.method(volumed.DETACH)
        async def detach(call: Call, request: volumed.DetachVolumes) -> Empty:
            self._call("volumed.detach")
            self.volumes.pop(request.container_id, None)
            return Empty()

        @service.method(volumed.RETAIN)
        async def retain(call: Call, request: Retain) -> Released:
            return self._retain("volumed", self.volumes, request)

        return service

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]

    def _retain(self, name: str, held: set[str] | dict[str, list[volumed.MountPoint]], request: Retain) -> Released:
        self.retained.append(name)
        gone = [id_ for id_ in held if id_ not in request.container_ids]
        for id_ in gone:
            if isinstance(held, dict):
                held.pop(id_)
            else:
                held.discard(id_)
        return Released(container_ids=gone)

    @property
    def empty(self) -> bool:
        return not (self.snapshots or self.sandboxes or self.volumes)


class Stack:
    """The running services, and the client's connection."""

    def __init__(self, bus_path: Path, bus: client.Bus, context: Context, holders: Holders, directory: Path) -> None:
        self.bus_path = bus_path
        self.bus = bus
        self.context = context
        self.holders = holders
        self.directory = directory

    async def call(self, method: client.Method[client.Req, client.Res], request: client.Req) -> client.Res:  # type: ignore[name-defined]
        return await self.bus.call(method, request, timeout_s=30)


@contextlib.asynccontextmanager
async def stack(directory: Path, *, containerd: bool = True, logd: bool = True) -> AsyncIterator[Stack]:
    """Broker, holders, logd and containerd in this test's loop; leaves no container behind."""
    holders = Holders(directory / "held")
    holders.make_image()
    run, root = directory / "run", directory / "root"
    async with contextlib.AsyncExitStack() as exits:
        path = await exits.enter_async_context(testing.broker(directory))
        for name, setup in (("imaged", holders.setup_imaged), ("netd", holders.setup_netd), ("volumed", holders.setup_volumed)):
            await exits.enter_async_context(testing.serve(path, name, setup, root=root / name, run=run / name))
        if logd:
            await exits.enter_async_context(
                testing.serve(path, "logd", pyx_logd.__main__.setup, root=root / "logd", run=run / "logd")
            )
        bus = await exits.enter_async_context(client.connect(str(path), "test"))
        if containerd:
            context = await exits.enter_async_context(serve_containerd(path, directory))
        else:
            context = None
        try:
            yield Stack(path, bus, context, holders, directory)
        except Exception:
            traceback.print_exc()  # before it's wrapped in the groups of a dozen nurseries
            raise


def serve_containerd(path: Path, directory: Path) -> contextlib.AbstractAsyncContextManager[Context]:
    """containerd alone, so that a test may restart it."""
    return testing.serve(
        path,
        "containerd",
        pyx_containerd.api.setup,
        root=directory / "root" / "containerd",
        run=directory / "run" / "containerd",
    )


def leftovers(directory: Path, prefix: str) -> list[str]:
    """What the kernel still has of a stack: shims, mounts, cgroups, bundles."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                comm = Path(f"/proc/{entry}/comm").read_text().strip()
                place = os.readlink(f"/proc/{entry}/cwd")
            except OSError:
                continue
            if comm.startswith("pyx-s:") and place.startswith(str(directory)):
                found.append(f"shim {entry} in {place}")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4]
        if point.startswith(str(directory)):
            found.append(f"mount {point}")
    for root, directories, _ in os.walk("/sys/fs/cgroup"):
        if os.path.basename(root) == prefix:
            found.extend(f"cgroup {root}/{name}" for name in directories if name != "warm")
            directories.clear()
    bundles = directory / "run" / "containerd" / "bundles"
    if bundles.exists():
        found.extend(f"bundle {entry}" for entry in os.listdir(bundles))
    runtime = directory / "run" / "containerd" / "runtime"
    if runtime.exists():
        found.extend(f"runtime state {entry}" for place in runtime.iterdir() for entry in place.iterdir())
    return found


async def wait_nothing_left(directory: Path, prefix: str, within_s: float = 10) -> None:
    """The clean-up goes on after the replies; it must come to an end.

    Empty once is enough: the probe of the runtimes runs a container of its own meanwhile, so a second look could find that one.
    """
    deadline = trio.current_time() + within_s
    while found := leftovers(directory, prefix):
        assert trio.current_time() < deadline, found
        await trio.sleep(0.02)


def output_of(fd: int) -> bytes:
    """The payload of a multiplexed stream, read to its end."""
    with open(fd, "rb") as file:
        data = file.read()
    text = b""
    while data:
        size = int.from_bytes(data[4:8], "big")
        text += data[8 : 8 + size]
        data = data[8 + size :]
    return text


__all__ = ["Holders", "Message", "Stack", "leftovers", "output_of", "serve_containerd", "stack", "subprocess", "wait_nothing_left"]

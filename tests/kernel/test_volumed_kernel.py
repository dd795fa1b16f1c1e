"""What volumed does with real mounts, devices and capabilities, and when it's killed while it copies."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from pyx_bus import testing
from pyx_bus.client import Bus, connect
from pyx_bus.contract import volumed
from pyx_bus.contract.base import Retain
from pyx_bus.contract.volumed import MountRequest
from pyx_bus.errors import BusError, FailedPrecondition
from pyx_volumed import kernel
from pyx_volumed.__main__ import setup

pytestmark = pytest.mark.root

A, B = "a" * 64, "b" * 64
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep, as setcap writes it


def mounts_under(directory: Path) -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(directory) in line.split()[4]]


@asynccontextmanager
async def stack(directory: Path) -> AsyncIterator[tuple[Bus, Path]]:
    async with testing.broker(directory) as path:
        async with testing.serve(path, "volumed", setup) as context, connect(str(path), "test") as bus:
            yield bus, context.root / "volumes"
    assert mounts_under(directory) == []


async def attach(bus: Bus, container: str, name: str, image: Path | None = None, **options: str) -> str:
    request = MountRequest(type="volume", source=name, target="/srv", driver_options=options)
    fds = [os.open(image, os.O_PATH | os.O_DIRECTORY)] if image else []
    try:
        message = volumed.AttachVolumes(container_id=container, mounts=[request])
        return (await bus.call(volumed.ATTACH, message, fds=fds)).mounts[0].source
    finally:
        for fd in fds:
            os.close(fd)


async def detach(bus: Bus, container: str) -> None:
    await bus.call(volumed.DETACH, volumed.DetachVolumes(container_id=container))


async def test_a_mounted_volume_is_there_from_the_first_use_to_the_last(tmp_path: Path) -> None:
    image = tmp_path / "image"
    (image / "srv").mkdir(parents=True)
    (image / "srv" / "page").write_text("x")
    async with stack(tmp_path) as (bus, _):
        source = await attach(bus, A, "scratch", image, type="tmpfs", device="tmpfs", o="size=1m,noexec")
        assert os.statvfs(source).f_blocks * os.statvfs(source).f_frsize == 1 << 20
        assert os.statvfs(source).f_flag & os.ST_NOEXEC
        assert (Path(source) / "page").read_text() == "x"
        await attach(bus, B, "scratch")
        await detach(bus, A)
        assert kernel.is_mounted(source)
        await detach(bus, B)
        assert not kernel.is_mounted(source)
        await bus.call(volumed.REMOVE, volumed.RemoveVolume(name="scratch"))


async def test_removing_a_bind_volume_leaves_the_hosts_files(tmp_path: Path) -> None:
    host = tmp_path / "host"
    host.mkdir()
    (host / "precious").write_text("x")
    async with stack(tmp_path) as (bus, _):
        source = await attach(bus, A, "alias", type="none", device=str(host), o="bind,ro")
        assert (Path(source) / "precious").read_text() == "x"
        with pytest.raises(OSError, match="Read-only"):
            (Path(source) / "new").touch()
        await detach(bus, A)
        await bus.call(volumed.REMOVE, volumed.RemoveVolume(name="alias"))
    assert (host / "precious").exists()


async def test_a_mount_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async with stack(tmp_path) as (bus, volumes):
        with pytest.raises(FailedPrecondition, match='cannot mount volume "bad"'):
            await attach(bus, A, "bad", type="none", device=str(tmp_path / "missing"), o="bind")
        assert list(volumes.iterdir()) == []
        assert (await bus.call(volumed.LIST, volumed.ListVolumes())).volumes == []


async def test_devices_owners_and_capabilities_are_copied(tmp_path: Path) -> None:
    image = tmp_path / "image"
    srv = image / "srv"
    srv.mkdir(parents=True)
    os.mknod(srv / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (srv / "tool").write_bytes(b"x" * 100_000)
    os.chown(srv / "tool", 7, 8)
    os.setxattr(srv / "tool", "security.capability", CAPABILITY)
    async with stack(tmp_path) as (bus, _):
        data = Path(await attach(bus, A, "vol", image))
        info = (data / "null").lstat()
        assert stat.S_ISCHR(info.st_mode) and info.st_rdev == os.makedev(1, 3)
        assert ((data / "tool").stat().st_uid, (data / "tool").stat().st_gid) == (7, 8)
        assert os.getxattr(data / "tool", "security.capability") == CAPABILITY
        assert (data / "tool").read_bytes() == b"x" * 100_000


async def test_killed_while_it_copies_it_leaves_nothing_half_filled(tmp_path: Path) -> None:
    image = tmp_path / "image"
    names = [f"d{number % 40}/f{number}" for number in range(1500)]
    for name in names:
        path = image / "srv" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content " * 500)
    paths = {"PYX_ROOT": tmp_path / "root", "PYX_RUN": tmp_path / "run", "PYX_BUS": tmp_path / "bus.sock"}
    environment = {**os.environ, **{name: str(path) for name, path in paths.items()}}

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "pyx_volumed"], env=environment, stderr=subprocess.DEVNULL)

    async def ready(bus: Bus) -> list[volumed.Volume]:
        with trio.fail_after(15):
            while True:
                try:
                    return (await bus.call(volumed.LIST, volumed.ListVolumes(), timeout_s=2)).volumes
                except BusError:
                    await trio.sleep(0.02)

    async def copy(container: str, name: str) -> None:
        with suppress(BusError):
            await attach(bus, container, name, image)

    volumes = tmp_path / "root" / "volumed" / "volumes"
    async with testing.broker(tmp_path) as path, connect(str(path), "test") as bus:
        process = start()
        try:
            await ready(bus)
            await bus.call(volumed.CREATE, volumed.CreateVolume(name="old"))
            partial = 0
            for round_, (name, directories) in enumerate([("new", 1), ("old", 2), ("new", 20), ("old", 35)]):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(copy, f"{A[:-1]}{round_}", name)
                    with trio.fail_after(10):
                        while len(list(volumes.glob("*/.fill/*"))) < directories and not list(volumes.glob(f"{name}/_data/*")):
                            await trio.sleep(0.001)
                    process.kill()
                    await trio.to_thread.run_sync(process.wait)
                    nursery.cancel_scope.cancel()  # else it would be tried again
                partial += any(volumes.glob("*/.fill"))
                process = start()
                known = [volume.name for volume in await ready(bus)]
                assert sorted(directory.name for directory in volumes.iterdir() if not directory.name.startswith(".")) == sorted(known)
                for volume in known:
                    assert len(list((volumes / volume / "_data").glob("*/*"))) in (0, len(names))
            assert partial  # else this tested nothing
            await bus.call(volumed.RETAIN, Retain(container_ids=[], before_ns=2**62))
            source = await attach(bus, B, "old", image)
            assert len(list(Path(source).glob("*/*"))) == len(names)
        finally:
            process.send_signal(signal.SIGTERM)
            await trio.to_thread.run_sync(process.wait)

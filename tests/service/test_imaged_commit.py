"""commit and diff over a real broker: the image made, its config and history, its events, and what a failure or a kill leaves."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.imaged_changes import members
from tests.imaged_support import Imaged, imaged, tar_of, tree
from tests.service.test_imaged_lifecycle import retried, wait_for, workers_of

from pyx_bus import errors, testing
from pyx_bus.client import connect
from pyx_bus.contract import imaged as contract

BASE = tar_of(("etc", "d", None), ("etc/x", "f", "1"), ("gone", "f", "2"))
CONFIG = contract.ImageConfig(
    id="", reference="", user="me", env=["A=1"], entrypoint=["e"], cmd=["c"], working_dir="/w", volumes=["/v"],
    exposed_ports=["80/tcp"], labels={"l": "v"}, stop_signal="INT", shell=["/bin/ash", "-c"],
    healthcheck=contract.HealthCheck(test=["CMD", "true"], interval_ns=5_000_000_000),
)  # fmt: skip


async def commit(service: Imaged, container_id: str = "c", **fields: Any) -> contract.ImageID:
    request = contract.CommitSnapshot(container_id=container_id, **{"config": CONFIG, **fields})
    made: contract.ImageID = await service.finish(contract.COMMIT, request)
    return made


async def diff(service: Imaged, container_id: str = "c") -> list[str]:
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as reader:
        try:
            await service.bus.call(contract.DIFF, contract.DiffSnapshot(container_id=container_id), fds=[write_end])
        finally:
            os.close(write_end)
        return [line.decode() for line in reader.read().split(b"\0")[:-1]]


def change(writable: Path, *, overlay: bool) -> None:
    """What a container does to the base: through its mount an overlay would have it so."""
    (writable / "new").write_text("new")
    if overlay:
        os.mknod(writable / "gone", stat.S_IFCHR, 0)
    else:
        (writable / "gone").unlink()


@pytest.mark.parametrize("snapshotter", ["overlayfs", "copy"])
async def test_an_image_of_a_container(tmp_path: Path, snapshotter: str) -> None:
    async with imaged(tmp_path, snapshotter=snapshotter) as service:
        base = await service.import_bytes(BASE, "base", message="the base", platform="linux/arm64")
        snapshot = await service.prepare("c", "base")
        assert await diff(service) == []
        change(Path(snapshot.writable_path), overlay=snapshotter == "overlayfs")
        assert await diff(service) == ["D /gone", "A /new"]
        async with service.bus.events("image.>") as events:
            made = await commit(
                service, reference="made:1", author="A. U. Thor", message="why", changes=["ENV B=$A$A", "CMD d"], created_by="c"
            )
            seen = [await anext(events), await anext(events)]
        assert [(event.topic, event.payload.id, event.payload.attributes) for event in seen] == [
            ("image.create", made.id, {"name": "made:1", "l": "v"}), ("image.tag", made.id, {"name": "made:1", "l": "v"}),
        ]  # fmt: skip
        assert made.reference == "made:1" and [type(item) for item in service.progress] == [contract.SnapshotRead]
        document = await service.inspect("made:1")
        assert document["Id"] == made.id and document["Architecture"] == "arm64"
        assert (document["Author"], document["Comment"]) == ("A. U. Thor", "why")
        assert {key: value for key, value in document["Config"].items() if value} == {
            "User": "me", "Env": ["A=1", "B=11"], "Entrypoint": ["e"], "Cmd": ["/bin/ash", "-c", "d"], "WorkingDir": "/w",
            "Volumes": {"/v": {}}, "ExposedPorts": {"80/tcp": {}}, "Labels": {"l": "v"}, "StopSignal": "INT",
            "Healthcheck": {"Test": ["CMD", "true"], "Interval": 5_000_000_000}, "Shell": ["/bin/ash", "-c"],
        }  # fmt: skip
        below = (await service.inspect(base.id))["RootFS"]["Layers"]
        assert document["RootFS"]["Layers"][:-1] == below and len(document["RootFS"]["Layers"]) == 2
        assert await service.settled() == {"blobs/sha256": 4, "layers": 2, "snapshots": 1, "ingest": 0, "trash": 0}
        blobs = [path for path in (service.root / "blobs/sha256").iterdir() if path.read_bytes()[:2] == b"\x1f\x8b"]
        assert [list(members(blob)) for blob in blobs] == [[".wh.gone", "new"]]
        # another container sees it, and can be committed in turn
        second = await service.prepare("d", "made:1")
        if snapshotter == "copy":
            assert tree(second.writable_path) == {"etc": "dir", "etc/x": "1", "new": "new"}
        (Path(second.writable_path) / "more").write_text("more")
        again = await commit(service, "d")
        assert len((await service.inspect(again.id))["RootFS"]["Layers"]) == 3 and await service.names() == ["base:latest", "made:1"]
        # removed, it takes its own layer along only
        await service.bus.call(contract.REMOVE, contract.RemoveImage(reference=again.id))
        assert (await service.settled())["layers"] == 2


async def test_nothing_changed(tmp_path: Path) -> None:
    async with imaged(tmp_path) as service:
        base = await service.import_bytes(BASE, "base")
        await service.prepare("c", "base")
        made = await commit(service, reference="same")
        assert made.id != base.id
        assert (await service.inspect("same"))["RootFS"] == (await service.inspect("base"))["RootFS"]
        assert (await service.settled())["layers"] == 1
        # the same changes twice are one layer
        (service.root / "snapshots/c/fs/new").write_text("new")
        assert (await commit(service)).id != (await commit(service)).id
        assert (await service.settled())["layers"] == 2


async def test_refusals_leave_nothing(tmp_path: Path) -> None:
    async with imaged(tmp_path) as service:
        await service.import_bytes(BASE, "base")
        snapshot = await service.prepare("c", "base")
        (Path(snapshot.writable_path) / "new").write_text("new")
        before = await service.settled()
        for fields, error, message in (
            ({"container_id": "nosuch"}, errors.NotFound, "no snapshot"),
            ({"reference": "A B"}, errors.InvalidArgument, "invalid reference"),
            ({"reference": "a@sha256:" + "0" * 64}, errors.InvalidArgument, "cannot have a digest"),
            ({"changes": ["RUN x"]}, errors.InvalidArgument, "unknown instruction"),
        ):
            with pytest.raises(error, match=message):
                await commit(service, **fields)  # type: ignore[arg-type]
        with pytest.raises(errors.NotFound):
            await diff(service, "nosuch")
        with pytest.raises(errors.InvalidArgument, match="must bring one descriptor"):
            await service.bus.call(contract.DIFF, contract.DiffSnapshot(container_id="c"))
        assert await service.settled() == before and await service.names() == ["base:latest"]
    async with imaged(tmp_path, max_image_bytes=100_000) as service:
        (Path(snapshot.writable_path) / "big").write_bytes(os.urandom(200_000))
        with pytest.raises(errors.ResourceExhausted, match="200000 bytes"):
            await commit(service)
        assert await service.settled() == before


def make_it_last(writable: str) -> None:
    """A file that takes seconds to pack, and no room."""
    with open(f"{writable}/zeros", "wb") as file:
        file.truncate(8 << 30)


async def test_a_cancelled_commit_leaves_nothing(tmp_path: Path) -> None:
    async with imaged(tmp_path) as service:
        await service.import_bytes(BASE, "base")
        make_it_last((await service.prepare("c", "base")).writable_path)
        before = await service.settled()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(commit, service)
            await wait_for(lambda: workers_of(os.getpid()) and tree(service.root / "ingest"))
            nursery.cancel_scope.cancel()
        await wait_for(lambda: not workers_of(os.getpid()) and not service.kept()["ingest"])
        assert await service.settled() == before


async def test_a_container_removed_meanwhile(tmp_path: Path) -> None:
    async with imaged(tmp_path) as service:
        await service.import_bytes(BASE, "base")
        writable = (await service.prepare("c", "base")).writable_path
        with open(f"{writable}/zeros", "wb") as file:
            file.truncate(1 << 30)
        before = await service.settled()
        with pytest.raises(errors.FailedPrecondition, match="removed meanwhile"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(released_soon, service)
                try:
                    await commit(service)
                except errors.BusError as error:
                    failure = error
            raise failure
        assert await service.settled() == {**before, "snapshots": 0}


async def released_soon(service: Imaged) -> None:
    await wait_for(lambda: workers_of(os.getpid()) and tree(service.root / "ingest"))
    await service.bus.call(contract.RELEASE, contract.ReleaseSnapshot(container_id="c"))


async def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    async with imaged(tmp_path) as service:
        await service.import_bytes(BASE, "base")
        writable = Path((await service.prepare("c", "base")).writable_path)
        for number in range(3000):
            (writable / f"{number:0100}").touch()
        read_end, write_end = os.pipe()
        os.close(read_end)
        try:
            with pytest.raises(errors.Unavailable, match="reader went away"):
                await service.bus.call(contract.DIFF, contract.DiffSnapshot(container_id="c"), fds=[write_end])
        finally:
            os.close(write_end)
        assert not workers_of(os.getpid())


async def test_a_kill_in_the_middle(tmp_path: Path) -> None:
    """imaged as a process of its own, killed while its worker packs: the worker ends, the next start finds what was there before."""
    environment = {
        **os.environ, "PYX_ROOT": str(tmp_path / "root"), "PYX_RUN": str(tmp_path / "run"), "PYX_BUS": str(tmp_path / "bus.sock"),
        "PYX_CONFIG": str(tmp_path / "none.toml"),
    }  # fmt: skip
    (tmp_path / "none.toml").write_text("")

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "pyx_imaged"], env=environment)

    async with testing.broker(tmp_path) as path, connect(str(path)) as bus:
        service = Imaged(bus, tmp_path / "root" / "imaged")
        process = start()
        try:
            await wait_for(lambda: (service.root / "imaged.sqlite").exists())
            await retried(service, BASE, "base")
            writable = (await service.prepare("c", "base")).writable_path
            make_it_last(writable)
            before = await service.settled()
            async with trio.open_nursery() as nursery:

                async def fails() -> None:
                    with pytest.raises(errors.Unavailable):
                        await commit(service)

                nursery.start_soon(fails)
                await wait_for(lambda: workers_of(process.pid) and tree(service.root / "ingest"))
                (worker,) = workers_of(process.pid)
                process.send_signal(signal.SIGKILL)
                process.wait()
            await wait_for(lambda: not Path(f"/proc/{worker}/exe").exists())
            assert service.kept()["ingest"]
            process = start()
            with trio.fail_after(10):
                while True:
                    try:
                        assert await service.names() == ["base:latest"]
                        break
                    except errors.Unavailable:
                        await trio.sleep(0.02)
            assert await service.settled() == before
            os.unlink(f"{writable}/zeros")
            (Path(writable) / "new").touch()
            assert await diff(service) == ["A /new"]
            await commit(service, reference="made")
        finally:
            process.send_signal(signal.SIGTERM)
            assert await trio.to_thread.run_sync(process.wait) == 0

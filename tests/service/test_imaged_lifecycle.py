"""imaged over a real broker: import, names, filters, snapshots, events, cancellation, and what's left after a kill -9."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio
from tests import images
from tests.imaged_support import Imaged, imaged, tar_of, tree

from pyx_bus import errors, testing
from pyx_bus.client import connect
from pyx_bus.contract import imaged as contract
from pyx_bus.contract.base import Retain
from pyx_imaged.api import setup

SMALL = tar_of(("etc", "d", None), ("etc/x", "f", "1"))


async def test_import_with_changes(tmp_path: Path) -> None:
    async with imaged(tmp_path) as service:
        changes = [
            'CMD ["sh", "-c", "true"]', "ENTRYPOINT echo hi", "ENV A=1 B='two words'", "env A 3", "EXPOSE 80 53/udp", "LABEL l=v",
            "USER www", "VOLUME /data", "WORKDIR /a", "WORKDIR b", "STOPSIGNAL SIGINT",
        ]  # fmt: skip
        made = await service.import_bytes(gzip.compress(SMALL), "x:1", changes=changes, message="why", platform="linux/arm64")
        config = await service.bus.call(contract.RESOLVE, contract.ResolveImage(reference="x:1"))
        assert config == contract.ImageConfig(
            id=made.id, reference="x:1", architecture="arm64", os="linux", user="www", env=["A=3", "B=two words"],
            entrypoint=["/bin/sh", "-c", "echo hi"], cmd=["sh", "-c", "true"], working_dir="/a/b", volumes=["/data"],
            exposed_ports=["53/udp", "80/tcp"], labels={"l": "v"}, stop_signal="SIGINT",
        )  # fmt: skip
        document = await service.inspect("x:1")
        assert document["Comment"] == "why" and document["Config"]["ExposedPorts"] == {"53/udp": {}, "80/tcp": {}}  # type: ignore[index]


async def test_names(tmp_path: Path) -> None:
    async with imaged(tmp_path) as service:
        bus = service.bus
        first = await service.import_bytes(SMALL, "a")
        second = await service.import_bytes(tar_of(("y", "f", "")), "b:2", changes=["LABEL color=red"])
        unnamed = await service.import_bytes(tar_of(("z", "f", "")))
        assert await service.names() == ["a:latest", "b:2"]
        await bus.call(contract.TAG, contract.TagImage(source=second.id[7:19], target="localhost/c/d"))
        await bus.call(contract.TAG, contract.TagImage(source="b:2", target="a"))
        assert await service.names() == ["a:latest", "b:2", "localhost/c/d:latest"]
        for reference in ("a", "docker.io/library/a", "index.docker.io/library/a:latest", second.id, second.id[7:]):
            assert (await bus.call(contract.RESOLVE, contract.ResolveImage(reference=reference))).id == second.id

        async def listed(**filters: list[str]) -> set[str]:
            found = await bus.call(contract.LIST, contract.ListImages(filters=filters))
            return {image.id for image in found.images}

        assert await listed() == {first.id, second.id, unnamed.id}
        assert await listed(dangling=["true"]) == {first.id, unnamed.id}
        assert await listed(dangling=["0"], label=["color=red"]) == {second.id}
        assert await listed(reference=["localhost/*/d"]) == {second.id} and await listed(reference=["*/d"]) == set()
        assert await listed(since=[first.id]) == {second.id, unnamed.id} and await listed(before=["b:2"]) == {first.id}
        with pytest.raises(errors.InvalidArgument, match='invalid filter: "nosuch"'):
            await listed(nosuch=["1"])
        for reference in ("nosuch", "a:nosuch", "f" * 64, f"a@sha256:{'0' * 64}"):
            with pytest.raises(errors.NotFound, match="no such image"):
                await service.prepare("c", reference)
        for reference in ("", "A/B/", "a:b:c", "-x", "a@sha256:1"):
            with pytest.raises((errors.InvalidArgument, errors.NotFound)):
                await bus.call(contract.RESOLVE, contract.ResolveImage(reference=reference))


async def test_snapshots(tmp_path: Path) -> None:
    async with imaged(tmp_path) as service:
        bus = service.bus
        image = await service.import_bytes(SMALL, "a")
        await service.import_bytes(tar_of(("y", "f", "")), "b")
        snapshot = await service.prepare("c1", "a")
        (Path(snapshot.writable_path) / "mine").write_text("1")
        assert await service.prepare("c1", "a") == snapshot
        assert (await service.prepare("c1", image.id)).mounts == snapshot.mounts
        with pytest.raises(errors.FailedPrecondition, match="snapshot of another image"):
            await service.prepare("c1", "b")
        # the name moves on, the container keeps its image
        await bus.call(contract.TAG, contract.TagImage(source="b", target="a"))
        assert (await service.prepare("c1", "a")).image.id == image.id
        assert (Path(snapshot.writable_path) / "mine").read_text() == "1"
        with pytest.raises(errors.Conflict, match="used by container c1"):
            await bus.call(contract.REMOVE, contract.RemoveImage(reference=image.id))
        for bad in ("../x", "", ".hidden", "a/b", "x" * 200):
            with pytest.raises(errors.InvalidArgument, match="invalid container ID"):
                await service.prepare(bad, "a")
        middle = time.time_ns()
        await service.prepare("c2", "a")
        await service.prepare("c3", "a")
        released = await bus.call(contract.RETAIN, Retain(container_ids=["c3"], before_ns=middle))
        assert released.container_ids == ["c1"]  # c2 is younger than the list
        released = await bus.call(contract.RETAIN, Retain(container_ids=["c3"], before_ns=time.time_ns()))
        assert released.container_ids == ["c2"]
        for _ in range(2):
            await bus.call(contract.RELEASE, contract.ReleaseSnapshot(container_id="c3"))
        assert (await service.settled())["snapshots"] == 0


async def test_plain_copies_where_configured(tmp_path: Path) -> None:
    async with imaged(tmp_path, snapshotter="copy") as service:
        await service.import_bytes(SMALL, "a")
        snapshot = await service.prepare("c1", "a")
        assert snapshot.snapshotter == "copy" and [mount.type for mount in snapshot.mounts] == ["bind"]
        assert tree(snapshot.mounts[0].source) == {"etc": "dir", "etc/x": "1"}
    async with imaged(tmp_path) as service:  # the configuration changed: what's there stays what it is
        assert await service.prepare("c1", "a") == snapshot
        assert (await service.prepare("c2", "a")).snapshotter == "overlayfs"


async def test_bad_configuration(tmp_path: Path) -> None:
    for config, message in (({"snapshotter": "zfs"}, "unknown snapshotter"), ({"nosuch": 1}, "invalid configuration")):
        with pytest.raises(BaseExceptionGroup) as caught:
            async with imaged(tmp_path, **config):
                pass
        assert message in str(_only(caught.value))


def _only(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def test_events(tmp_path: Path) -> None:
    async with imaged(tmp_path) as service, service.bus.events("image.>") as events:
        image = await service.import_bytes(SMALL, "a", changes=["LABEL tier=web name=hidden", "ENV SECRET=x"])
        await service.bus.call(contract.TAG, contract.TagImage(source="a", target="b"))
        await service.bus.call(contract.REMOVE, contract.RemoveImage(reference="b"))
        await service.bus.call(contract.REMOVE, contract.RemoveImage(reference="a"))
        seen = []
        with trio.fail_after(5):
            async for event in events:
                assert event.payload.id == image.id
                assert event.payload.attributes["tier"] == "web" and "SECRET" not in repr(event.payload)
                seen.append((event.topic, event.payload.attributes["name"]))
                if event.topic == "image.delete":
                    break
        assert seen == [
            ("image.import", "a:latest"), ("image.tag", "b:latest"), ("image.untag", "b:latest"), ("image.untag", "a:latest"),
            ("image.delete", image.id),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty or too short"),
        (b"garbage" * 500, "not a tar archive"),
        (SMALL[:700], "truncated"),
        (SMALL[:1536], "truncated"),
        (gzip.compress(SMALL)[:-20], "truncated gzip"),
        (tar_of(("../x", "f", "evil")), 'contains ".."'),
        (tar_of(("/etc/x", "f", "evil")), "absolute path"),
        (tar_of(("d", "s", "../.."), ("d/x", "f", "evil")), "leaves the root through a link"),
    ],
)
async def test_a_bad_import_leaves_nothing(tmp_path: Path, data: bytes, message: str) -> None:
    async with imaged(tmp_path) as service:
        with pytest.raises(errors.InvalidArgument, match=message):
            await service.import_bytes(data, "bad")
        assert set((await service.settled()).values()) == {0}
        assert await service.names() == []
        assert (await service.import_bytes(SMALL, "good")).reference == "good:latest"


async def test_requests_without_their_descriptor(tmp_path: Path) -> None:
    async with imaged(tmp_path) as service:
        for method, request in ((contract.IMPORT, contract.ImportImage()), (contract.LOAD, contract.LoadImages())):
            with pytest.raises(errors.InvalidArgument, match="must bring one descriptor"):
                await service.finish(method, request) if method.item else await service.bus.call(method, request)


async def test_a_bomb_meets_the_limit(tmp_path: Path) -> None:
    bomb = gzip.compress(tar_of(("zeros", "f", bytes(60_000_000))))
    async with imaged(tmp_path, max_image_bytes=5_000_000) as service:
        with pytest.raises(errors.ResourceExhausted, match="more than 5000000 bytes"):
            await service.import_bytes(bomb, "bomb")
        assert set((await service.settled()).values()) == {0}


def workers_of(pid: int) -> list[int]:
    """The unpacking workers among a process's children."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"pyx_imaged.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


async def wait_for(condition: object, seconds: float = 10) -> None:
    with trio.fail_after(seconds):
        while not condition():  # type: ignore[operator]
            await trio.sleep(0.01)


async def half_an_import(service: Imaged, write_end: int, read_end: int) -> None:
    os.write(write_end, SMALL[:1024])
    await service.bus.call(contract.IMPORT, contract.ImportImage(reference="half"), fds=[read_end])


async def test_a_cancelled_import_leaves_nothing(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    async with imaged(tmp_path) as service:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(half_an_import, service, write_end, read_end)
            await wait_for(lambda: workers_of(os.getpid()) and tree(service.root / "ingest"))
            nursery.cancel_scope.cancel()
        await wait_for(lambda: not workers_of(os.getpid()))
        await wait_for(lambda: not service.kept()["ingest"])
        assert set((await service.settled()).values()) == {0}
    os.close(read_end)
    os.close(write_end)


async def test_after_a_kill_nothing_half_made_remains(tmp_path: Path) -> None:
    """imaged as a process of its own, killed in the middle of an import: its worker ends too, the next start clears up."""
    environment = {
        **os.environ, "PYX_ROOT": str(tmp_path / "root"), "PYX_RUN": str(tmp_path / "run"), "PYX_BUS": str(tmp_path / "bus.sock"),
        "PYX_CONFIG": str(tmp_path / "none.toml"),
    }  # fmt: skip
    (tmp_path / "none.toml").write_text("")
    read_end, write_end = os.pipe()

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "pyx_imaged"], env=environment)

    async with testing.broker(tmp_path) as path, connect(str(path)) as bus:
        service = Imaged(bus, tmp_path / "root" / "imaged")
        process = start()
        try:
            await wait_for(lambda: (service.root / "imaged.sqlite").exists())
            kept = await retried(service, SMALL, "kept")
            await service.prepare("c1", "kept")
            async with trio.open_nursery() as nursery:

                async def fails() -> None:
                    with pytest.raises(errors.Unavailable):
                        await half_an_import(service, write_end, read_end)

                nursery.start_soon(fails)
                await wait_for(lambda: workers_of(process.pid) and tree(service.root / "ingest"))
                (worker,) = workers_of(process.pid)
                process.send_signal(signal.SIGKILL)
                process.wait()
            await wait_for(lambda: not Path(f"/proc/{worker}").exists() or _zombie(worker))
            (service.root / "layers" / "99").mkdir()  # what a crash between rename and row leaves
            (service.root / "blobs/sha256" / ("e" * 64)).touch()
            (service.root / "snapshots" / "broken").mkdir()
            process = start()
            with trio.fail_after(10):
                while True:
                    try:
                        assert (await service.inspect("kept"))["Id"] == kept.id
                        break
                    except errors.Unavailable:
                        await trio.sleep(0.02)
            assert await service.settled() == {"blobs/sha256": 2, "layers": 1, "snapshots": 1, "ingest": 0, "trash": 0}
            assert (await service.prepare("c1", "kept")).image.id == kept.id
            assert await service.names() == ["kept:latest"]
        finally:
            process.send_signal(signal.SIGTERM)
            assert await trio.to_thread.run_sync(process.wait) == 0
    os.close(read_end)
    os.close(write_end)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def retried(service: Imaged, data: bytes, name: str) -> contract.ImageID:
    with trio.fail_after(10):
        while True:
            try:
                return await service.import_bytes(data, name)
            except errors.Unavailable:
                await trio.sleep(0.02)


async def test_the_same_layer_twice_at_once(tmp_path: Path) -> None:
    tar = images.busybox_tar(tmp_path / "bb.tar").read_bytes()
    async with imaged(tmp_path / "i") as service:
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(service.import_bytes, tar, f"x:{number}")
        assert len(await service.names()) == 4
        assert await service.settled() == {"blobs/sha256": 5, "layers": 1, "snapshots": 0, "ingest": 0, "trash": 0}
        for number in range(4):
            await service.bus.call(contract.REMOVE, contract.RemoveImage(reference=f"x:{number}"))
        assert set((await service.settled()).values()) == {0}


async def test_two_on_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyx_imaged.api._LOCK_WAIT_S", 0.1)
    async with imaged(tmp_path) as service:
        await service.import_bytes(SMALL, "a")
        (tmp_path / "other").mkdir()
        with pytest.raises(BaseExceptionGroup) as caught:
            async with (
                testing.broker(tmp_path / "other") as path,
                testing.serve(path, "imaged", setup, root=service.root, run=tmp_path / "other/run"),
            ):
                pass
        assert "another imaged works on" in str(_only(caught.value))
        assert (await service.prepare("c", "a")).image.reference == "a:latest"

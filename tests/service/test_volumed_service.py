"""volumed over a real bus, on real directories."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from pyx_bus import testing
from pyx_bus.client import Bus, connect
from pyx_bus.contract import volumed
from pyx_bus.contract.base import Retain
from pyx_bus.contract.volumed import MountPoint, MountRequest
from pyx_bus.errors import Conflict, InvalidArgument, NotFound, Unimplemented
from pyx_volumed.__main__ import setup

A, B = "a" * 64, "b" * 64


@dataclass
class Stack:
    bus: Bus
    root: Path

    async def attach(self, container: str, *mounts: MountRequest, image: Path | None = None) -> list[MountPoint]:
        fds = [os.open(image, os.O_RDONLY | os.O_DIRECTORY)] if image else []
        try:
            request = volumed.AttachVolumes(container_id=container, mounts=list(mounts))
            return (await self.bus.call(volumed.ATTACH, request, fds=fds)).mounts
        finally:
            for fd in fds:
                os.close(fd)

    async def detach(self, container: str, anonymous: bool = False) -> None:
        await self.bus.call(volumed.DETACH, volumed.DetachVolumes(container_id=container, remove_anonymous=anonymous))

    async def names(self, **filters: list[str]) -> list[str]:
        return [v.name for v in (await self.bus.call(volumed.LIST, volumed.ListVolumes(filters=filters))).volumes]

    def on_disk(self) -> list[str]:
        return sorted(p.name for p in (self.root / "volumes").iterdir())

    def data(self, name: str) -> Path:
        return self.root / "volumes" / name / "_data"


@asynccontextmanager
async def stack(directory: Path) -> AsyncIterator[Stack]:
    async with testing.broker(directory) as path:
        async with testing.serve(path, "volumed", setup) as context, connect(str(path), "test") as bus:
            yield Stack(bus, context.root)


def volume(target: str, source: str = "", **more: object) -> MountRequest:
    return MountRequest(type="volume", target=target, source=source, **more)  # type: ignore[arg-type]


def make_image(directory: Path) -> Path:
    image = directory / "image"
    www = image / "srv" / "www"
    www.mkdir(parents=True)
    (www / "index.html").write_text("<h1>")
    (www / "bin").mkdir(mode=0o700)
    (www / "bin" / "run").write_bytes(b"\x7fELF")
    (www / "bin" / "run").chmod(0o4755)
    os.link(www / "index.html", www / "bin" / "hard")
    (www / "link").symlink_to("/etc/passwd")
    os.mkfifo(www / "fifo", 0o640)
    with open(www / "sparse", "wb") as sparse:
        sparse.truncate(1 << 20)
        sparse.seek(1 << 19)
        sparse.write(b"x")
    os.setxattr(www / "index.html", "user.kind", b"page")
    os.chown(www, 101, 102)
    os.chmod(www, 0o2750)
    (image / "outside").symlink_to("/")
    (image / "www").symlink_to("/srv/../../srv/www")
    return image


async def test_named_volume_lives_until_it_is_removed(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        async with s.bus.events("volume.>") as events:
            mounts = await s.attach(A, volume("/data/", "data"))
            assert mounts == [
                MountPoint(type="bind", source=str(s.data("data")), target="/data", options=["rbind", "rprivate", "rw"],
                           kind="volume", name="data", driver="local")
            ]
            assert await s.attach(A, volume("/data", "data")) == mounts
            (s.data("data") / "file").write_text("kept")
            with pytest.raises(Conflict, match="in use by container aaaaaaaaaaaa"):
                await s.bus.call(volumed.REMOVE, volumed.RemoveVolume(name="data"))
            await s.attach(B, volume("/x", "data", read_only=True))
            await s.detach(A, anonymous=True)
            await s.detach(A)
            await s.detach(B)
            assert (s.data("data") / "file").read_text() == "kept"
            await s.bus.call(volumed.REMOVE, volumed.RemoveVolume(name="data"))
            assert await s.names() == []
            assert s.on_disk() == []
            topics, told = [], []
            with trio.fail_after(5):
                async for event in events:
                    topics.append(event.topic)
                    told.append(event.payload.attributes)
                    if event.topic == "volume.destroy":
                        break
        assert topics == [f"volume.{x}" for x in ("create", "mount", "mount", "unmount", "unmount", "destroy")]
        first = {"driver": "local", "container": A, "destination": "/data"}
        second = {"driver": "local", "container": B, "destination": "/x"}
        assert told == [
            {"driver": "local"},
            {**first, "propagation": "", "read/write": "true"},
            {**second, "propagation": "", "read/write": "false"},
            first, second, {"driver": "local"},
        ]  # fmt: skip
        with pytest.raises(NotFound, match='no such volume: "data"'):
            await s.bus.call(volumed.REMOVE, volumed.RemoveVolume(name="data"))
        await s.bus.call(volumed.REMOVE, volumed.RemoveVolume(name="data", force=True))


async def test_anonymous_volumes_go_with_their_container(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        first = await s.attach(A, volume("/a"), volume("/b"))
        assert await s.attach(A, volume("/a"), volume("/b")) == first  # the same ones again
        assert len({m.name for m in first}) == 2 and all(len(m.name) == 64 for m in first)
        await s.attach(B, volume("/shared", first[0].name))
        await s.detach(A, anonymous=True)
        assert await s.names() == [first[0].name]
        await s.detach(B)
        assert await s.names(dangling=["true"]) == [first[0].name]
        assert await s.names(label=["com.docker.volume.anonymous"]) == [first[0].name]


async def test_a_new_volume_is_filled_from_the_image(tmp_path: Path) -> None:
    image = make_image(tmp_path)
    async with stack(tmp_path) as s:
        for name, target in (("plain", "/srv/www"), ("through-links", "/www")):
            await s.attach(A, volume(target, name), image=image)
            data = s.data(name)
            assert (data / "index.html").read_text() == "<h1>"
            assert os.getxattr(data / "index.html", "user.kind") == b"page"
            assert (data / "index.html").stat().st_ino == (data / "bin" / "hard").stat().st_ino
            assert stat.S_IMODE((data / "bin" / "run").stat().st_mode) == 0o4755
            assert stat.S_IMODE((data / "bin").stat().st_mode) == 0o700
            assert os.readlink(data / "link") == "/etc/passwd"
            assert stat.S_ISFIFO((data / "fifo").lstat().st_mode)
            assert (data / "sparse").read_bytes() == (image / "srv/www/sparse").read_bytes()
            assert (data / "sparse").stat().st_blocks * 512 < 1 << 19
            info = data.stat()
            assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (101, 102, 0o2750)
            assert sorted(p.name for p in data.parent.iterdir()) == ["_data"]
            await s.detach(A)
        await s.attach(A, volume("/srv/www", "empty", no_copy=True), image=image)
        assert list(s.data("empty").iterdir()) == []
        await s.attach(B, volume("/srv/www", "empty"), image=image)  # empty still: filled, though it's in use
        assert (s.data("empty") / "index.html").exists()
        (s.data("plain") / "index.html").write_text("changed")
        await s.attach(B, volume("/srv/www", "plain"), image=image)
        assert (s.data("plain") / "index.html").read_text() == "changed"


async def test_nothing_of_the_host_gets_into_a_volume(tmp_path: Path) -> None:
    image = make_image(tmp_path)
    async with stack(tmp_path) as s:
        await s.attach(A, volume("/outside/etc", "vv"), image=image)  # the image's own /etc, which isn't there
        assert list(s.data("vv").iterdir()) == []
        await s.attach(B, volume("/outside/proc/self/root", "ww"), image=image)
        assert list(s.data("ww").iterdir()) == []


async def test_binds(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        source = tmp_path / "src"
        bind = MountRequest(type="bind", source=f"{tmp_path}/x/../src", target="/in/../in")
        with pytest.raises(NotFound, match=f'bind source path does not exist: "{source}"'):
            await s.attach(A, bind)
        made = MountRequest(type="bind", source=str(source), target="/in", create_source=True, read_only=True, propagation="rslave")
        assert await s.attach(A, made) == [
            MountPoint(type="bind", source=str(source), target="/in", options=["rbind", "rslave", "ro"], kind="bind", read_only=True,
                       propagation="rslave")
        ]
        assert source.is_dir()
        assert (await s.attach(A, bind))[0].options == ["rbind", "rprivate", "rw"]


async def test_tmpfs(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        request = MountRequest(type="tmpfs", target="/t", tmpfs_size_bytes=1 << 20, tmpfs_mode=0o755, tmpfs_options=["exec", "uid=5"])
        (mount,) = await s.attach(A, request)
        assert (mount.type, mount.source, mount.kind) == ("tmpfs", "tmpfs", "tmpfs")
        assert mount.options == ["nosuid", "nodev", "rw", "size=1048576", "mode=755", "exec", "uid=5"]


@pytest.mark.parametrize(
    ("mounts", "error", "text"),
    [
        ([volume("/a", "x1"), volume("//a/.", "x2")], InvalidArgument, 'duplicate mount point: "/a"'),
        ([volume("a", "x1")], InvalidArgument, "absolute"),
        ([volume("/..", "x1")], InvalidArgument, "root directory"),
        ([volume("/a", "../etc")], InvalidArgument, "invalid characters"),
        ([volume("/a", "x")], InvalidArgument, "too short"),
        ([volume("/a", "y" * 256)], InvalidArgument, "too long"),
        ([volume("/ok", "good"), volume("/a", "v1", driver="nfs")], NotFound, 'volume driver "nfs" not found'),
        ([volume("/ok", "good"), MountRequest(type="bind", source="/no/such", target="/b")], NotFound, "does not exist"),
        ([MountRequest(type="bind", source="rel", target="/b")], InvalidArgument, "absolute"),
        ([MountRequest(type="bind", source="/", target="/b", propagation="up")], InvalidArgument, "propagation"),
        ([MountRequest(type="tmpfs", target="/b", tmpfs_options=["size"])], InvalidArgument, "tmpfs option"),
        ([MountRequest(type="npipe", target="/b")], InvalidArgument, "mount type unknown"),
        ([volume("/a", "v1", driver_options={"size": "1g"})], Unimplemented, "quota"),
        ([volume("/a", "v1", driver_options={"colour": "red"})], InvalidArgument, "colour"),
    ],
)
async def test_a_failed_attach_leaves_nothing(tmp_path: Path, mounts: list[MountRequest], error: type[Exception], text: str) -> None:
    async with stack(tmp_path) as s:
        with pytest.raises(error, match=text.replace("/..", "")):
            await s.attach(A, *mounts)
        assert await s.names() == []
        assert s.on_disk() == []


async def test_create_inspect_and_filters(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        made = await s.bus.call(volumed.CREATE, volumed.CreateVolume(name="one", labels={"tier": "db"}))
        assert await s.bus.call(volumed.CREATE, volumed.CreateVolume(name="one")) == made
        with pytest.raises(Conflict):
            await s.bus.call(volumed.CREATE, volumed.CreateVolume(name="one", driver_options={"type": "tmpfs", "device": "tmpfs"}))
        anonymous = await s.bus.call(volumed.CREATE, volumed.CreateVolume())
        assert len(anonymous.name) == 64 and anonymous.anonymous
        document = (await s.bus.call(volumed.INSPECT, volumed.VolumeRef(name="one"))).document
        assert list(document) == ["CreatedAt", "Driver", "Labels", "Mountpoint", "Name", "Options", "Scope"]
        assert document["Labels"] == {"tier": "db"} and document["Mountpoint"] == str(s.data("one"))
        assert await s.names(name=["on"], label=["tier=db"], driver=["local"], dangling=["1"]) == ["one"]
        assert await s.names(label=["tier=web"]) == []
        with pytest.raises(InvalidArgument, match='invalid filter "size"'):
            await s.names(size=["1"])


async def test_retain_releases_the_rest_but_keeps_data(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        await s.attach(A, volume("/d", "data"))
        await s.attach(B, volume("/d", "data"), volume("/anonymous"))
        assert (await s.bus.call(volumed.RETAIN, Retain(container_ids=[A], before_ns=1))).container_ids == []
        assert (await s.bus.call(volumed.RETAIN, Retain(container_ids=[A], before_ns=2**62))).container_ids == [B]
        assert len(await s.names()) == 2
        (data,) = [v for v in (await s.bus.call(volumed.LIST, volumed.ListVolumes())).volumes if v.name == "data"]
        assert data.references == 1


async def test_state_survives_a_restart_and_half_made_things_do_not(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        await s.attach(A, volume("/d", "data"))
        (s.data("data") / "f").write_text("x")
        root = s.root
    volumes = root / "volumes"
    (volumes / "data" / ".fill").mkdir()
    (volumes / "data" / ".fill" / "half").touch()
    (volumes / "half" / "_data").mkdir(parents=True)
    (volumes / "half" / "_data" / "part").touch()
    (volumes / "half" / ".unsettled").touch()
    (volumes / ".trash-1" / "_data").mkdir(parents=True)
    (volumes / "found" / "_data").mkdir(parents=True)
    (volumes / "found" / ".ready").mkdir()
    (volumes / "found" / ".ready" / "rest").write_text("moved")
    (tmp_path / "bus.sock").unlink(missing_ok=True)
    async with stack(tmp_path) as s:
        assert s.on_disk() == ["data", "found"]
        assert await s.names() == ["data", "found"]
        assert (s.data("found") / "rest").read_text() == "moved"
        assert [p.name for p in (volumes / "data").iterdir()] == ["_data"]
        assert (s.data("data") / "f").read_text() == "x"
        with pytest.raises(Conflict):
            await s.bus.call(volumed.REMOVE, volumed.RemoveVolume(name="data"))
        await s.detach(A)
        await s.bus.call(volumed.REMOVE, volumed.RemoveVolume(name="data"))

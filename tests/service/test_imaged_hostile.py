"""Input made to hurt: configs that can't be shown, names that lie, bombs of headers and names, trees without a bottom; and races."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import resource
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from tests.imaged_support import imaged, tar_of

import pyx_imaged.store
from pyx_bus import errors
from pyx_bus.contract import imaged as contract
from pyx_imaged.disk import Disk

LAYER = tar_of(("etc", "d", None), ("etc/one", "f", "1"))


def docker_archive(config: dict[str, Any], *tags: str) -> bytes:
    diff_id = "sha256:" + hashlib.sha256(LAYER).hexdigest()
    data = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": [diff_id]}, **config}).encode()
    name = hashlib.sha256(data).hexdigest() + ".json"
    manifest = [{"Config": name, "RepoTags": list(tags), "Layers": ["layer.tar"]}]
    return tar_of((name, "f", data), ("layer.tar", "f", LAYER), ("manifest.json", "f", json.dumps(manifest)))


@pytest.mark.parametrize(
    "config", [{"config": {"Labels": {"a": "\ud800"}}}, {"config": {"Healthcheck": {"Test": ["x"], "Interval": 10**30}}}]
)
async def test_a_config_that_no_answer_could_carry(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "a.tar").write_bytes(docker_archive(config, "bad:1"))
    async with imaged(tmp_path / "i") as service:
        with pytest.raises(errors.InvalidArgument, match="half a character, or a number beyond 64 bits"):
            await service.load(tmp_path / "a.tar")
        assert await service.names() == []


@pytest.mark.parametrize("created", ["2024-13-01T00:00:00Z", "9999-12-31T00:00:00Z", "0000-01-01T00:00:00Z", 7])
async def test_an_impossible_date_spoils_no_list(tmp_path: Path, created: object) -> None:
    (tmp_path / "a.tar").write_bytes(docker_archive({"created": created}, "odd:1"))
    async with imaged(tmp_path / "i") as service:
        await service.load(tmp_path / "a.tar")
        listed = await service.bus.call(contract.LIST, contract.ListImages())
        assert [image.created_ns for image in listed.images] == [0]


async def test_an_archive_cannot_forge_a_pinned_name(tmp_path: Path) -> None:
    pinned = "debian@sha256:" + "0" * 64
    (tmp_path / "a.tar").write_bytes(docker_archive({}, pinned))
    async with imaged(tmp_path / "i") as service:
        with pytest.raises(errors.InvalidArgument, match="invalid tag"):
            await service.load(tmp_path / "a.tar")
        with pytest.raises(errors.NotFound):
            await service.inspect(pinned)


def _header(kind: bytes, data: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(data)
    return info.tobuf() + data + bytes(-len(data) % 512)


async def test_global_headers_do_not_pile_up(tmp_path: Path) -> None:
    def records(number: int) -> bytes:
        return b"".join(b"15 %04d%04d=xx\n" % (number, i) for i in range(10_000))

    bomb = b"".join(_header(b"g", records(number)) for number in range(12))
    async with imaged(tmp_path / "i") as service:
        with pytest.raises(errors.InvalidArgument, match="global headers"):
            await service.import_bytes(gzip.compress(bomb + LAYER))
        same = b"".join(_header(b"g", records(0)) for _ in range(12))
        await service.import_bytes(gzip.compress(same + LAYER))


async def test_names_do_not_pile_up(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(20):
            tar.addfile(tarfile.TarInfo(f"{number}" + "x" * 1_000_000))
    (tmp_path / "a.tar").write_bytes(gzip.compress(out.getvalue(), 1))
    async with imaged(tmp_path / "i") as service:
        with pytest.raises(errors.ResourceExhausted, match="bytes of names"):
            await service.load(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"pax_headers": {"SCHILY.xattr.user.a\0b": "x"}}, "extended attribute"),
        ({"pax_headers": {"SCHILY.xattr.user." + "a" * 300: "x"}}, "extended attribute"),
        ({"type": tarfile.CHRTYPE, "devmajor": 2**31, "devminor": 0}, "device"),
    ],
)
async def test_what_system_calls_would_choke_on(tmp_path: Path, member: dict[str, Any], message: str) -> None:
    out = io.BytesIO()
    form = tarfile.GNU_FORMAT if "devmajor" in member else tarfile.PAX_FORMAT
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        info = tarfile.TarInfo("x")
        for key, value in member.items():
            setattr(info, key, value)
        tar.addfile(info)
    async with imaged(tmp_path / "i") as service:
        with pytest.raises(errors.InvalidArgument, match=message):
            await service.import_bytes(out.getvalue())


def test_a_tree_without_a_bottom_is_deleted(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    top = disk.ingest_directory()
    here = os.open(top, os.O_RDONLY)
    for _ in range(1500):  # deeper than Python's stack
        os.mkdir("a", dir_fd=here)
        os.close(os.open("file", os.O_CREAT, dir_fd=here))
        below = os.open("a", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    disk.discard(top)
    descriptors = len(os.listdir("/proc/self/fd"))
    assert disk.empty_trash() == [] and os.listdir(tmp_path / "trash") == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_an_image_pulled_while_it_is_removed_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The removal waits for the store; what it removes is decided then, and memory and disk agree."""
    go, begun = threading.Event(), threading.Event()
    put_image = pyx_imaged.store.Store.put_image

    def slowly(self: Any, *args: Any) -> None:
        put_image(self, *args)
        begun.set()
        assert go.wait(10)

    async with imaged(tmp_path / "i") as service:
        await service.import_bytes(LAYER, "x:1")
        (tmp_path / "a.tar").write_bytes(docker_archive({}, "y:1"))
        removed: list[contract.RemovedImage] = []

        async def remove() -> None:
            removed.append(await service.bus.call(contract.REMOVE, contract.RemoveImage(reference="y:1")))

        await service.load(tmp_path / "a.tar")
        monkeypatch.setattr(pyx_imaged.store.Store, "put_image", slowly)
        (tmp_path / "b.tar").write_bytes(docker_archive({}, "y:1", "z:1"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.load, tmp_path / "b.tar")
            assert await trio.to_thread.run_sync(begun.wait, 10)
            nursery.start_soon(remove)
            await trio.testing.wait_all_tasks_blocked(0.1)
            go.set()
        assert removed[0].untagged == ["y:1"] and removed[0].deleted == []
        assert sorted(await service.names()) == ["x:1", "z:1"]
    async with imaged(tmp_path / "i") as service:
        assert sorted(await service.names()) == ["x:1", "z:1"]
        await service.prepare("c" * 64, "z:1")


async def test_a_full_disk_behind_a_nursery_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a.tar").write_bytes(docker_archive({}, "y:1"))
    async with imaged(tmp_path / "i") as service:
        monkeypatch.setattr(Disk, "write_blob", full)
        with pytest.raises(errors.ResourceExhausted, match="no space left"):
            await service.load(tmp_path / "a.tar")
        monkeypatch.undo()
        assert set((await service.settled()).values()) == {0}


class Flood(BaseHTTPRequestHandler):
    """Asks for a token, and sends one that never ends, packed as well as it goes."""

    sent = 0
    encodings: set[str | None] = set()

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        Flood.encodings.add(self.headers.get("Accept-Encoding"))
        if not self.path.startswith("/token"):
            self.send_response(401)
            self.send_header("WWW-Authenticate", f'Bearer realm="http://127.0.0.1:{self.server.server_port}/token"')  # type: ignore[attr-defined]
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        packed = gzip.compress(bytes(50 << 20))
        try:
            for _ in range(4000):
                self.wfile.write(packed)
                Flood.sent += len(packed)
        except OSError:
            pass


async def test_a_token_without_end(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Flood)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        async with imaged(tmp_path / "i") as service:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with trio.fail_after(20), pytest.raises(errors.BusError):
                await service.pull(f"127.0.0.1:{server.server_port}/a/b:c")
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB; the server's own are in it
            assert Flood.encodings == {"identity"}
    finally:
        server.shutdown()
        server.server_close()


class Circle(BaseHTTPRequestHandler):
    """Sends its clients round in a circle."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(307)
        self.send_header("Location", self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()


async def test_a_registry_that_leads_nowhere(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Circle)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        async with imaged(tmp_path / "i") as service:
            with pytest.raises(errors.InvalidArgument, match="leads nowhere"):
                await service.pull(f"127.0.0.1:{server.server_port}/a/b:c")
    finally:
        server.shutdown()
        server.server_close()

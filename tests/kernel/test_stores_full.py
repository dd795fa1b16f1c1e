"""The services' databases on a file system that is full: a clear error, and all works again once there's room."""

from __future__ import annotations

import ctypes
import itertools
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import trio
from tests.unit.test_containerd_store import container

from pyx_bus.errors import ResourceExhausted
from pyx_containerd.model import State
from pyx_containerd.store import Store as ContainerStore
from pyx_imaged.model import Image, ImageID
from pyx_imaged.store import Store as ImageStore
from pyx_netd.model import Attachment, Port
from pyx_netd.store import AttachmentStore
from pyx_volumed.model import VolumeRecord
from pyx_volumed.store import Store as VolumeStore

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    assert _libc.mount(b"tmpfs", str(tmp_path).encode(), b"tmpfs", 0, b"size=400k") == 0
    yield tmp_path
    _libc.umount2(str(tmp_path).encode(), 2)


def _through_a_full_disk(directory: Path, change: Callable[[], object], error: type[Exception]) -> None:
    with open(directory / "fill", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    for _ in range(2):
        with pytest.raises(error, match=r"no space left|disk is full"):
            change()
    os.unlink(directory / "fill")
    change()


def test_images(small: Path) -> None:
    with closing(ImageStore(small / "db")) as store:
        image = Image(ImageID("sha256:1"), bytes(9000), ())
        _through_a_full_disk(small, lambda: store.put_image(image, ["a"], []), sqlite3.OperationalError)  # api.py says the rest


def test_attachments(small: Path) -> None:
    with closing(AttachmentStore(small, "boot")) as store:
        ports = tuple(Port("tcp", 1, number) for number in range(300))
        attachment = Attachment("c", "n", "e", "name", "", 1, 1, ports=ports)
        _through_a_full_disk(small, lambda: store.add(attachment, 5), ResourceExhausted)
        assert store.load() == [attachment]


def test_volumes(small: Path) -> None:
    with closing(VolumeStore(small / "db")) as store:
        names = (f"v{number}" for number in itertools.count())
        _through_a_full_disk(
            small, lambda: store.change(add=[VolumeRecord(next(names), "local", 1, {"a": "x" * 9000})]), ResourceExhausted
        )


async def test_containers(small: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What can be refused is; what has happened is kept elsewhere, read by a successor, and written in time."""
    kept = tmp_path_factory.mktemp("kept")
    store = ContainerStore(small / "db", kept)
    await store.insert(container(1))
    await store.insert(container(2))
    filler = small / "fill"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    with pytest.raises(ResourceExhausted):
        await store.insert(container(3, labels={"a": "x" * 9000}))
    ended = container(1, state=State.EXITED, exit_code=7, labels={"a": "x" * 9000})
    await store.update(ended)
    await store.update(msgspec.structs.replace(ended, exit_code=8))
    await store.delete(container(2).id)
    with pytest.raises(ResourceExhausted):
        await store.rename(msgspec.structs.replace(ended, name="other"))
    successor = ContainerStore(small / "db", kept)  # as after kill -9
    assert successor.load() == [msgspec.structs.replace(ended, exit_code=8)]
    with pytest.raises(ResourceExhausted):  # a name that only a kept removal frees isn't free yet
        await successor.insert(container(4, name="c2"))
    filler.unlink()
    await successor.insert(container(4, name="c2"))
    assert [one.exit_code for one in successor.load()] == [8, 0]
    assert list(kept.iterdir()) == []
    successor.close()
    store.close()


async def test_containers_with_no_room_anywhere(small: Path) -> None:
    store = ContainerStore(small / "db")
    await store.insert(container(1))
    filler = small / "fill"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    ended = container(1, state=State.EXITED, exit_code=7, labels={"a": "x" * 9000})
    with pytest.raises(ResourceExhausted):
        await store.update(ended)
    assert not store.is_kept(ended.id)
    filler.unlink()
    with trio.fail_after(10):
        await store.until_kept(ended.id)
    store.close()
    assert ContainerStore(small / "db").load() == [ended]

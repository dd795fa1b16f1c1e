"""The services' databases on a file system that is full: a clear error, and all works again once there's room."""

from __future__ import annotations

import ctypes
import itertools
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pyx_bus.errors import ResourceExhausted
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

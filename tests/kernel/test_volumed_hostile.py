"""Volumes whose content a container made to hurt, and directories that aren't volumes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
from tests.service.test_volumed_service import A, stack, volume

from pyx_bus.contract import volumed
from pyx_bus.errors import ResourceExhausted
from pyx_volumed.copyup import TreeCopy

_libc = ctypes.CDLL(None, use_errno=True)


def nest(directory: Path, depth: int) -> None:
    here = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("a", dir_fd=here)
        below = os.open("a", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("file", os.O_CREAT, dir_fd=here))
    os.close(here)


async def test_directories_without_a_bottom(tmp_path: Path) -> None:
    """Deeper than Python's stack: neither a removal nor the start after a crash in one may fail by it."""
    async with stack(tmp_path) as s:
        await s.bus.call(volumed.CREATE, volumed.CreateVolume(name="deep"))
        nest(s.data("deep"), 1500)
        await s.bus.call(volumed.REMOVE, volumed.RemoveVolume(name="deep"))
        assert s.on_disk() == []
        (s.root / "volumes" / ".trash-1").mkdir()
        nest(s.root / "volumes" / ".trash-1", 1500)
    async with stack(tmp_path) as s:
        assert s.on_disk() == []


async def test_what_is_mounted_in_a_volume_is_not_deleted(tmp_path: Path) -> None:
    host = tmp_path / "host"
    host.mkdir()
    (host / "precious").write_text("x")
    async with stack(tmp_path) as s:
        await s.bus.call(volumed.CREATE, volumed.CreateVolume(name="data"))
        inside = s.data("data") / "inside"
        inside.mkdir()
        assert _libc.mount(str(host).encode(), str(inside).encode(), None, 0x1000, None) == 0
        try:
            await s.bus.call(volumed.REMOVE, volumed.RemoveVolume(name="data"))
            assert (host / "precious").read_text() == "x"
            assert await s.names() == []
        finally:
            for trash in (s.root / "volumes").glob(".trash-*"):
                _libc.umount2(str(trash / "_data" / "inside").encode(), 2)
    async with stack(tmp_path) as s:
        assert s.on_disk() == [] and (host / "precious").exists()


async def test_directories_of_others_stay(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        volumes = s.root / "volumes"
    (volumes / "backup").mkdir()
    (volumes / "backup" / "file").write_text("x")
    (volumes / "lost+found" / "_data").mkdir(parents=True)
    (volumes / "begun").mkdir()
    async with stack(tmp_path) as s:
        assert s.on_disk() == ["backup", "lost+found"] and (volumes / "backup" / "file").exists()
        assert await s.names() == []


async def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: TreeCopy) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "image" / "data").mkdir(parents=True)
    monkeypatch.setattr(TreeCopy, "run", full)
    async with stack(tmp_path) as s:
        with pytest.raises(ResourceExhausted, match="no space left"):
            await s.attach(A, volume("/data", "full"), image=tmp_path / "image")
        assert s.on_disk() == [] and await s.names() == []

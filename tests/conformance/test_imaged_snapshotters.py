"""One suite for every snapshotter (see ``pyx_imaged.drivers.base``): mounted for real, looked at from inside and outside."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.imaged_support import tree

from pyx_bus.errors import FailedPrecondition
from pyx_imaged import kernel
from pyx_imaged.disk import Disk
from pyx_imaged.drivers.base import Snapshotter
from pyx_imaged.drivers.copy import Copy
from pyx_imaged.drivers.overlayfs import Overlayfs
from pyx_imaged.model import ImageID

SNAPSHOTTERS: dict[str, Callable[[Path], Snapshotter]] = {
    "overlayfs": lambda root: Overlayfs(root / "l"),
    "copy": lambda root: Copy(),
}
IMAGE = ImageID("sha256:" + "0" * 64)


class Stand:
    """A disk with layers on it, and mounts that are gone at the end."""

    def __init__(self, root: Path, make: Callable[[Path], Snapshotter]) -> None:
        self.disk = Disk(root)
        self.snapshotter = make(root)
        self.mounted: list[Path] = []
        self._layers = 0

    def layer(self) -> Path:
        self._layers += 1
        path = self.disk.layer(self._layers)
        path.mkdir()
        path.chmod(0o755)
        return path

    def snapshot(self, name: str, layers: list[Path]) -> Path:
        self.disk.make_snapshot(name, IMAGE, "x", "x:latest", layers, self.snapshotter)
        return self.mount(name, layers)

    def mount(self, name: str, layers: list[Path]) -> Path:
        target = self.disk.root / f"mnt-{name}"
        target.mkdir(exist_ok=True)
        for mount in self.snapshotter.mounts(self.disk.snapshot(name), layers):
            options = ",".join(mount.options)
            subprocess.run(["mount", "-t", mount.type, "-o", options, mount.source, target], check=True)
            self.mounted.append(target)
        return target

    def unmount(self) -> None:
        while self.mounted:
            subprocess.run(["umount", self.mounted.pop()], check=True)


@pytest.fixture(params=sorted(SNAPSHOTTERS))
def stand(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stand]:
    stand = Stand(tmp_path / "data", SNAPSHOTTERS[request.param])
    yield stand
    stand.unmount()


def whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, 0)


class TestSnapshotter:
    def test_works_here(self, stand: Stand) -> None:
        scratch = stand.disk.ingest_directory()
        stand.snapshotter.probe(scratch)

    def test_layers_are_one_tree(self, stand: Stand) -> None:
        low, mid, top = stand.layer(), stand.layer(), stand.layer()
        for name in ("both", "low", "hidden"):
            (low / name).write_text("low")
        for name in ("merged", "opaque", "gone", "replaced"):
            (low / name).mkdir()
            (low / name / "old").write_text("old")
        (mid / "both").write_text("mid")
        whiteout(mid / "hidden")
        whiteout(mid / "gone")
        (mid / "merged").mkdir()
        (mid / "merged/new").write_text("new")
        (mid / "opaque").mkdir()
        os.setxattr(mid / "opaque", kernel.OVERLAY_OPAQUE, b"y")
        (mid / "opaque/new").write_text("new")
        (mid / "replaced").write_text("a file now")
        (top / "hidden").symlink_to("low")
        root = stand.snapshot("c", [low, mid, top])
        assert tree(root) == {
            "both": "mid", "low": "low", "hidden": "link → low", "merged": "dir", "merged/old": "old", "merged/new": "new",
            "opaque": "dir", "opaque/new": "new", "replaced": "a file now",
        }  # fmt: skip

    def test_attributes_come_through(self, stand: Stand) -> None:
        low, top = stand.layer(), stand.layer()
        top.chmod(0o1751)
        os.chown(top, 3, 4)
        (low / "suid").write_text("x")
        os.chown(low / "suid", 1000, 1001)
        (low / "suid").chmod(0o4711)
        os.setxattr(low / "suid", "user.note", b"kept")
        os.link(low / "suid", low / "hard")
        os.utime(low / "suid", ns=(5, 1_600_000_000_123456789))
        os.mknod(low / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mkfifo(low / "pipe")
        root = stand.snapshot("c", [low, top])
        status = os.stat(root)
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o1751, 3, 4)
        status = os.stat(root / "suid")
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o4711, 1000, 1001)
        assert status.st_mtime_ns == 1_600_000_000_123456789 and status.st_nlink == 2
        assert os.getxattr(root / "suid", "user.note") == b"kept"
        assert os.stat(root / "null").st_rdev == os.makedev(1, 3)
        assert stat.S_ISFIFO(os.stat(root / "pipe").st_mode)

    def test_changes_stay_in_their_snapshot(self, stand: Stand) -> None:
        low = stand.layer()
        (low / "a").write_text("low")
        (low / "d").mkdir()
        (low / "d/b").write_text("low")
        before = tree(low)
        one, two = stand.snapshot("one", [low]), stand.snapshot("two", [low])
        (one / "a").write_text("changed")
        (one / "d/b").unlink()
        (one / "d").rmdir()
        (one / "new").write_text("new")
        assert tree(two) == before and tree(low) == before
        assert tree(one) == {"a": "changed", "new": "new"}
        writable = stand.snapshotter.writable(stand.disk.snapshot("one"))
        assert (writable / "new").read_text() == "new"

    def test_changes_outlive_the_mount(self, stand: Stand) -> None:
        low = stand.layer()
        (low / "a").write_text("low")
        root = stand.snapshot("c", [low])
        (root / "a").write_text("changed")
        stand.unmount()
        assert (stand.mount("c", [low]) / "a").read_text() == "changed"

    def test_an_image_without_layers(self, stand: Stand) -> None:
        root = stand.snapshot("c", [])
        assert tree(root) == {}
        (root / "x").write_text("works")

    def test_many_layers(self, stand: Stand) -> None:
        layers = [stand.layer() for _ in range(40)]
        for number, layer in enumerate(layers):
            (layer / f"f{number}").write_text(str(number))
            (layer / "last").write_text(str(number))
        root = stand.snapshot("c", layers)
        found = tree(root)
        assert len(found) == 41 and found["last"] == "39"

    def test_released_without_a_trace(self, stand: Stand) -> None:
        low = stand.layer()
        (low / "d").mkdir()
        root = stand.snapshot("c", [low])
        (root / "d/x").write_text("x")
        stand.unmount()
        stand.disk.discard(stand.disk.snapshot("c"))
        assert stand.disk.snapshots() == []
        assert stand.disk.empty_trash() == []
        assert list((stand.disk.root / "trash").iterdir()) == []
        assert tree(low) == {"d": "dir"}

    def test_a_failed_preparation_leaves_nothing(self, stand: Stand) -> None:
        low = stand.layer()
        with pytest.raises(OSError):
            stand.disk.make_snapshot("c", IMAGE, "x" * 5000, "x", [low], stand.snapshotter)
        assert stand.disk.snapshots() == []
        assert list((stand.disk.root / "ingest").iterdir()) == []


def test_overlayfs_takes_dockers_maximum_of_layers() -> None:
    """127 layers fit into the one page of mount(2)'s options below a data directory as short as the default one."""
    with tempfile.TemporaryDirectory(prefix="pyx", dir="/tmp") as root:
        stand = Stand(Path(root), SNAPSHOTTERS["overlayfs"])
        layers = [stand.layer() for _ in range(127)]
        for number, layer in enumerate(layers):
            (layer / f"f{number}").touch()
        try:
            assert len(tree(stand.snapshot("c" * 64, layers))) == 127
        finally:
            stand.unmount()


def test_overlayfs_refuses_what_cant_be_mounted(tmp_path: Path) -> None:
    snapshotter = Overlayfs(tmp_path / ("x" * 200) / "l")
    with pytest.raises(FailedPrecondition, match="30 layers don't fit"):
        snapshotter.mounts(tmp_path, [Path(str(number)) for number in range(30)])

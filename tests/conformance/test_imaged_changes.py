"""One suite of diff and commit for every snapshotter: changes made through its mount, told by Docker's rules, and packed into a layer
which, unpacked on top of the same image, gives the container's tree again."""

from __future__ import annotations

import os
import random
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tests import imaged_changes
from tests.conformance.test_imaged_snapshotters import SNAPSHOTTERS, Stand, whiteout

from pyx_imaged import kernel
from pyx_imaged.extract import Extractor, Limits


@pytest.fixture(params=sorted(SNAPSHOTTERS))
def stand(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stand]:
    stand = Stand(tmp_path / "data", SNAPSHOTTERS[request.param])
    yield stand
    stand.unmount()


class Box:
    """A container's tree, mounted, on an image of two layers."""

    def __init__(self, stand: Stand, fill: Callable[[Path, Path], None] = lambda low, top: None) -> None:
        low, top = stand.layer(), stand.layer()
        for name in ("a", "b", "same", "gone"):
            (low / name).write_text(name)
        for name in ("d", "d/deep", "whole", "whole/sub", "again", "again/sub", "etc"):
            (low / name).mkdir()
        for name in ("d/x", "d/deep/y", "whole/z", "whole/sub/z", "again/old", "again/sub/kept", "etc/passwd", "hidden"):
            (low / name).write_text(name)
        whiteout(top / "hidden")
        (top / "d").mkdir()
        (top / "d/upper").write_text("upper")
        (top / "link").symlink_to("a")
        fill(low, top)
        self._start(stand, [low, top], "box")

    @classmethod
    def on(cls, stand: Stand, layers: list[Path], name: str) -> Box:
        """Another container, of these layers."""
        box = cls.__new__(cls)
        box._start(stand, layers, name)
        return box

    def _start(self, stand: Stand, layers: list[Path], name: str) -> None:
        self.stand, self.layers = stand, layers
        self.root = stand.snapshot(name, self.layers)
        self.own = stand.snapshotter.writable(stand.disk.snapshot(name))
        self.since_ns = max(record.created_ns for record in stand.disk.snapshots()) - 20_000_000

    @property
    def _fields(self) -> dict[str, Any]:
        return {"overlay": self.stand.snapshotter.overlay, "since_ns": self.since_ns}

    def diff(self) -> list[str]:
        return imaged_changes.diff(self.own, self.layers, **self._fields)

    def pack(self, name: str = "blob") -> tuple[dict[str, Any], Path]:
        blob = self.stand.disk.root / name
        return imaged_changes.pack(self.own, self.layers, blob, **self._fields), blob

    def again(self, blob: Path) -> Path:
        """Another container's tree, of the image with the layer on top."""
        return self.stand.snapshot("again", [*self.layers, self.unpack(blob)])

    def unpack(self, blob: Path) -> Path:
        layer = self.stand.layer()
        with subprocess.Popen(["gzip", "-dc", blob], stdout=subprocess.PIPE) as gunzip:
            assert gunzip.stdout is not None
            before = os.umask(0)
            try:
                extractor = Extractor(str(layer), Limits())
                unpacked = extractor.run(gunzip.stdout.read, strict_end=True)
                extractor.close()
            finally:
                os.umask(before)
        assert unpacked.implied <= {b""}, "a directory in it isn't told"
        return layer


def at_random(root: Path, chance: random.Random) -> None:
    """Some dozens of things a container may do to its files, on a few names, so that they meet."""
    places = ("", "d/", "d/deep/", "again/", "again/sub/", "whole/")
    names = [f"{place}{name}" for place in places for name in ("a", "x", "sub", "old", "n")]
    for step in range(80):
        one, other = root / chance.choice(names), root / chance.choice(names)
        what = chance.randrange(9)
        try:
            if what == 0:
                one.write_text(f"{step}")
            elif what == 1:
                one.mkdir(parents=True)
            elif what == 2:
                subprocess.run(["rm", "-rf", one], check=True)
            elif what == 3:
                subprocess.run(["mv", "-T", one, other], check=True, capture_output=True)
            elif what == 4:
                os.link(one, other, follow_symlinks=False)
            elif what == 5:
                one.symlink_to(f"../{step}")
            elif what == 6:
                os.chmod(one, 0o700 + step)
            elif what == 7:
                os.chown(one, step, step)
            else:
                subprocess.run(["rm", "-rf", one], check=True)
                one.mkdir()
        except (OSError, subprocess.CalledProcessError):
            pass  # it can't be done to what's there


def full(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything that should come through, by path; times of directories aren't changes."""
    found: dict[str, tuple[Any, ...]] = {}
    names = [b"", *sorted(os.path.relpath(os.path.join(here, name), os.fsencode(root))
                          for here, directories, files in os.walk(os.fsencode(root)) for name in directories + files)]  # fmt: skip
    for name in names:
        path = os.path.join(os.fsencode(root), name)
        status = os.lstat(path)
        if stat.S_ISSOCK(status.st_mode):
            continue
        content: Any = ""
        if stat.S_ISREG(status.st_mode):
            content = Path(os.fsdecode(path)).read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        mtime = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
        xattrs = tuple((x, os.getxattr(path, x, follow_symlinks=False)) for x in sorted(os.listxattr(path, follow_symlinks=False)))
        found[os.fsdecode(name)] = (oct(status.st_mode), status.st_uid, status.st_gid, status.st_rdev, mtime, content, xattrs)
    return found


class TestChanges:
    def test_nothing(self, stand: Stand) -> None:
        box = Box(stand)
        assert box.diff() == []
        result, blob = box.pack()
        assert result["entries"] == 0 and imaged_changes.members(blob) == {}

    def test_dockers_lines(self, stand: Stand) -> None:
        box = Box(stand)
        root = box.root
        (root / "a").write_text("changed")
        (root / "b").chmod(0o600)
        (root / "gone").unlink()
        (root / "d/deep/new").write_text("")
        (root / "d/upper").unlink()
        subprocess.run(["rm", "-r", root / "whole"], check=True)
        (root / "hidden").write_text("back")
        (root / "n/m").mkdir(parents=True)
        (root / "n/m/f").symlink_to("/etc/passwd")
        (root / "link").unlink()
        (root / "link").mkdir()
        os.chown(root / "etc", 5, 6)
        os.utime(root / "again")  # the time of a directory is no change
        assert box.diff() == [
            "C /a", "C /b", "C /d", "C /d/deep", "A /d/deep/new", "D /d/upper", "C /etc", "D /gone", "A /hidden", "C /link",
            "A /n", "A /n/m", "A /n/m/f", "D /whole",
        ]  # fmt: skip
        expected = full(root)
        result, blob = box.pack()
        members = imaged_changes.members(blob)
        assert list(members) == [
            "a", "b", "d", "d/deep", "d/deep/new", "d/.wh.upper", "etc", ".wh.gone", "hidden", "link", "n", "n/m", "n/m/f", ".wh.whole",
        ]  # fmt: skip
        assert result["entries"] == len(members) and result["left_out"] == 0
        assert members["n/m/f"].issym() and members["n/m/f"].linkname == "/etc/passwd"
        assert full(box.again(blob)) == expected

    def test_a_directory_made_again_hides_the_old_one(self, stand: Stand) -> None:
        box = Box(stand)
        subprocess.run(["rm", "-r", box.root / "again"], check=True)
        (box.root / "again/sub").mkdir(parents=True)
        (box.root / "again/sub/new").write_text("new")
        assert box.diff() == ["C /again", "D /again/old", "C /again/sub", "D /again/sub/kept", "A /again/sub/new"]
        expected = full(box.root)
        _, blob = box.pack()
        assert ("again/.wh..wh..opq" in imaged_changes.members(blob)) == stand.snapshotter.overlay
        assert full(box.again(blob)) == expected

    def test_an_empty_directory_made_again(self, stand: Stand) -> None:
        box = Box(stand)
        subprocess.run(["rm", "-r", box.root / "whole"], check=True)
        (box.root / "whole").mkdir()
        assert box.diff() == ["C /whole", "D /whole/sub", "D /whole/z"]
        expected = full(box.root)
        assert full(box.again(box.pack()[1])) == expected

    def test_types_change(self, stand: Stand) -> None:
        box = Box(stand)
        subprocess.run(["rm", "-r", box.root / "d", box.root / "a"], check=True)
        (box.root / "d").write_text("a file now")
        (box.root / "a").mkdir()
        (box.root / "a/b").write_text("")
        assert box.diff() == ["C /a", "A /a/b", "C /d"]
        expected = full(box.root)
        assert full(box.again(box.pack()[1])) == expected

    def test_attributes_links_and_devices(self, stand: Stand) -> None:
        box = Box(stand)
        root = box.root
        (root / "run").write_text("#!")
        os.chown(root / "run", 1000, 1001)
        (root / "run").chmod(0o6755)
        capability = bytes.fromhex("0100000200040000000000000000000000000000")
        os.setxattr(root / "run", "security.capability", capability)
        os.setxattr(root / "run", "user.note", b"\xff\0=\n")
        os.setxattr(root / "etc", "user.dir", b"kept")
        os.utime(root / "run", ns=(5, 1_600_000_000_120_000_000))
        os.link(root / "run", root / "second")
        os.link(root / "same", root / "d/same")  # with something of the image
        os.mknod(root / "null", stat.S_IFCHR | 0o620, os.makedev(1, 3))
        os.mknod(root / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 70000))
        os.mkfifo(root / "pipe", 0o640)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(root / "s"))
        (root / ".wh.b").write_text("no deletion")
        (root / "old").write_text("")
        os.utime(root / "old", (-5, -5))
        expected = full(root)
        del expected[".wh.b"]
        (root / "n/.wh.dir/in").mkdir(parents=True)
        (root / "n/.wh.dir/in/file").write_text("")
        expected["n"] = full(root)["n"]
        lines = box.diff()
        assert {"A /run", "A /second", "A /d/same", "A /null", "A /disk", "A /pipe", "A /s", "A /.wh.b"} <= set(lines)
        result, blob = box.pack()
        members = imaged_changes.members(blob)
        assert result["left_out"] == 5 and "s" not in members and not [name for name in members if ".wh." in name]
        assert members["run"].pax_headers["SCHILY.xattr.security.capability"].encode("utf-8", "surrogateescape") == capability
        assert members["second"].islnk() and members["second"].linkname == "run"
        assert (members["disk"].devmajor, members["disk"].devminor) == (259, 70000)
        root = box.again(blob)
        assert full(root) == expected
        assert os.path.samefile(root / "run", root / "second")

    def test_the_root_itself(self, stand: Stand) -> None:
        box = Box(stand)
        box.root.chmod(0o1750)
        os.chown(box.root, 7, 8)
        assert box.diff() == []  # as Docker's
        expected = full(box.root)
        assert full(box.again(box.pack()[1])) == expected

    def test_hostile_names(self, stand: Stand) -> None:
        box = Box(stand)
        here = os.fsencode(box.root)
        names = [b"new\nline", b"D \\etc", b"\xff\xfe", "ü".encode(), b"-rf", b" ", b"x" * 255, b"...", b"a\x1b[31m"]
        for name in names:
            os.mkdir(os.path.join(here, name))
            with open(os.path.join(here, name, name), "wb") as file:
                file.write(name)
        expected = full(box.root)
        lines = {os.fsencode(line) for line in box.diff()}
        assert lines == {b"A /" + name for name in names} | {b"A /" + name + b"/" + name for name in names}
        assert full(box.again(box.pack()[1])) == expected

    def test_links_are_never_followed(self, stand: Stand, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "secret").write_text("secret")
        box = Box(stand)
        (box.root / "out").symlink_to(outside)
        subprocess.run(["rm", "-r", box.root / "d"], check=True)
        (box.root / "d").symlink_to(outside)
        (box.root / "up").symlink_to("../" * 30 + str(outside))
        assert box.diff() == ["C /d", "A /out", "A /up"]
        _, blob = box.pack()
        assert all(info.issym() for info in imaged_changes.members(blob).values())

    def test_deep_trees(self, stand: Stand) -> None:
        box = Box(stand)

        def nest(fd: int) -> int:
            for _ in range(1500):
                if "d" not in os.listdir(fd):
                    os.mkdir("d", dir_fd=fd)
                fd, before = os.open("d", os.O_RDONLY, dir_fd=fd), fd
                os.close(before)
            return fd

        fd = nest(os.open(box.root, os.O_RDONLY))
        try:
            assert len(box.diff()) == 1500  # the image's own /d is changed, too
            result, _ = box.pack()
            assert result["entries"] == 1500
            fd = nest(fd)
            result, _ = box.pack("second")
            assert result["code"] == "failed_precondition" and "path of more than 4096 bytes" in result["message"]
            assert box.diff()[0].startswith("failed_precondition")
        finally:
            os.close(fd)
            stand.unmount()
            stand.disk.discard(stand.disk.snapshot("box"))
            assert stand.disk.empty_trash() == []  # what deletes tests' directories can't delete these

    def test_mount_points_dont_count(self, stand: Stand) -> None:
        box = Box(stand)
        for name in ("proc", "sys", "dev", "dev/pts"):
            (box.root / name).mkdir()
        for name in ("etc/hosts", "etc/resolv.conf"):
            (box.root / name).touch()
        assert box.diff() == [] and box.pack()[0]["entries"] == 0
        (box.root / "dev/mine").write_text("x")
        (box.root / "etc/hosts").write_text("x")
        assert box.diff() == ["A /dev", "A /dev/mine", "C /etc", "A /etc/hosts"]

    def test_changes_that_hide(self, stand: Stand) -> None:
        """Size and time set back: Docker's diff doesn't see it, a layer has it."""
        box = Box(stand)
        before = os.stat(box.root / "same")
        (box.root / "same").write_text("emas")
        os.utime(box.root / "same", ns=(before.st_atime_ns, before.st_mtime_ns))
        expected = full(box.root)
        assert full(box.again(box.pack()[1])) == expected

    @pytest.mark.parametrize("seed", range(6))
    def test_whatever_is_done_comes_through(self, stand: Stand, seed: int) -> None:
        """Two generations of random changes: the layer of the second lies on the image made of the first."""
        box = Box(stand)
        for generation in range(2):
            at_random(box.root, random.Random(seed * 2 + generation))
            expected = full(box.root)
            _, blob = box.pack(f"blob{generation}")
            layer = box.unpack(blob)
            box = Box.on(stand, [*box.layers, layer], f"again{generation}")
            assert full(box.root) == expected
            assert box.diff() == []

    def test_a_file_that_changes_meanwhile_keeps_the_tar_whole(self, stand: Stand) -> None:
        box = Box(stand)
        script = """
import os, sys
root = sys.argv[1]
print("ready", flush=True)
while True:
    for size in (0, 3_000_000, 100):
        for n in range(20):
            with open(f"{root}/f{n}", "wb") as file:
                file.truncate(size)
            try:
                os.rename(f"{root}/f{n}", f"{root}/g{n}")
                if n % 2:
                    os.unlink(f"{root}/g{n}")
            except OSError:
                pass
"""
        with subprocess.Popen([sys.executable, "-c", script, box.root], stdout=subprocess.PIPE) as churn:
            try:
                assert churn.stdout is not None and churn.stdout.readline()
                for number in range(3):
                    result, blob = box.pack(f"blob{number}")
                    assert "diff_id" in result, result
                    imaged_changes.members(blob)
                    assert not box.diff()[:1] or box.diff()[0][:2] in ("A ", "C ")
            finally:
                churn.kill()
        assert "entries" in box.pack("quiet")[0]


@pytest.mark.parametrize("seed", range(4))
def test_all_snapshotters_tell_the_same(tmp_path: Path, seed: int) -> None:
    told = []
    for name, make in SNAPSHOTTERS.items():
        stand = Stand(tmp_path / name, make)
        try:
            box = Box(stand)
            at_random(box.root, random.Random(seed))
            told.append(box.diff())
        finally:
            stand.unmount()
    assert told[0] == told[1] and len(told[0]) > 10


def test_overlayfs_whiteouts_of_nothing(tmp_path: Path) -> None:
    """Marks that hide nothing (any more) are no deletions."""
    own, low = tmp_path / "own", tmp_path / "low"
    own.mkdir()
    low.mkdir()
    whiteout(own / "never")
    (own / "d").mkdir()
    os.setxattr(own / "d", kernel.OVERLAY_OPAQUE, b"y")
    assert imaged_changes.diff(own, [low], overlay=True) == ["A /d"]
    blob = tmp_path / "blob"
    imaged_changes.pack(own, [low], blob, overlay=True)
    assert list(imaged_changes.members(blob)) == ["d"]


def test_references_of_overlayfs_are_refused(tmp_path: Path) -> None:
    own, low = tmp_path / "own", tmp_path / "low"
    own.mkdir()
    low.mkdir()
    (own / "moved").mkdir()
    os.setxattr(own / "moved", "trusted.overlay.redirect", b"/etc")
    (result,) = imaged_changes.diff(own, [low], overlay=True)
    assert result.startswith("failed_precondition") and "redirect_dir" in result


def test_limits(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "f").write_bytes(b"x" * 5000)
    for number, (limits, message) in enumerate((
        ({"max_bytes": 4000}, "a file of 5000 bytes"), ({"max_entries": 0}, "more than 0 changes"),
        ({"min_free_bytes": 1 << 60}, "no space left for the layer"),
    )):  # fmt: skip
        answer = imaged_changes.work(
            "pack", own, [], overlay=True, blob=str(tmp_path / f"blob{number}"), limits={**asdict(Limits()), **limits}
        )
        assert answer["error"]["code"] == "resource_exhausted" and message in answer["error"]["message"]


def test_a_reader_that_takes_nothing(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for number in range(1000):
        (own / f"{number:0100}").touch()
    read_end, write_end = os.pipe()
    try:
        answer = imaged_changes.work("diff", own, [], overlay=True, out=write_end, patience_s=0.05)
        assert answer["error"]["code"] == "unavailable" and len(os.read(read_end, 1 << 17)) == 1 << 16
    finally:
        os.close(read_end)
        os.close(write_end)


def test_what_a_copy_was_made_with_isnt_read_again(tmp_path: Path) -> None:
    own, low = tmp_path / "own", tmp_path / "low"
    for directory, content in ((own, "one"), (low, "two")):
        directory.mkdir()
        (directory / "f").write_text(content)
        os.utime(directory / "f", (1, 1))
    assert imaged_changes.diff(own, [low], overlay=False) == ["C /f"]
    assert imaged_changes.diff(own, [low], overlay=False, since_ns=time.time_ns() + 10**9) == []

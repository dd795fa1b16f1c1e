"""The tar streams of cp: what goes in comes out, and nothing gets out of the place it's unpacked in."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pyx_bus import archive


def below(place: Path) -> Callable[[str, bool], int]:
    """Through no link."""

    def open_directory(path: str, make: bool) -> int:
        current = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        for name in path.split("/") if path else ():
            try:
                following = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=current)
            except FileNotFoundError:
                if not make:
                    raise
                os.mkdir(name, dir_fd=current)
                following = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=current)
            finally:
                os.close(current)
            current = following
        return current

    return open_directory


def packed(directory: Path, name: str, arcname: str) -> bytes:
    out = io.BytesIO()
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        archive.pack(out, fd, name, arcname)
    finally:
        os.close(fd)
    return out.getvalue()


def made(*entries: tuple[str, bytes, str]) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, link in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = kind, link, 0o755
            tar.addfile(info)
    out.seek(0)
    return out


def test_a_tree_comes_out_as_it_went_in(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "d" / "empty").mkdir(parents=True)
    (source / "d" / ("long" * 50)).write_bytes(os.urandom(3_000_000))
    (source / "weird \udcff\n").write_text("x")
    (source / "link").symlink_to("/nowhere")
    os.link(source / "weird \udcff\n", source / "same")
    os.mkfifo(source / "fifo", 0o640)
    (source / "d" / "empty").chmod(0o2500)
    os.utime(source / "d", ns=(1, 1_234_567_890_123_456_789))
    descriptors = len(os.listdir("/proc/self/fd"))
    data = packed(tmp_path, "source", "copy")
    size = archive.unpack(io.BytesIO(data), below(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    copy = tmp_path / "copy"
    assert size == 3_000_001
    for path in sorted(source.rglob("*")):
        other = copy / path.relative_to(source)
        one, two = path.lstat(), other.lstat()
        assert (one.st_mode, one.st_size if path.is_file() else 0) == (two.st_mode, two.st_size if path.is_file() else 0), path
        assert one.st_mtime_ns == two.st_mtime_ns, path
        if path.is_file():
            assert path.read_bytes() == other.read_bytes()
    assert os.readlink(copy / "link") == "/nowhere"
    assert (copy / "same").stat().st_ino == (copy / "weird \udcff\n").stat().st_ino


@pytest.mark.parametrize(
    ("name", "arcname", "names"),
    [("a", "a", ["a", "a/f"]), ("a", "b", ["b", "b/f"]), (".", ".", [".", "./a", "./a/f"]), (".", "", ["a", "a/f"])],
)
def test_names_in_an_archive(tmp_path: Path, name: str, arcname: str, names: list[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").touch()
    with tarfile.open(fileobj=io.BytesIO(packed(tmp_path, name, arcname))) as tar:
        assert tar.getnames() == names


def test_a_first_component_is_renamed_with_its_links(tmp_path: Path) -> None:
    entries = (("old", tarfile.DIRTYPE, ""), ("old/f", tarfile.REGTYPE, ""), ("old/g", tarfile.LNKTYPE, "old/f"))
    archive.unpack(made(*entries), below(tmp_path), rename=("old", "new"))
    assert sorted(os.listdir(tmp_path / "new")) == ["f", "g"] and os.listdir(tmp_path) == ["new"]
    archive.unpack(made((".", tarfile.DIRTYPE, ""), ("./f", tarfile.REGTYPE, "")), below(tmp_path), rename=(".", "dot"))
    assert os.listdir(tmp_path / "dot") == ["f"]


@pytest.mark.parametrize(
    "entries",
    [
        [("../out", tarfile.REGTYPE, "")],
        [("a/../../out", tarfile.REGTYPE, "")],
        [("link", tarfile.SYMTYPE, ".."), ("link/out", tarfile.REGTYPE, "")],
        [("link", tarfile.SYMTYPE, "/tmp"), ("link/out", tarfile.DIRTYPE, "")],
        [("hard", tarfile.LNKTYPE, "../secret")],
        [("hard", tarfile.LNKTYPE, "link/secret"), ("x", tarfile.REGTYPE, "")],
        [("link", tarfile.SYMTYPE, ".."), ("hard", tarfile.LNKTYPE, "link/secret")],
    ],
)
def test_nothing_gets_out(tmp_path: Path, entries: list[tuple[str, bytes, str]]) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "secret").write_text("mine")
    with pytest.raises((archive.ArchiveError, OSError)):
        archive.unpack(made(*entries), below(place))
    assert sorted(os.listdir(tmp_path)) == ["place", "secret"] and (tmp_path / "secret").stat().st_nlink == 1
    assert "hard" not in os.listdir(place)


def test_a_file_through_a_link_that_is_there_replaces_the_link(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "target").write_text("mine")
    (place / "f").symlink_to(tmp_path / "target")
    archive.unpack(made(("f", tarfile.REGTYPE, "")), below(place))
    assert not (place / "f").is_symlink() and (tmp_path / "target").read_text() == "mine"


def test_directories_and_others_do_not_replace_one_another(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "f").touch()
    with pytest.raises(archive.ArchiveError, match='cannot overwrite directory "d" with non-directory'):
        archive.unpack(made(("d", tarfile.REGTYPE, "")), below(tmp_path))
    with pytest.raises(archive.ArchiveError, match='cannot overwrite non-directory "f" with directory'):
        archive.unpack(made(("f", tarfile.DIRTYPE, "")), below(tmp_path))


@pytest.mark.parametrize("data", [b"", b"no archive", bytes(511), b"\x1f\x8b" + b"x" * 600, b"x" * 5000])
def test_what_is_no_archive(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(archive.ArchiveError, match="not a tar"):
        archive.unpack(io.BytesIO(data), below(tmp_path))


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(os.urandom(100_000))
    data = packed(tmp_path, "f", "g")
    with pytest.raises(archive.ArchiveError):
        archive.unpack(io.BytesIO(data[:50_000]), below(tmp_path))

"""The extractor on a real file system: what it makes of an archive, and that nothing an archive says gets it out of its root."""

from __future__ import annotations

import io
import os
import random
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tests.imaged_support import tar_of, tree

from pyx_imaged import tarstream
from pyx_imaged.extract import Extractor, LayerError, LimitError, Limits, Unpacked


def extract(root: Path, data: bytes, *, limits: Limits | None = None, base: bool = False, **options: Any) -> Unpacked:
    root.mkdir(exist_ok=True)
    extractor = Extractor(str(root), limits or Limits(), base=base, **options)
    mask = os.umask(0)
    try:
        return extractor.run(io.BytesIO(data).read)
    finally:
        extractor.close()
        os.umask(mask)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    directory = tmp_path / "victim"
    directory.mkdir()
    (directory / "keep").write_text("original")
    return directory


OUT = "../victim"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../victim/keep", "f", "evil")], 'contains ".."'),
        ([("a/../../victim/keep", "f", "evil")], 'contains ".."'),
        ([("..", "d", None)], 'contains ".."'),
        ([("/{victim}/keep", "f", "evil")], "absolute path"),
        ([("d", "s", OUT), ("d/keep", "f", "evil")], "leaves the root through a link"),
        ([("d", "s", OUT), ("d/new/deep", "f", "evil")], "leaves the root through a link"),
        ([("d", "s", OUT), ("d/new", "d", None)], "leaves the root through a link"),
        ([("d", "s", OUT), ("d/.wh.keep", "f", "")], "leaves the root through a link"),
        ([("d", "s", OUT), ("d/.wh..wh..opq", "f", "")], "leaves the root through a link"),
        ([("d", "s", "{victim}"), ("d/keep", "f", "evil")], "leads nowhere"),
        ([("d", "s", "{victim}"), ("h", "h", "d/keep"), ("h", "f", "evil")], "leads nowhere"),
        ([("a", "d", None), ("a/b", "s", ".."), ("a/b/c", "s", "../.."), ("a/b/c/victim/keep", "f", "evil")], "leaves the root"),
        ([("d", "s", "e"), ("e", "s", "../victim"), ("d/keep", "f", "evil")], "leaves the root through a link"),
        ([("h", "h", "../victim/keep"), ("h", "f", "evil")], 'link target "../victim/keep" leaves the root'),
        ([("h", "h", "{victim}/keep"), ("h", "f", "evil")], "isn't in the archive|no directory"),
        ([("d", "s", OUT), ("h", "h", "d/keep"), ("h", "f", "evil")], "leaves the root through a link"),
        ([("d", "s", OUT), ("d/keep", "c", None)], "leaves the root through a link"),
        ([("l", "s", "l2"), ("l2", "s", "l"), ("l/x", "f", "")], "too many links"),
        ([("f", "f", "file"), ("f/x", "f", "")], "no directory"),
        ([(".", "s", OUT)], "would replace the root"),
        ([("", "s", OUT)], "would replace the root"),
        ([("d", "d", None), ("h", "h", "d")], "hard link to a directory"),
        ([("h", "h", ".")], "link to the root"),
        ([(".wh...", "f", "")], "no valid whiteout"),
        ([(".wh.", "f", "")], "no valid whiteout"),
        ([("x" * 300, "f", "")], "too long"),
        ([("x/" * 3000 + "y", "f", "")], "name of"),
    ],
)
def test_hostile(tmp_path: Path, victim: Path, members: list[tuple[str, str, Any]], message: str) -> None:
    def put(text: Any) -> Any:
        return text.replace("{victim}", str(victim)) if isinstance(text, str) else text

    data = tar_of(*((put(name), kind, put(value)) for name, kind, value in members))
    with pytest.raises((LayerError, FileNotFoundError), match=message):
        extract(tmp_path / "root", data)
    assert tree(victim) == {"keep": "original"}
    assert (victim / "keep").stat().st_nlink == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "victim"]


def test_hostile_links_that_stay_links(tmp_path: Path, victim: Path) -> None:
    """A link's own target is data: kept as it is, replaced (never followed) by what comes under its name."""
    data = tar_of(
        ("file", "s", "../victim/keep"), ("file", "f", "mine"),
        ("dir", "s", "../victim"), ("dir", "d", None), ("dir/keep", "f", "mine too"),
        ("stays", "s", "../../../etc/passwd"), ("abs", "s", "/etc/passwd"),
    )  # fmt: skip
    extract(tmp_path / "root", data)
    assert tree(tmp_path / "root") == {
        "file": "mine", "dir": "dir", "dir/keep": "mine too", "stays": "link → ../../../etc/passwd", "abs": "link → /etc/passwd",
    }  # fmt: skip
    assert tree(victim) == {"keep": "original"}


def test_absolute_names_where_they_are_allowed(tmp_path: Path) -> None:
    extract(tmp_path / "root", tar_of(("/etc/x", "f", "1")), allow_absolute=True)
    assert tree(tmp_path / "root") == {"etc": "dir", "etc/x": "1"}
    extract(tmp_path / "root", tar_of(("/", "d", None), ("./", "d", None)))


def test_writing_through_the_layers_own_links(tmp_path: Path) -> None:
    data = tar_of(
        ("usr/lib", "d", None), ("lib", "s", "usr/lib"), ("lib/a", "f", "A"), ("usr/abs", "s", "/usr/lib"), ("usr/abs/b", "f", "B"),
        ("usr/up", "s", "../lib"), ("usr/up/c/d", "f", "D"), ("lib/e", "h", "usr/abs/a"),
    )  # fmt: skip
    extract(tmp_path / "root", data)
    found = tree(tmp_path / "root")
    assert {key: found[key] for key in found if key.startswith("usr/lib/")} == {
        "usr/lib/a": "A", "usr/lib/b": "B", "usr/lib/c": "dir", "usr/lib/c/d": "D", "usr/lib/e": "A",
    }  # fmt: skip
    assert (tmp_path / "root/usr/lib/a").stat().st_nlink == 2


def test_whiteouts(tmp_path: Path) -> None:
    data = tar_of(
        ("a", "d", None), ("a/.wh.gone", "f", ""), ("b/.wh..wh..opq", "f", ""), ("b/new", "f", "n"),
        ("c", "d", None), ("c/mine", "f", "m"), (".wh.c", "f", ""), (".wh.d", "f", ""), ("d", "d", None), (".wh.e", "f", ""),
        ("e/x", "f", ""), ("f", "f", "f"), (".wh.f", "f", ""), (".wh..wh.plnk", "d", None), (".wh.g", "f", ""), ("g", "f", "g"),
    )  # fmt: skip
    root = tmp_path / "root"
    extract(root, data)
    status = os.lstat(root / "a/gone")
    assert stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
    for name in "bcde":
        assert os.getxattr(root / name, "trusted.overlay.opaque") == b"y", name
    assert "trusted.overlay.opaque" not in os.listxattr(root / "a")
    found = tree(root)
    assert found["c/mine"] == "m" and found["f"] == "f" and found["g"] == "g" and ".wh..wh.plnk" not in found
    extract(tmp_path / "base", data, base=True)
    assert "a/gone" not in tree(tmp_path / "base")


def test_attributes(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, kind: bytes, **fields: Any) -> None:
            info = tarfile.TarInfo(name)
            info.type = kind
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(b"x" * info.size))

        xattrs = {"SCHILY.xattr.user.a": "1", "SCHILY.xattr.trusted.overlay.redirect": "/etc"}
        capability = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00".decode("latin-1")
        add("suid", tarfile.REGTYPE, mode=0o4755, uid=1000, gid=1001, size=3, mtime=1234567890.5, pax_headers=xattrs)
        add("cap", tarfile.REGTYPE, mode=0o755, uid=7, gid=8, pax_headers={"SCHILY.xattr.security.capability": capability})
        add("sticky", tarfile.DIRTYPE, mode=0o1777, uid=5, gid=6, mtime=1000)
        add("sticky/in", tarfile.REGTYPE, mode=0o600)
        add("null", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3)
        add("pipe", tarfile.FIFOTYPE, mode=0o620, uid=3)
        add("link", tarfile.SYMTYPE, linkname="nowhere", uid=4, gid=4, mtime=2000)
        add("n" * 90 + "/" + "m" * 200, tarfile.REGTYPE, size=1)
        add("old", tarfile.REGTYPE, mtime=-5)
        add("far", tarfile.REGTYPE, mtime=2**60)
    root = tmp_path / "root"
    result = extract(root, out.getvalue())
    assert result.skipped_xattrs == 1
    status = os.stat(root / "suid")
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o4755, 1000, 1001)
    assert status.st_mtime_ns == 1234567890_500000000
    assert os.listxattr(root / "suid") == ["user.a"]
    assert "security.capability" in os.listxattr(root / "cap")
    status = os.stat(root / "sticky")
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_mtime) == (0o1777, 5, 1000)
    status = os.stat(root / "null")
    assert stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3) and stat.S_IMODE(status.st_mode) == 0o666
    assert stat.S_ISFIFO(os.stat(root / "pipe").st_mode) and os.stat(root / "pipe").st_uid == 3
    assert os.lstat(root / "link").st_uid == 4 and os.lstat(root / "link").st_mtime == 2000
    assert (root / ("n" * 90) / ("m" * 200)).read_text() == "x"
    assert result.implied == {b"", b"n" * 90}


@pytest.mark.parametrize("form", ["gnu", "posix", "oldgnu"])
@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_gnu_tars_own_archives(tmp_path: Path, form: str, version: str) -> None:
    """Sparse files in each of GNU tar's ways, long names, hard links: the same tree comes out."""
    source = tmp_path / "source"
    (source / ("d" * 120)).mkdir(parents=True)
    (source / ("d" * 120) / ("f" * 150)).write_text("long")
    (source / "link").symlink_to("t" * 150)
    with open(source / "sparse", "wb") as file:
        for offset in range(40):
            file.seek(offset * 100_000)
            file.write(f"{offset}".encode() * 50)
        file.truncate(9_000_000)
    os.link(source / "sparse", source / "hard")
    options = [f"--format={form}", *([f"--sparse-version={version}"] if form == "posix" else [])]
    subprocess.run(["tar", "-C", source, "--sparse", *options, "-cf", tmp_path / "a.tar", "."], check=True)
    root = tmp_path / "root"
    extract(root, (tmp_path / "a.tar").read_bytes())
    assert tree(root) == tree(source)
    assert (root / "sparse").stat().st_blocks * 512 < 4_000_000
    assert (root / "hard").stat().st_ino == (root / "sparse").stat().st_ino


def test_same_as_gnu_tar_for_a_real_tree(tmp_path: Path) -> None:
    """A part of this host's own file system, unpacked by us and by GNU tar."""
    archive = tmp_path / "a.tar"
    subprocess.run(["tar", "-C", "/", "--xattrs", "-cf", archive, "etc", "usr/sbin"], check=True, capture_output=True)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()
    with open(archive, "rb") as file:
        ours.mkdir()
        extractor = Extractor(str(ours), Limits(), allow_absolute=False)
        extractor.run(file.read)
        extractor.close()
    subprocess.run(["tar", "-C", theirs, "--same-owner", "-pxf", archive], check=True)

    def listing(root: Path) -> str:
        form = "%P %y %m %U %G %s %l %n %T@\\n"  # directories' sizes are the file system's matter
        lines = subprocess.run(["find", root, "-mindepth", "1", "-printf", form], capture_output=True, text=True, check=True).stdout
        return "\n".join(sorted(line for line in lines.splitlines() if " d " not in line))

    assert listing(ours) == listing(theirs)


def test_limits(tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="more than 1000 bytes"):
        extract(tmp_path / "a", tar_of(("f", "f", b"x" * 2000)), limits=Limits(max_bytes=1000))
    with pytest.raises(LimitError, match="more than 3 entries"):
        extract(tmp_path / "b", tar_of(*((f"f{i}", "f", "") for i in range(5))), limits=Limits(max_entries=3))
    with pytest.raises(OSError, match="no space left"):
        extract(tmp_path / "c", tar_of(("f", "f", b"x")), limits=Limits(min_free_bytes=1 << 60))


def test_random_damage_never_escapes_nor_crashes(tmp_path: Path, victim: Path) -> None:
    """Bytes of a valid archive changed at random: a result or a typed error, whatever happens inside the root alone."""
    seed = random.randrange(2**32)
    source = random.Random(seed)
    whole = tar_of(
        ("a", "d", None), ("a/b", "f", "x" * 700), ("l", "s", OUT), ("a/h", "h", "a/b"), ("dev", "c", None), ("é" * 80, "f", "y"),
    )  # fmt: skip
    for round_number in range(300):
        data = bytearray(whole)
        for _ in range(source.randrange(1, 6)):
            data[source.randrange(len(data))] = source.randrange(256)
        for start in range(0, len(data), 512):  # checksums made right again, so that the damage gets through
            if source.random() < 0.8 and any(data[start : start + 512]):
                block = data[start : start + 512]
                total = sum(block) - sum(block[148:156]) + 256
                data[start + 148 : start + 156] = b"%06o\0 " % total
        try:
            extract(tmp_path / f"r{round_number % 10}", bytes(data), limits=Limits(max_bytes=1 << 20))
        except (LayerError, LimitError, tarstream.TarError):
            pass
        except OSError as error:
            assert error.errno in (28, 2, 36), f"seed {seed}: {error!r}"
    assert tree(victim) == {"keep": "original"}, f"seed {seed}"


def test_directories_nobody_named_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyx_imaged.extract._IMPLIED_LIMIT", 10_000)
    with pytest.raises(LimitError, match="too many directories"):
        extract(tmp_path / "root", tar_of(("d/" * 500 + "f", "f", "")))

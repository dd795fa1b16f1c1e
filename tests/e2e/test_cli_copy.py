"""cp and export between a real container and files here: Docker's rules on names, links, and what's hostile."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def box(stack: Any) -> Iterator[str]:
    """A running container with a tree in /t, links that lead astray, and a volume."""
    script = """
        mkdir -p /t/d/deep /t/e && echo one > /t/a && echo two > /t/d/b && echo three > /t/d/deep/c && chmod 4755 /t/d/b
        ln /t/a /t/hard && ln -s a /t/soft && ln -s /etc /t/out && ln -s d /t/dirlink && mkfifo /t/fifo && chown 33:34 /t/a
        ln -s ../../../../../../etc/passwd /t/up && echo vol > /v/file && touch -d @1234567890 /t/a
        echo ready; exec sleep 1000
    """
    stack.pyx("run", "-d", "--name", "box", "-v", "boxvol:/v", "busybox", "sh", "-c", script, check=True)
    while "ready" not in stack.pyx("logs", "box").stdout:
        pass
    yield "box"
    stack.pyx("rm", "-f", "box", check=True)
    stack.pyx("volume", "rm", "boxvol", check=True)


@pytest.fixture(params=["running", "stopped"])
def place(request: pytest.FixtureRequest, stack: Any, box: str) -> str:
    if request.param == "stopped" and stack.state(box) == "running":
        stack.pyx("kill", box, check=True)
        stack.pyx("wait", box, check=True)
    if request.param == "running" and stack.state(box) != "running":
        stack.pyx("start", box, check=True)
    return box


def cp(stack: Any, *args: str, **options: Any) -> None:
    done = stack.pyx("cp", *args, **options)
    assert done.returncode == 0, done.stderr


def tree(path: Path) -> list[str]:
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


def test_out_of_a_container(stack: Any, place: str, tmp_path: Path) -> None:
    cp(stack, f"{place}:/t/a", str(tmp_path))  # a file into a directory
    cp(stack, f"{place}:/t/a", str(tmp_path / "renamed"))
    cp(stack, f"{place}:t/a", str(tmp_path / "renamed"))  # over a file; paths begin at the root
    assert (tmp_path / "renamed").read_text() == (tmp_path / "a").read_text() == "one\n"
    assert (tmp_path / "a").stat().st_mtime == 1234567890 and (tmp_path / "a").stat().st_uid == os.getuid()
    cp(stack, f"{place}:/t/d", str(tmp_path / "new"))  # a directory to what isn't there
    assert tree(tmp_path / "new") == ["b", "deep", "deep/c"] and (tmp_path / "new" / "b").stat().st_mode & 0o7777 == 0o4755
    cp(stack, f"{place}:/t/d", str(tmp_path / "new"))  # now it's there
    assert "d/deep/c" in tree(tmp_path / "new")
    (tmp_path / "into").mkdir()
    cp(stack, f"{place}:/t/d/.", str(tmp_path / "into"))  # what's in it
    cp(stack, f"{place}:/t/d/.", str(tmp_path / "content"))
    assert tree(tmp_path / "into") == tree(tmp_path / "content") == ["b", "deep", "deep/c"]
    cp(stack, f"{place}:/t/soft", str(tmp_path))
    assert os.readlink(tmp_path / "soft") == "a"
    cp(stack, "-L", f"{place}:/t/soft", str(tmp_path / "followed"))
    assert (tmp_path / "followed").read_text() == "one\n"
    (tmp_path / "named").mkdir()
    cp(stack, "-L", f"{place}:/t/dirlink", str(tmp_path / "named"))
    assert "dirlink/b" in tree(tmp_path / "named")
    cp(stack, "-a", f"{place}:/t/a", str(tmp_path / "owned"))
    assert ((tmp_path / "owned").stat().st_uid, (tmp_path / "owned").stat().st_gid) == (33, 34)
    cp(stack, f"{place}:/v/file", str(tmp_path / "of-volume"))
    assert (tmp_path / "of-volume").read_text() == "vol\n"


def test_out_as_an_archive(stack: Any, place: str) -> None:
    done = subprocess.run([stack_pyx(), "cp", f"{place}:/t", "-"], env=stack.env, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        found = {entry.name: entry for entry in tar}
    assert found["t"].isdir() and found["t/fifo"].isfifo() and found["t/soft"].linkname == "a"
    assert {found["t/a"].type, found["t/hard"].type} == {tarfile.REGTYPE, tarfile.LNKTYPE}
    assert (found["t/a"].uid, found["t/a"].gid, found["t/out"].linkname) == (33, 34, "/etc")


def stack_pyx() -> str:
    from tests.e2e.conftest import PYX

    return str(PYX)


def test_into_a_container(stack: Any, place: str, tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "sub").mkdir(parents=True)
    (source / "file").write_text("new\n")
    (source / "sub" / "x").write_text("x\n")
    (source / "sub" / "x").chmod(0o4711)
    os.link(source / "file", source / "same")
    os.chown(source / "file", 1234, 1234)
    inside = f"{place}:/in-{stack.state(place)}"
    cp(stack, str(source), inside)  # to what isn't there
    cp(stack, str(source), inside)  # into what's there
    cp(stack, f"{source}/.", inside)
    cp(stack, "-q", str(source / "file"), f"{inside}/sub/x")  # over a file
    cp(stack, str(source / "file"), f"{inside}/other")
    cp(stack, str(source / "file"), f"{place}:/v/copied")
    cp(stack, "-a", str(source / "file"), f"{inside}/kept")
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        tar.add(source / "sub", "deeper/sub")
    subprocess.run([stack_pyx(), "cp", "-", inside], input=data.getvalue(), env=stack.env, check=True)
    cp(stack, inside, str(tmp_path / "back"))
    assert tree(tmp_path / "back") == [
        "deeper", "deeper/sub", "deeper/sub/x", "file", "kept", "other", "same", "src", "src/file", "src/same", "src/sub", "src/sub/x",
        "sub", "sub/x",
    ]  # fmt: skip
    assert (tmp_path / "back" / "sub" / "x").read_text() == "new\n"
    assert (tmp_path / "back" / "deeper" / "sub" / "x").stat().st_mode & 0o7777 == 0o4711
    assert (tmp_path / "back" / "file").stat().st_ino == (tmp_path / "back" / "same").stat().st_ino
    cp(stack, "-a", inside, str(tmp_path / "owners"))
    assert ((tmp_path / "owners" / "file").stat().st_uid, (tmp_path / "owners" / "kept").stat().st_uid) == (0, 1234)
    stack.pyx("start", place, check=True)
    assert stack.pyx("exec", place, "cat", "/v/copied").stdout == "new\n"


def test_what_cannot_be(stack: Any, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for args, words in (
        ((f"{place}:/nope", str(tmp_path)), "could not find the file /nope"),
        (("nobody:/x", str(tmp_path)), 'no such container: "nobody"'),
        ((f"{place}:/t/d", str(tmp_path / "file")), "cannot copy directory"),
        ((f"{place}:/t/a", str(tmp_path / "no" / "where")), "does not exist"),
        ((str(tmp_path / "missing"), f"{place}:/"), "no such file"),
        ((str(tmp_path), f"{place}:/t/a"), "cannot copy directory"),
        ((str(tmp_path / "file"), f"{place}:/t/nope/"), "no such directory"),
        ((str(tmp_path / "file"), f"{place}:/t/no/where"), "could not find"),
        ((str(tmp_path / "file"), f"{place}:/t/fifo"), "must be a directory or a regular file"),
        (("-", f"{place}:/t/a"), "must be a directory"),
        (("-", f"{place}:/t"), "not a tar archive"),
        ((f"{place}:/t", f"{place}:/e"), "between containers"),
        (("a", "b"), "at least one container"),
    ):
        done = stack.pyx("cp", *args, input="this is no archive" * 100)
        assert done.returncode == 1 and words in done.stderr, (args, done.stderr)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("d"))  # a file where there's a directory
    done = subprocess.run([stack_pyx(), "cp", "-", f"{place}:/t"], input=data.getvalue(), env=stack.env, capture_output=True)
    assert done.returncode == 1 and b'cannot overwrite directory "d"' in done.stderr


def test_links_lead_nowhere_outside(stack: Any, place: str, tmp_path: Path) -> None:
    """/t/up and /t/out are links a hostile container has laid out; the host's files stay what and where they are."""
    marker = tmp_path / "marker"
    marker.write_text("evil")
    before = Path("/etc/passwd").read_bytes()
    cp(stack, str(marker), f"{place}:/t/up")  # its own /etc/passwd
    cp(stack, str(marker), f"{place}:/t/out/marker")
    assert Path("/etc/passwd").read_bytes() == before and not Path("/etc/marker").exists()
    cp(stack, "-L", f"{place}:/t/up", str(tmp_path / "theirs"))
    assert (tmp_path / "theirs").read_text() == "evil"
    for name, target in (("../escaped", ""), ("link/file", str(tmp_path / "victim"))):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            if target:
                link = tarfile.TarInfo("link")
                link.type, link.linkname = tarfile.SYMTYPE, target
                tar.addfile(link)
            tar.addfile(tarfile.TarInfo(name))
        (tmp_path / "victim").mkdir(exist_ok=True)
        done = subprocess.run([stack_pyx(), "cp", "-", f"{place}:/t/e"], input=data.getvalue(), env=stack.env, capture_output=True)
        assert done.returncode == 1, done
        assert list((tmp_path / "victim").iterdir()) == []


def test_export(stack: Any, place: str, tmp_path: Path) -> None:
    stack.pyx("export", "-o", str(tmp_path / "all.tar"), place, check=True)
    with tarfile.open(tmp_path / "all.tar") as tar:
        names = tar.getnames()
    assert "bin/busybox" in names and "t/d/deep/c" in names
    assert "v/file" not in names and not any(name.startswith(("proc/", "./")) for name in names)
    done = subprocess.run(f"{stack_pyx()} export {place} | tar -t | wc -l", shell=True, env=stack.env, capture_output=True)
    assert int(done.stdout) == len(names)
    told = stack.pyx("events", "--since", "1m", "--until", "0s", "-f", f"container={place}", "--format", "{{.Action}}").stdout.split()
    assert "export" in told and "copy" in told


def test_read_only_stays_so(stack: Any, tmp_path: Path) -> None:
    stack.pyx("run", "-d", "--name", "fixed", "--read-only", "-v", "rovol:/r:ro", "-v", "rwvol:/w", "busybox", "sleep", "100", check=True)
    (tmp_path / "f").write_text("x")
    try:
        for to, code in (("/f", 1), ("/r/f", 1), ("/w/f", 0)):
            done = stack.pyx("cp", str(tmp_path / "f"), f"fixed:{to}")
            assert done.returncode == code and ("read-only file system" in done.stderr) == bool(code), done.stderr
    finally:
        stack.pyx("rm", "-f", "fixed", check=True)
        stack.pyx("volume", "rm", "rovol", "rwvol", check=True)


def test_a_reader_that_stops_holds_nobody_up(stack: Any, box: str) -> None:
    """A start and a removal end the copies that are under way."""
    stack.pyx("run", "-d", "--name", "big", "busybox", "sh", "-c", "head -c 4000000 /dev/zero > /x; sleep 100", check=True)
    stack.pyx("kill", "big", check=True)
    stack.pyx("wait", "big", check=True)
    with stack.popen("export", "big", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as export:
        assert export.stdout is not None and export.stderr is not None
        assert export.stdout.read(1000)
        stack.pyx("start", "big", check=True)
        export.stdout.close()
        assert b"was started or removed meanwhile" in export.stderr.read()
        assert export.wait(10) == 1
    with stack.popen("export", "big", stdout=subprocess.PIPE) as export:
        assert export.stdout is not None and export.stdout.read(1000)
        stack.pyx("rm", "-f", "big", check=True)
        export.stdout.close()
        assert export.wait(10) == 1

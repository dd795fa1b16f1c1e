"""Bad input: each a clear error of one line, the right exit code, nothing half-made left behind, and the stack unharmed."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.conftest import wait_for


def traces(stack: Any) -> dict[str, list[str]]:
    """What containers and images leave in the kernel and on disk."""

    def names(path: Path) -> list[str]:
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    table = stack.prefix.replace("-", "_")
    listing = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    mountinfo = Path("/proc/self/mountinfo").read_text().splitlines()
    inside = False
    rules = []
    for line in listing.splitlines():
        if line.startswith("table "):
            inside = table in line or stack.prefix in line
        if inside:
            rules.append(line)
    return {
        "mounts": sorted(line.split()[4] for line in mountinfo if str(stack.run) in line),
        "links": names(Path(f"/sys/class/net/{stack.prefix}/brif")),
        "nft": rules,
        "cgroups": sorted(str(p) for base in Path("/sys/fs/cgroup").glob("*") for p in base.glob(f"{stack.prefix}/*")),
        "bundles": names(stack.run / "containerd/bundles"),
        "snapshots": names(stack.root / "imaged/snapshots"),
        "logs": names(stack.root / "logd"),
        "volumes": names(stack.root / "volumed/volumes"),
        "containers": stack.pyx("ps", "-aq", "--no-trunc", check=True).stdout.split(),
        "images": sorted(stack.pyx("images", "-q", "--no-trunc", check=True).stdout.split()),
        "shims": sorted(
            entry.name
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and str(stack.run) in _cwd(entry)
        ),
    }  # fmt: skip


def _cwd(entry: Path) -> str:
    try:
        return os.readlink(entry / "cwd")
    except OSError:
        return ""


@pytest.fixture
def unchanged(stack: Any) -> Iterator[None]:
    """The test must leave everything as it was, once the background clean-up of those before it is through."""
    wait_for(lambda: not traces(stack)["bundles"], 10, "the end of earlier clean-ups")
    before = traces(stack)
    yield
    assert_as(stack, before)


def assert_as(stack: Any, before: dict[str, list[str]]) -> None:
    """Everything is as it was, at the latest when the last background clean-up is through."""
    try:
        wait_for(lambda: traces(stack) == before, 10)
    except AssertionError:
        now = traces(stack)
        changed = {key: (before[key], now[key]) for key in before if before[key] != now[key]}
        raise AssertionError(f"something changed (before, now): {changed}") from None


def refused(stack: Any, *args: str, code: int, says: str) -> None:
    """The command fails with one line that says it (and maybe a hint)."""
    done = stack.pyx(*args)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, (done.returncode, done.stderr)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith(("hint: ", "See "))), done.stderr


def test_unknown_image(stack: Any, unchanged: None) -> None:
    refused(stack, "run", "--rm", "--pull", "never", "no-such-image", code=125, says="no-such-image")


def test_name_in_use(stack: Any) -> None:
    stack.pyx("create", "--name", "taken", "busybox", "true", check=True)
    try:
        before = traces(stack)
        refused(stack, "run", "--name", "taken", "busybox", "true", code=125, says="taken")
        assert_as(stack, before)
    finally:
        stack.pyx("rm", "taken", check=True)


def test_port_in_use_by_the_host(stack: Any, unchanged: None) -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        refused(stack, "run", "--rm", "-p", f"{port}:80", "busybox", "true", code=125, says=str(port))


def test_port_in_use_by_a_container(stack: Any) -> None:
    stack.pyx("run", "-d", "--name", "holder", "-p", "18081:80", "busybox", "sleep", "1000", check=True)
    try:
        before = traces(stack)
        refused(stack, "run", "--rm", "-p", "18081:80", "busybox", "true", code=125, says="18081")
        assert_as(stack, before)
    finally:
        stack.pyx("rm", "-f", "holder", check=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-v", "/etc:relative"], "relative"),
        (["-v", "/a:/b:/c:/d"], "/a:/b:/c:/d"),
        (["-v", "bad/name:/x"], "bad/name"),
        (["-v", "/etc:/x", "-v", "/usr:/x"], "/x"),
        (["--mount", "type=bind,source=/no/such/path,target=/x"], "/no/such/path"),
        (["--mount", "type=nonsense,target=/x"], "nonsense"),
        (["--tmpfs", "relative"], "relative"),
        (["-v", "/etc:/"], "/"),
    ],
)
def test_bad_mounts(stack: Any, unchanged: None, options: list[str], says: str) -> None:
    refused(stack, "run", "--rm", *options, "busybox", "true", code=125, says=says)


def test_unknown_network(stack: Any, unchanged: None) -> None:
    refused(stack, "run", "--rm", "--network", "no-such-net", "busybox", "true", code=125, says="no-such-net")


def test_bad_signal(stack: Any) -> None:
    stack.pyx("run", "-d", "--name", "target", "busybox", "sleep", "1000", check=True)
    try:
        refused(stack, "kill", "-s", "SIGNONSENSE", "target", code=1, says="NONSENSE")
        refused(stack, "stop", "-s", "9999", "target", code=1, says="9999")
        assert stack.state("target") == "running"
    finally:
        stack.pyx("rm", "-f", "target", check=True)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--no-such-flag"], 125, "no-such-flag"),
        (["--memory", "lots"], 125, "lots"),
        (["--memory", "1k"], 125, "memory"),
        (["-p", "99999:80"], 125, "99999"),
        (["-p", "80:80/xyz"], 125, "xyz"),
        (["--name", "bad name"], 125, "bad name"),
        (["--user", "no-such-user"], 125, "no-such-user"),
        (["--runtime", "no-such-runtime"], 125, "no-such-runtime"),
        (["--log-driver", "no-such-driver"], 125, "no-such-driver"),
        (["--cap-add", "NO_SUCH_CAP"], 125, "NO_SUCH_CAP"),
        (["--cpus", "1000"], 125, "number of CPUs"),
        (["--env-file", "/no/such/file"], 125, "/no/such/file"),
        (["--add-host", "nonsense"], 125, "nonsense"),
        (["--ulimit", "nofile=x"], 125, "nofile"),
    ],
)
def test_bad_options_of_run(stack: Any, unchanged: None, options: list[str], code: int, says: str) -> None:
    refused(stack, "run", "--rm", *options, "busybox", "true", code=code, says=says)


@pytest.mark.parametrize(
    "command", ["stop", "kill", "rm", "logs", "inspect", "start", "pause", "exec", "attach", "wait", "port"]
)
def test_unknown_container(stack: Any, command: str) -> None:
    extra = ["true"] if command == "exec" else []
    done = stack.pyx(command, "nobody", *extra)
    assert done.returncode == 1
    assert "nobody" in done.stderr


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o755
    return info


@pytest.mark.parametrize(
    "members",
    [
        [(member("../escaped"), b"x")],
        [(member("a/../../escaped"), b"x")],
        [(member("d", tarfile.SYMTYPE, "../.."), b""), (member("d/escaped"), b"x")],
        [(member("h", tarfile.LNKTYPE, "../../escaped"), b"")],
    ],
    ids=["dotdot", "inner dotdot", "through a link", "hard link"],
)
def test_hostile_root_file_systems(stack: Any, unchanged: None, tmp_path: Path, members: Any) -> None:
    path = archive(tmp_path / "evil.tar", *members)
    refused(stack, "import", str(path), "evil:latest", code=1, says="")
    assert not list(stack.root.rglob("escaped"))
    assert not (tmp_path / "escaped").exists()


def test_links_that_point_outside_stay_inside(stack: Any, tmp_path: Path) -> None:
    """An absolute link in a layer is fine (every distribution has some) as long as nothing is written through it to the outside."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = archive(
        tmp_path / "links.tar",
        (member("etc", tarfile.DIRTYPE), b""),
        (member("etc/link", tarfile.SYMTYPE, str(victim)), b""),
        (member("etc/link"), b"overwritten"),
    )
    done = stack.pyx("import", str(path), "links:latest")
    assert victim.read_text() == "mine"
    if done.returncode == 0:
        stack.pyx("rmi", "links:latest", check=True)


def test_truncated_and_garbage_archives(stack: Any, unchanged: None, tmp_path: Path) -> None:
    whole = archive(tmp_path / "whole.tar", (member("file"), os.urandom(200_000))).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:100_000])
    (tmp_path / "garbage.tar").write_bytes(os.urandom(50_000))
    (tmp_path / "empty.tar").write_bytes(b"")
    for name in ("cut.tar", "garbage.tar", "empty.tar"):
        refused(stack, "import", str(tmp_path / name), "broken:latest", code=1, says="")
        done = stack.pyx("load", "-i", str(tmp_path / name))
        assert done.returncode == 1
        assert "Traceback" not in done.stderr


def test_archive_with_a_wrong_digest(stack: Any, unchanged: None, tmp_path: Path) -> None:
    """An OCI layout one of whose blobs isn't what its name says."""
    layout = tmp_path / "layout"
    base = tmp_path / "base.tar"
    archive(base, (member("file"), b"content"))
    subprocess.run(["umoci", "init", "--layout", layout], check=True, capture_output=True)
    subprocess.run(["umoci", "new", "--image", f"{layout}:t"], check=True, capture_output=True)
    subprocess.run(["umoci", "raw", "add-layer", "--image", f"{layout}:t", base], check=True, capture_output=True)
    biggest = max((layout / "blobs/sha256").iterdir(), key=lambda blob: blob.stat().st_size)
    data = bytearray(biggest.read_bytes())
    data[len(data) // 2] ^= 1
    biggest.write_bytes(data)
    tar = tmp_path / "layout.tar"
    with tarfile.open(tar, "w") as out:
        out.add(layout, ".")
    refused(stack, "load", "-i", str(tar), code=1, says="")


def test_garbage_on_the_bus_socket(stack: Any) -> None:
    for data in (os.urandom(4096), b"\xff" * 100, b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            directory = os.open(stack.run, os.O_PATH | os.O_DIRECTORY)
            try:
                sock.connect(f"/proc/self/fd/{directory}/bus.sock")
            finally:
                os.close(directory)
            sock.sendall(data)
            try:
                while sock.recv(65536):
                    pass
            except ConnectionResetError:
                pass
    assert stack.pyx("ps").returncode == 0

"""The shim and its zygote with a real runtime, without any service: what they hold, what they tell, and what outlives whom."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest
import trio
from tests.images import busybox_tar

from pyx_bus import errors
from pyx_containerd import kernel, probe, shim
from pyx_containerd.drivers.runtime import LOG_FILE, PID_FILE, Runtime, parse_failure
from pyx_containerd.shims import RuntimeFailed, Shim, Zygote

RUNC = shutil.which("runc", path="/usr/sbin:/usr/bin:/sbin:/bin")


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory):
    place = tmp_path_factory.mktemp("image")
    busybox_tar(place / "busybox.tar")
    (place / "rootfs").mkdir()
    subprocess.run(["tar", "-xf", place / "busybox.tar", "-C", place / "rootfs"], check=True)
    return place / "rootfs"


class Box:
    """One bundle with its shim."""

    def __init__(self, directory: Path, rootfs: Path, nursery: trio.Nursery, zygote: Zygote) -> None:
        self.id = f"shim-test-{os.getpid()}-{time.monotonic_ns() % 10**9}"
        self.bundle = directory / self.id
        self.bundle.mkdir()
        self.rootfs = rootfs
        self.nursery = nursery
        self.zygote = zygote
        self.cgroup = f"/{self.id}"
        state = directory / "state"
        state.mkdir(exist_ok=True)
        self.runtime = Runtime("runc", RUNC, str(state))
        self.exits = []
        self.exited = trio.Event()
        self.lost = trio.Event()

    def write(self, *args, tty=False):
        config = probe._bundle(self.cgroup)
        config["process"] = {
            "terminal": tty,
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "cwd": "/",
            "env": ["PATH=/bin"],
            "capabilities": {kind: ["CAP_KILL"] for kind in ("bounding", "effective", "permitted")},
        }
        config["root"] = {"path": str(self.rootfs)}
        dev = {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}
        options = ["newinstance", "ptmxmode=0666"]
        config["mounts"] += [dev, {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": options}]
        (self.bundle / "config.json").write_text(json.dumps(config))

    async def fork(self):
        self.shim = Shim(self.zygote.fork(self.bundle, self.id))
        self.serve(self.shim)

    def serve(self, connection):
        async def on_exit(exit_):
            self.exits.append(exit_)
            self.exited.set()

        async def on_lost():
            self.lost.set()

        self.nursery.start_soon(connection.serve, on_exit, on_lost)

    async def start(self, *args, stdin=None):
        """Run a container; (pid, stdout's read end)."""
        self.write(*args)
        out_reader, out_writer = os.pipe()
        null = os.open("/dev/null", os.O_RDWR)
        try:
            argv = self.runtime.run(self.id, tty=False)
            stdio = (null if stdin is None else stdin, out_writer, null)
            pid, master = await self.shim.spawn("", argv, PID_FILE, stdio=stdio, kept={"stdout": out_reader})
            assert master == -1
        finally:
            os.close(out_writer)
            os.close(null)
        return pid, out_reader

    async def finish(self):
        await self.shim.run(self.runtime.delete(self.id))
        pid = (await self.shim.state()).shim_pid
        await self.shim.end()
        with trio.fail_after(5):
            while Path(f"/proc/{pid}").exists():
                await trio.sleep(0.005)
        assert kernel.cgroup_directories(self.cgroup) == []
        shutil.rmtree(self.bundle)


@pytest.fixture
async def box(tmp_path, rootfs):
    zygote = Zygote()
    zygote.start()
    async with trio.open_nursery() as nursery:
        made = Box(tmp_path, rootfs, nursery, zygote)
        await made.fork()
        yield made
        nursery.cancel_scope.cancel()
    zygote.close()


async def test_exit_output_and_file(box):
    _, reader = await box.start("sh", "-c", "echo hello; exit 7")
    with trio.fail_after(5):
        await box.exited.wait()
    (exit_,) = box.exits
    assert (exit_.key, exit_.code, exit_.signal) == ("", 7, 0)
    assert abs(exit_.time_ns - time.time_ns()) < 5 * 10**9
    assert shim.read_exit((box.bundle / "exit").read_bytes())[0] == 7
    with open(reader, "rb") as file:
        assert file.read() == b"hello\n"  # to its end: nobody else holds the write end
    state = await box.shim.state()
    assert (state.phase, state.exit.code) == ("exited", 7)
    with pytest.raises(ProcessLookupError):
        await box.shim.kill("", 15)
    await box.finish()


async def test_the_shim_is_the_parent_and_holds_only_what_it_should(box):
    pid, reader = await box.start("sleep", "100")
    state = await box.shim.state()
    status = Path(f"/proc/{pid}/status").read_text()
    assert f"PPid:\t{state.shim_pid}\n" in status
    assert int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn")), 16) & 0x7FFFFFFF == 0
    assert Path(f"/proc/{state.shim_pid}/comm").read_text() == f"pyx-s:{box.id[:9]}\n"
    writable = []
    for fd in os.listdir(f"/proc/{state.shim_pid}/fd"):
        target = os.readlink(f"/proc/{state.shim_pid}/fd/{fd}")
        flags = int(Path(f"/proc/{state.shim_pid}/fdinfo/{fd}").read_text().split()[3], 8)
        if target.startswith("pipe:") and target == os.readlink(f"/proc/self/fd/{reader}") and flags & os.O_ACCMODE:
            writable.append(fd)
    assert writable == []
    await box.shim.kill("", signal.SIGKILL)
    with trio.fail_after(5):
        await box.exited.wait()
    assert (box.exits[0].code, box.exits[0].signal) == (137, 9)
    os.close(reader)
    await box.finish()


async def test_it_outlives_its_client_and_the_zygote(box):
    pid, reader = await box.start("sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.02; done")
    assert await trio.to_thread.run_sync(os.read, reader, 10) == b"ready\n"
    box.shim.close()
    zygote = box.zygote.pid
    box.zygote.close()
    assert not Path(f"/proc/{zygote}").exists()
    os.kill(pid, signal.SIGTERM)
    with trio.fail_after(5):
        while not (box.bundle / "exit").exists():
            await trio.sleep(0.005)
    box.shim = Shim.connect(box.bundle)
    box.serve(box.shim)
    state = await box.shim.state()
    assert (state.phase, state.init_pid, state.exit.code) == ("exited", pid, 3)
    held = await box.shim.descriptors()
    assert list(held) == ["stdout"]
    assert os.readlink(f"/proc/self/fd/{held['stdout']}") == os.readlink(f"/proc/self/fd/{reader}")
    os.close(held["stdout"])
    os.close(reader)
    await box.finish()


async def test_without_a_container_it_goes_with_its_client(box):
    pid = (await box.shim.state()).shim_pid
    box.shim.close()
    with trio.fail_after(5):
        while Path(f"/proc/{pid}").exists():
            await trio.sleep(0.005)
    shutil.rmtree(box.bundle)


async def test_failed_start(box):
    with pytest.raises(RuntimeFailed):
        await box.start("nope")
    failure = parse_failure((box.bundle / LOG_FILE).read_text())
    assert failure.exit_code == 127
    assert (await box.shim.state()).phase == "none"
    assert await box.shim.descriptors() == {}
    await box.finish()


async def test_exec_and_orphans(box):
    _, reader = await box.start("sleep", "100")
    process = {"user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", "(sleep 0.05; :) & exit 9"], "cwd": "/", "env": ["PATH=/bin"]}
    (box.bundle / "exec-k1.json").write_text(json.dumps(process))
    null = os.open("/dev/null", os.O_RDWR)
    pid, _ = await box.shim.spawn("k1", box.runtime.exec(box.id, "k1", tty=False), "exec-k1.pid", stdio=(null, null, null))
    os.close(null)
    assert pid > 0
    with trio.fail_after(5):
        await box.exited.wait()
    assert (box.exits[0].key, box.exits[0].code) == ("k1", 9)
    await box.shim.kill("", 9)
    with trio.fail_after(5):
        while len(box.exits) < 2:
            await trio.sleep(0.005)
    shim_pid = (await box.shim.state()).shim_pid
    children = Path(f"/proc/{shim_pid}/task/{shim_pid}/children").read_text()
    assert children == ""  # no zombie is left
    os.close(reader)
    await box.finish()


async def test_terminal(box):
    box.write("sh", "-c", "stty size; read line; exit 4", tty=True)
    argv = box.runtime.run(box.id, tty=True)
    _, master = await box.shim.spawn("", argv, PID_FILE, stdio=None, size=(25, 70))
    import fcntl

    assert struct.unpack("HHHH", fcntl.ioctl(master, termios.TIOCGWINSZ, bytes(8)))[:2] == (25, 70)
    assert (await trio.to_thread.run_sync(os.read, master, 100)).startswith(b"25 70")
    assert list(await box.shim.descriptors()) == ["tty"]
    os.write(master, b"x\n")
    with trio.fail_after(5):
        await box.exited.wait()
    assert box.exits[0].code == 4
    assert [name for name in os.listdir(box.bundle) if name.startswith("console")] == []
    os.close(master)
    await box.finish()


async def test_stdin_is_given_away_once(box):
    reader, writer = os.pipe()
    box.write("cat")
    out_reader, out_writer = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    argv = box.runtime.run(box.id, tty=False)
    await box.shim.spawn("", argv, PID_FILE, stdio=(reader, out_writer, null), kept={"stdin": writer, "stdout": out_reader})
    for fd in (reader, writer, out_writer, null):
        os.close(fd)
    held = await box.shim.descriptors(take_stdin=True)
    os.write(held["stdin"], b"x")
    os.close(held["stdin"])
    with trio.fail_after(5):
        await box.exited.wait()  # the end of input has come through: the shim holds no writer any more
    assert os.read(out_reader, 10) == b"x"
    os.close(out_reader)
    os.close(held["stdout"])
    await box.finish()


async def test_garbage_on_its_socket_harms_nobody(box):
    _, reader = await box.start("sleep", "100")
    import socket

    for data in (b"\xff" * 100, b"\x01", shim.encode(99, 1, []), shim.encode(shim.SPAWN, 1, []), shim.encode(shim.KILL, 1, [b"", b"x"])):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        directory = os.open(box.bundle, os.O_PATH)
        sock.connect(f"/proc/self/fd/{directory}/shim.sock")
        os.close(directory)
        sock.send(data)
        sock.settimeout(5)
        answer = sock.recv(1000)
        assert answer == b"" or shim.decode(answer)[0] == shim.FAILED
        sock.close()
    assert (await box.shim.state()).phase == "running"
    await box.shim.kill("", 9)
    await box.exited.wait()
    os.close(reader)
    await box.finish()


async def test_a_dead_zygote_is_replaced(box):
    assert (await box.shim.state()).phase == "none"
    os.kill(box.zygote.pid, signal.SIGKILL)
    other = Box(box.bundle.parent, box.rootfs, box.nursery, box.zygote)
    for _ in range(3):  # the first message may still have gone into the dying one's socket
        await other.fork()
        try:
            state = await other.shim.state()
            break
        except errors.Unavailable:
            continue
    assert state.phase == "none"
    await other.finish()
    await box.finish()


def test_the_probes_program_runs(tmp_path):
    import platform

    binary = probe.program(platform.machine())
    assert binary
    path = tmp_path / "exit"
    path.write_bytes(binary)
    path.chmod(0o755)
    assert subprocess.run([path]).returncode == 42


async def test_memory_of_a_shim(box):
    _, reader = await box.start("sleep", "100")
    pid = (await box.shim.state()).shim_pid
    rollup = dict(line.split()[:2] for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    # what it has for itself; the rest is shared with the zygote, the other shims and every Python on the host
    assert int(rollup["Private_Dirty:"]) < 1536, rollup
    await box.shim.kill("", 9)
    await box.exited.wait()
    os.close(reader)
    await box.finish()


async def test_an_exec_s_exit_is_told_before_its_container_s(box):
    """Both are over when the shim looks: the container's end ends all execs nobody has heard of.

    Without a PID namespace: with one the kernel itself lets init end last.
    """
    write = box.write

    def in_the_host_s_namespace(*args):
        write(*args)
        config = json.loads((box.bundle / "config.json").read_text())
        config["linux"]["namespaces"] = [entry for entry in config["linux"]["namespaces"] if entry["type"] != "pid"]
        (box.bundle / "config.json").write_text(json.dumps(config))

    box.write = in_the_host_s_namespace
    pid, reader = await box.start("sleep", "1000")
    process = json.loads((box.bundle / "config.json").read_text())["process"]
    process["args"] = ["sh", "-c", "trap 'exit 3' TERM; sleep 1000 & wait"]
    (box.bundle / "exec-x.json").write_text(json.dumps(process))
    null = os.open("/dev/null", os.O_RDWR)
    exec_pid, _ = await box.shim.spawn(
        "x", box.runtime.exec(box.id, "x", tty=False), "exec-x.pid", stdio=(null, null, null)
    )
    with trio.fail_after(5):  # its trap is set when it has its child
        while not Path(f"/proc/{exec_pid}/task/{exec_pid}/children").read_text():
            await trio.sleep(0.005)
    shim_pid = (await box.shim.state()).shim_pid
    assert os.readlink(f"/proc/{shim_pid}/fd/2") == "/dev/null"
    os.kill(shim_pid, signal.SIGSTOP)
    try:
        for number, word in ((exec_pid, signal.SIGTERM), (pid, signal.SIGKILL)):
            os.kill(number, word)
            with trio.fail_after(5):
                while Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    await trio.sleep(0.005)
    finally:
        os.kill(shim_pid, signal.SIGCONT)
    with trio.fail_after(5):
        while len(box.exits) < 2:
            await trio.sleep(0.005)
    assert [(exit_.key, exit_.code) for exit_ in box.exits] == [("x", 3), ("", 137)]
    os.close(null)
    os.close(reader)
    await box.finish()

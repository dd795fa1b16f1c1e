"""The supervisor: what dies comes back, containers outlive the stack and its supervisor, and it ends in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.images import busybox_tar

from .conftest import Stack, wait_for

pytestmark = pytest.mark.root


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stack]:
    """A stack of the test's own, to be mistreated."""
    stack = Stack(tmp_path / "root", tmp_path / "run")
    stack.pyx("system", "up", "--detach", check=True)
    yield stack
    if stack.pyx("ps").returncode:
        stack.pyx("system", "up", "--detach", check=True)
    ids = stack.pyx("ps", "-aq", check=True).stdout.split()
    if ids:
        stack.pyx("rm", "-f", *ids, check=True)
    stack.pyx("system", "down", check=True)
    wait_for(lambda: not stack.leftovers(), 10, f"a clean host; left: {stack.leftovers()}")


def _supervisor(stack: Stack) -> int:
    return int((stack.run / "supervisor.pid").read_text())


def _alive(pid: int) -> bool:
    """A process that has ended but isn't reaped yet doesn't count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_containers_outlive_the_stack_and_a_killed_supervisor(own: Stack, tmp_path: Path) -> None:
    own.pyx("import", str(busybox_tar(tmp_path / "busybox.tar")), "busybox", check=True)
    own.pyx("run", "-d", "--name", "lasting", "busybox", "sh", "-c", "while :; do echo tick; sleep 0.1; done", check=True)
    pid = own.pyx("inspect", "-f", "{{.State.Pid}}", "lasting", check=True).stdout.strip()

    down = own.pyx("system", "down", check=True)
    assert "1 container goes on running" in down.stderr
    assert _alive(int(pid))
    assert own.pyx("ps").returncode == 1
    own.pyx("system", "up", "--detach", check=True)
    assert own.state("lasting") == "running"

    services = [own.service_pid(name) for name in ("busd", "containerd", "logd")]
    os.kill(_supervisor(own), signal.SIGKILL)
    wait_for(lambda: not any(_alive(service) for service in services), 15, "the services' end")
    assert _alive(int(pid))
    own.pyx("system", "up", "--detach", check=True)
    assert own.pyx("inspect", "-f", "{{.State.Pid}}", "lasting", check=True).stdout.strip() == pid
    assert own.pyx("exec", "lasting", "echo", "alive").stdout == "alive\n"


def test_down_with_the_containers_leaves_nothing_of_them(own: Stack, tmp_path: Path) -> None:
    own.pyx("import", str(busybox_tar(tmp_path / "busybox.tar")), "busybox", check=True)
    for _ in range(2):
        for _ in range(2):
            own.pyx("run", "-d", "--stop-timeout", "1", "busybox", "sleep", "1000", check=True)
        own.pyx("system", "down", "--stop-containers", check=True)
        for place in ("bundles", "runtime/runc", "runtime/crun"):
            assert not any((own.run / "containerd" / place).glob("*"))
        assert not own.leftovers()
        own.pyx("system", "up", "--detach", check=True)


def test_up_again_right_after_kill_waits_for_the_old_services(own: Stack) -> None:
    old = own.service_pid("containerd")
    os.kill(_supervisor(own), signal.SIGKILL)
    own.pyx("system", "up", "--detach", check=True)
    assert not _alive(old)
    assert own.pyx("ps", check=True).stdout.startswith("CONTAINER ID")


def test_each_service_is_a_process_of_its_name_and_comes_back(own: Stack) -> None:
    for name in ("busd", "containerd", "imaged", "logd", "netd", "volumed"):
        pid = own.service_pid(name)
        assert _name(pid) == f"pyx-{name}"
        assert Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] == f"pyx-{name}".encode()
        assert len(os.listdir(f"/proc/{pid}/fd")) < 64
    assert _name(_supervisor(own)) == "pyx-supervisor"
    old = own.service_pid("imaged")
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: own.service_pid("imaged") != old, 5, "a new imaged")
    wait_for(lambda: own.pyx("images").returncode == 0, 10, "an answer of the new imaged")


def test_in_the_foreground_it_ends_with_ctrl_c(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "root", tmp_path / "run")
    with open(tmp_path / "out", "wb") as out, stack.popen("system", "up", stdout=out, stderr=out) as process:
        wait_for(lambda: stack.pyx("version").returncode == 0, 20, "a stack")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    wait_for(lambda: not stack.leftovers(), 10, "a clean host")


def up_with(tmp_path: Path, config: str, timeout: str) -> subprocess.CompletedProcess[str]:
    """What ``up --detach`` says with this configuration; the stack is gone afterwards."""
    (tmp_path / "config.toml").write_text(config)
    stack = Stack(tmp_path / "root", tmp_path / "run")
    stack.env["PYX_CONFIG"] = str(tmp_path / "config.toml")
    try:
        return stack.pyx("system", "up", "--detach", "--timeout", timeout)
    finally:
        stack.pyx("system", "down", check=True)
        assert not stack.leftovers()


def test_what_does_not_get_ready_is_named(tmp_path: Path) -> None:
    done = up_with(tmp_path, "[imaged]\nnosuch = 1\n", "2s")
    assert done.returncode == 1 and "hint: the rest is running" in done.stderr
    assert "not ready within 2 s: imaged\n" in done.stderr
    assert "nosuch" in done.stderr and "containerd.log" not in done.stderr


@pytest.mark.parametrize(
    ("config", "said"), [("[bus]\njournal_max_byte = 5\n", "journal_max_byte"), ("not toml", "cannot read the configuration file")]
)
def test_a_broker_that_does_not_start_is_told_at_once(tmp_path: Path, config: str, said: str) -> None:
    done = up_with(tmp_path, config, "10m")
    assert done.returncode == 1 and done.stderr.startswith("pyx: the broker, busd, doesn't start\n--- ")
    assert said in done.stderr and "busd.log" in done.stderr and "containerd.log" not in done.stderr
    assert "hint: the rest waits for it" in done.stderr


_A_SIGNAL_IN_THE_MOMENT_OF_THE_FORK = """
import os, pathlib, signal, sys, time
from pyx_cli import supervisor

fork = os.fork
def fork_and_signal():
    pid = fork()
    if pid:
        os.kill(pid, signal.SIGTERM)
    else:
        time.sleep(0.2)  # it arrives while the child still is what its parent is
    return pid
os.fork = fork_and_signal

stack = supervisor.Stack(sys.argv[1], sys.argv[1])
stack._take_lock()
one = supervisor.Supervisor(stack, to_files=False)
one._wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
signal.set_wakeup_fd(one._wakeup[1], warn_on_full_buffer=False)
for number in supervisor._HANDLED:
    signal.signal(number, lambda *_: None)
child = supervisor._Child("patient", "signal", "pause")
one._children = [child]
one._start(child)
deadline = time.monotonic() + 10
while child.pid and time.monotonic() < deadline:
    one._wait(deadline)
print(child.pid == 0, one._stopping)
"""


def test_a_service_stopped_in_the_moment_of_its_start_ends_alone(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", _A_SIGNAL_IN_THE_MOMENT_OF_THE_FORK, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["True", "False"], done.stderr

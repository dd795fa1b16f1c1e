"""The promise of the product: any service is killed at any moment and comes back, and no container notices; no exit code, log line or
event of a container is lost meanwhile."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.conftest import wait_for

SERVICES = ["containerd", "imaged", "netd", "logd", "volumed", "busd"]
COUNTER = "i=0; while [ $i -lt {count} ]; do echo line $i; i=$((i+1)); sleep {pause}; done"


def kill(stack: Any, service: str) -> None:
    """SIGKILL, and wait for the next one to serve."""
    before = {service: stack.service_pid(service)}
    os.kill(before[service], signal.SIGKILL)
    wait_for(lambda: replaced(stack, before), 20, f"a new {service}, and a whole stack")


def replaced(stack: Any, before: dict[str, int]) -> bool:
    """Each of these services is another process now, and all serve."""
    now = dict(line.split()[:2] for line in (stack.run / "services").read_text().splitlines())
    return all(now.get(name, pid) not in (pid, str(pid)) for name, pid in before.items()) and serves(stack)


def serves(stack: Any) -> bool:
    info = stack.pyx("system", "info", "--format", "json")
    return info.returncode == 0 and all(f'"{name}"' in info.stdout for name in SERVICES if name != "busd")


def free_port() -> int:
    """One that nobody has now; other stacks may run on this machine."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        port: int = sock.getsockname()[1]
        return port


def start_time(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@pytest.mark.parametrize("service", SERVICES)
def test_a_running_container_does_not_notice(stack: Any, service: str) -> None:
    port = free_port()
    options = ["-d", "--name", "steady", "-p", f"{port}:80", "-v", "steady-data:/www"]
    stack.pyx("run", *options, "busybox", "httpd", "-f", "-h", "/www", check=True)
    try:
        stack.pyx("exec", "steady", "sh", "-c", "echo alive > /www/index.html", check=True)
        pid = int(stack.pyx("inspect", "--format", "{{.State.Pid}}", "steady", check=True).stdout)
        born = start_time(pid)
        kill(stack, service)
        assert start_time(pid) == born
        answer = subprocess.run(["curl", "-s", "-m", "5", f"http://127.0.0.1:{port}/"], capture_output=True, text=True)
        assert answer.stdout == "alive\n"
        assert stack.state("steady") == "running"
        assert stack.pyx("exec", "steady", "cat", "/www/index.html", check=True).stdout == "alive\n"
        assert "steady" in stack.pyx("ps", check=True).stdout
    finally:
        stack.pyx("rm", "-f", "-v", "steady", check=True)
        stack.pyx("volume", "rm", "steady-data", check=True)


@pytest.mark.parametrize("service", SERVICES)
def test_a_foreground_run_prints_all_and_exits_right(stack: Any, service: str) -> None:
    script = COUNTER.format(count=60, pause="0.05") + "; exit 42"
    process = stack.popen("run", "--rm", "busybox", "sh", "-c", script, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first == b"line 0\n"
    kill(stack, service)
    rest = process.stdout.read()  # not communicate(): it would pass over what readline() has read ahead
    assert process.wait(60) == 42
    process.stdout.close()
    assert rest.decode().splitlines() == [f"line {i}" for i in range(1, 60)]


def test_no_log_line_is_lost_while_logd_is_down(stack: Any) -> None:
    stack.pyx("run", "-d", "--name", "talker", "busybox", "sh", "-c", COUNTER.format(count=200, pause="0.01"), check=True)
    try:
        for _ in range(3):
            kill(stack, "logd")
        stack.pyx("wait", "talker", check=True)
        wait_for(lambda: stack.pyx("logs", "talker").stdout.count("\n") >= 200, 15, "200 lines")
        assert stack.pyx("logs", "talker").stdout.splitlines() == [f"line {i}" for i in range(200)]
    finally:
        stack.pyx("rm", "-f", "talker", check=True)


def test_exit_code_is_kept_while_containerd_is_down(stack: Any) -> None:
    """The container exits when there's no containerd at all; the next one learns it from the shim."""
    stack.pyx("run", "-d", "--name", "leaver", "busybox", "sh", "-c", "sleep 1; exit 23", check=True)
    try:
        pid = int(stack.pyx("inspect", "--format", "{{.State.Pid}}", "leaver", check=True).stdout)
        containerd = stack.service_pid("containerd")
        os.kill(containerd, signal.SIGSTOP)
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), 15, "the container's end")
        os.kill(containerd, signal.SIGKILL)
        wait_for(lambda: replaced(stack, {"containerd": containerd}), 20, "a new containerd")
        assert stack.pyx("wait", "leaver", check=True).stdout == "23\n"
        state = json.loads(stack.pyx("inspect", "leaver", check=True).stdout)[0]["State"]
        assert (state["Status"], state["ExitCode"]) == ("exited", 23)
        assert not state["FinishedAt"].startswith("0001")
    finally:
        stack.pyx("rm", "-f", "leaver", check=True)


def test_all_services_at_once(stack: Any) -> None:
    stack.pyx("run", "-d", "--name", "rock", "busybox", "sh", "-c", "sleep 3; exit 5", check=True)
    try:
        before = {name: stack.service_pid(name) for name in SERVICES}
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: replaced(stack, before), 30, "a whole stack")
        assert stack.pyx("wait", "rock", check=True).stdout == "5\n"
    finally:
        stack.pyx("rm", "-f", "rock", check=True)


def test_stack_down_and_up_with_a_container_running(stack: Any) -> None:
    stack.pyx("run", "-d", "--name", "keeper", "busybox", "sleep", "1000", check=True)
    try:
        pid = int(stack.pyx("inspect", "--format", "{{.State.Pid}}", "keeper", check=True).stdout)
        stack.pyx("system", "down", check=True)
        assert Path(f"/proc/{pid}").exists()
        stack.pyx("system", "up", "--detach", check=True)
        assert stack.state("keeper") == "running"
        started = time.monotonic()
        stack.pyx("stop", "-t", "0", "keeper", check=True)
        assert time.monotonic() - started < 10
        assert not Path(f"/proc/{pid}").exists()
    finally:
        stack.pyx("rm", "-f", "keeper", check=True)


def test_killed_in_the_middle_of_many_runs_nothing_is_left(stack: Any) -> None:
    """Containers are being started and removed while containerd is killed; afterwards every trace of them can be removed."""
    processes = []
    for i in range(12):
        processes.append(
            stack.popen(
                "run", "--rm", "--name", f"mid-{i}", "busybox", "true",
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
        )  # fmt: skip
        if i in (4, 9):
            kill(stack, "containerd")
    for process in processes:
        process.wait(60)
    ids = stack.pyx("ps", "-aq", "--filter", "name=mid-", check=True).stdout.split()
    if ids:
        stack.pyx("rm", "-f", *ids, check=True)

    def traces() -> list[str]:
        found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(stack.run) in line]
        found += [str(path) for path in (stack.run / "containerd/bundles").iterdir()]
        return found + [str(path) for path in (stack.root / "imaged/snapshots").iterdir()]

    wait_for(lambda: not traces(), 20, f"no mounts, bundles, snapshots; left: {traces()}")


def test_events_go_on_over_a_restart_of_the_broker(stack: Any) -> None:
    options = ["--since", "1m", "--filter", "container=watched", "--format", "{{.Action}}"]
    watcher = stack.popen("events", *options, stdout=subprocess.PIPE)
    try:
        assert watcher.stdout is not None
        stack.pyx("create", "--name", "watched", "busybox", "true", check=True)
        assert watcher.stdout.readline() == b"create\n"
        kill(stack, "busd")
        stack.pyx("rm", "watched", check=True)
        assert watcher.stdout.readline() == b"destroy\n"
    finally:
        watcher.kill()
        watcher.wait(10)


def test_who_watches_is_told_that_the_bus_is_away(stack: Any) -> None:
    supervisor = int((stack.run / "supervisor.pid").read_text())
    options = ["--since", "1m", "--filter", "container=away", "--format", "{{.Action}}"]
    watcher = stack.popen("events", *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert watcher.stdout is not None and watcher.stderr is not None
        stack.pyx("create", "--name", "away", "busybox", "true", check=True)
        assert watcher.stdout.readline() == b"create\n"
        os.kill(supervisor, signal.SIGSTOP)  # nobody starts the broker again meanwhile
        try:
            os.kill(stack.service_pid("busd"), signal.SIGKILL)
            assert watcher.stderr.readline() == b"pyx: the bus is away; waiting up to 30 s for it to come back\n"
        finally:
            os.kill(supervisor, signal.SIGCONT)
        wait_for(lambda: stack.pyx("rm", "away").returncode == 0, 20, "the bus is back")
        assert watcher.stdout.readline() == b"destroy\n"
    finally:
        watcher.kill()
        _, complaints = watcher.communicate(timeout=10)
    assert complaints == b"", "it's said once"


def test_output_goes_on_when_containerd_and_then_logd_were_replaced(stack: Any) -> None:
    """The clients of a run are kept by its shim: whoever comes back finds them there."""
    script = COUNTER.format(count=80, pause="0.05") + "; exit 6"
    process = stack.popen("run", "--rm", "busybox", "sh", "-c", script, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"line 0\n"
    kill(stack, "containerd")
    kill(stack, "logd")
    rest = process.stdout.read()
    assert process.wait(60) == 6
    process.stdout.close()
    assert rest.decode().splitlines() == [f"line {i}" for i in range(1, 80)]


def test_input_attached_at_a_later_start_ends_too(stack: Any) -> None:
    stack.pyx("create", "-i", "--name", "reader", "busybox", "cat", check=True)
    try:
        done = stack.pyx("start", "-ai", "reader", input="hello\n", timeout=30)
        assert (done.returncode, done.stdout) == (0, "hello\n")
    finally:
        stack.pyx("rm", "-f", "reader", check=True)

"""The command line end to end: streams, signals, exit codes, lists, errors, and a stack that is restarted under it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.root
PIPE = subprocess.PIPE


def test_streams_and_the_exit_code(stack: Any) -> None:
    done = stack.pyx("run", "--rm", "-i", "busybox", "sh", "-c", "cat; echo err >&2; exit 7", input="in\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "in\n", "err\n")


def test_stdin_is_not_read_without_i(stack: Any) -> None:
    done = stack.pyx("run", "--rm", "busybox", "cat", input="in\n")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(("command", "code"), [("/nope", 127), ("nope", 127), ("/etc", 126), ("/etc/passwd", 126)])
def test_what_cannot_be_executed(stack: Any, command: str, code: int) -> None:
    done = stack.pyx("run", "--rm", "busybox", command)
    assert done.returncode == code
    assert done.stderr.startswith("pyx: ") and command in done.stderr
    assert stack.pyx("run", "-d", "--name", f"x{code}{len(command)}", "busybox", command).returncode == code
    stack.pyx("rm", "-f", f"x{code}{len(command)}")


def test_engine_errors_are_125(stack: Any) -> None:
    for words, text in (
        (["--nope", "busybox"], "unknown flag: --nope"),
        (["--pull", "never", "no-such-image"], "no-such-image"),
        (["-p", "x", "busybox"], "invalid port"),
        (["--network", "nope", "busybox", "true"], "nope"),
        (["-v", "rel/x:/y", "busybox"], "invalid characters"),
        (["--cap-add", "NOPE", "busybox", "true"], "NOPE"),
    ):
        done = stack.pyx("run", "--rm", *words)
        assert done.returncode == 125 and text in done.stderr, (words, done)
    assert stack.pyx("run").returncode == 1
    assert not stack.pyx("ps", "-aq", "--filter", "ancestor=no-such-image").stdout


def test_much_data_both_ways_is_whole(stack: Any) -> None:
    data = os.urandom(3 << 20)
    with stack.popen("run", "--rm", "-i", "busybox", "cat", stdin=PIPE, stdout=PIPE) as process:
        out, _ = process.communicate(data, timeout=60)
    assert process.returncode == 0 and out == data


def test_exec_streams(stack: Any) -> None:
    stack.pyx("run", "-d", "--name", "exec-streams", "busybox", "sleep", "1000", check=True)
    done = stack.pyx(
        "exec",
        "-i",
        "-e",
        "A=b",
        "-w",
        "/tmp",
        "exec-streams",
        "sh",
        "-c",
        "cat; pwd; echo $A >&2; exit 4",
        input="x\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (4, "x\n/tmp\n", "b\n")
    data = os.urandom(1 << 20)
    with stack.popen("exec", "-i", "exec-streams", "cat", stdin=PIPE, stdout=PIPE) as process:
        assert process.communicate(data, timeout=60)[0] == data
    assert stack.pyx("exec", "exec-streams", "/nope").returncode == 127
    assert stack.pyx("exec", "nope", "true").returncode == 1
    assert stack.pyx("exec", "-d", "exec-streams", "touch", "/tmp/made").returncode == 0
    # A background child that keeps the output open must not hold the command for ever.
    assert stack.pyx("exec", "exec-streams", "sh", "-c", "sleep 500 & echo done", timeout=20).stdout == "done\n"
    stack.pyx("rm", "-f", "exec-streams", check=True)


def test_signals_are_passed_on(stack: Any) -> None:
    script = "trap 'echo usr1' USR1; trap 'echo term; exit 6' TERM; echo ready; while :; do sleep 0.05; done"
    with stack.popen("run", "--rm", "busybox", "sh", "-c", script, stdout=PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == b"usr1\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b"term\n"
        assert process.wait(20) == 6


def test_a_reader_that_goes_away_ends_the_command_quietly(stack: Any) -> None:
    with stack.popen("run", "--rm", "--name", "yes", "busybox", "yes", stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr.read() == b""
    stack.pyx("rm", "-f", "yes", check=True)


def test_a_slow_reader_loses_nothing(stack: Any) -> None:
    with stack.popen("run", "--rm", "busybox", "seq", "1", "300000", stdout=PIPE) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 10)
        process.poll()
        rest = process.stdout.read()
        assert (first + rest).split() == [str(number).encode() for number in range(1, 300001)]
        assert process.wait(20) == 0


def test_a_slow_reader_of_an_exec_loses_nothing(stack: Any) -> None:
    """The command is over, its last output in the pipe to us, and our own output full for longer than any silence we wait for."""
    container = stack.pyx("run", "-d", "busybox", "sleep", "1000", check=True).stdout.strip()
    try:
        with stack.popen("exec", container, "seq", "1", "205000", stdout=PIPE) as process:  # 1.3 MB: more than we hold
            assert process.stdout is not None
            first = os.read(process.stdout.fileno(), 10)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(3)
            rest = process.stdout.read()
            assert len((first + rest).split()) == 205000
            assert process.wait(20) == 0
    finally:
        stack.pyx("rm", "-f", container, check=True)


def test_start_attach_and_logs(stack: Any) -> None:
    container = stack.pyx(
        "create", "--name", "sa", "busybox", "sh", "-c", "echo out; echo err >&2; exit 3", check=True
    ).stdout.strip()
    assert len(container) == 64
    done = stack.pyx("start", "-a", "sa")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    logs = stack.pyx("logs", "sa")
    assert (logs.stdout, logs.stderr) == ("out\n", "err\n")
    assert stack.pyx("logs", "-n", "0", "sa").stdout == ""
    assert stack.pyx("logs", "-t", "sa").stdout.partition("Z ")[2] == "out\n"
    assert stack.pyx("start", "sa").stdout == "sa\n"
    assert stack.pyx("wait", "sa").stdout == "3\n"
    assert stack.pyx("rm", "sa").stdout == "sa\n"
    assert stack.pyx("logs", "sa").returncode == 1


def test_following_logs(stack: Any) -> None:
    stack.pyx(
        "run",
        "-d",
        "--name",
        "follow",
        "busybox",
        "sh",
        "-c",
        "for i in 1 2 3; do echo $i; sleep 0.1; done",
        check=True,
    )
    assert stack.pyx("logs", "-f", "follow", timeout=20).stdout == "1\n2\n3\n"
    stack.pyx("rm", "-f", "follow", check=True)


def test_lists_filters_and_formats(stack: Any) -> None:
    container = stack.pyx(
        "run", "-d", "--name", "listed", "-l", "a=b", "-p", "127.0.0.1::80", "busybox", "sleep", "1000", check=True
    ).stdout.strip()
    table = stack.pyx("ps", check=True).stdout.splitlines()
    assert table[0].split() == ["CONTAINER", "ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES"]
    row = next(line for line in table if "listed" in line)
    assert row.startswith(container[:12]) and '"sleep 1000"' in row and "->80/tcp" in row and "Up " in row
    assert stack.pyx("ps", "-q", "--filter", "name=listed").stdout == container[:12] + "\n"
    assert stack.pyx("ps", "-q", "--no-trunc", "-f", "label=a=b").stdout == container + "\n"
    assert stack.pyx("ps", "--filter", "name=listed", "--format", "{{.Names}}:{{.State}}").stdout == "listed:running\n"
    row = json.loads(stack.pyx("ps", "--filter", "name=listed", "--format", "json").stdout)
    assert row["ID"] == container[:12] and row["Labels"] == "a=b"
    assert stack.pyx("ps", "-f", "name=listed", "--format", "table {{.Names}}\t{{.Image}}").stdout.split() == [
        "NAMES",
        "IMAGE",
        "listed",
        "busybox",
    ]
    assert stack.pyx("port", "listed", "80").stdout.startswith("127.0.0.1:")
    found = json.loads(stack.pyx("inspect", container[:10]).stdout)
    assert found[0]["Id"] == container
    assert (
        stack.pyx("inspect", "-f", "{{.State.Running}} {{json .Config.Labels}}", "listed").stdout == 'true {"a":"b"}\n'
    )
    missing = stack.pyx("inspect", "listed", "nope")
    assert (
        missing.returncode == 1
        and len(json.loads(missing.stdout)) == 1
        and missing.stderr == 'pyx: no such object: "nope"\n'
    )
    assert "listed" in stack.pyx("container", "ls").stdout
    stack.pyx("rename", "listed", "renamed", check=True)
    assert stack.pyx("rm", "-f", "renamed").stdout == "renamed\n"


def test_images_volumes_networks(stack: Any) -> None:
    assert stack.pyx("images").stdout.splitlines()[0].split() == ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE"]
    assert stack.pyx("images", "--format", "{{.Repository}}:{{.Tag}}").stdout.count("busybox:latest\n") == 1
    stack.pyx("tag", "busybox", "copy:1", check=True)
    assert "Untagged: " in stack.pyx("rmi", "copy:1", check=True).stdout
    assert stack.pyx("volume", "create", "cli-volume").stdout == "cli-volume\n"
    assert "cli-volume" in stack.pyx("volume", "ls", "-q").stdout.split()
    assert json.loads(stack.pyx("volume", "inspect", "cli-volume").stdout)[0]["Name"] == "cli-volume"
    assert stack.pyx("inspect", "-f", "{{.Driver}}", "cli-volume").stdout == "local\n"
    assert stack.pyx("volume", "rm", "cli-volume").stdout == "cli-volume\n"
    assert {"bridge", "host", "none"} <= set(stack.pyx("network", "ls", "--format", "{{.Name}}").stdout.split())
    assert json.loads(stack.pyx("network", "inspect", "bridge").stdout)[0]["Name"] == "bridge"


def test_events(stack: Any) -> None:
    stack.pyx("run", "--rm", "--name", "eventful", "busybox", "true", check=True)
    out = stack.pyx(
        "events", "--since", "1m", "--until", "0s", "-f", "container=eventful", "--format", "{{.Action}}", timeout=20
    ).stdout.split()
    assert out == ["create", "attach", "start", "die", "destroy"]
    line = stack.pyx("events", "--since", "1m", "--until", "0s", "-f", "event=die", "-f", "container=eventful").stdout
    assert " container die " in line and "exitCode=0" in line


def test_top_and_update(stack: Any) -> None:
    stack.pyx("run", "-d", "--name", "busy-box", "-m", "64m", "busybox", "sh", "-c", "sleep 1000; true", check=True)
    try:
        lines = stack.pyx("top", "busy-box", check=True).stdout.splitlines()
        assert lines[0].startswith("UID                 PID                 PPID ") and len(lines) == 3
        assert stack.pyx("top", "busy-box", "-o pid,args").stdout.splitlines()[0] == "PID                 COMMAND"
        assert stack.pyx("container", "top", "busy-box", "-o", "args").returncode == 1
        done = stack.pyx("update", "--memory", "96m", "--memory-swap", "-1", "--pids-limit", "50", "busy-box")
        assert (done.returncode, done.stdout, done.stderr) == (0, "busy-box\n", "")
        shown = stack.pyx("inspect", "-f", "{{.HostConfig.Memory}} {{.HostConfig.MemorySwap}} {{.HostConfig.PidsLimit}}", "busy-box")
        assert shown.stdout == f"{96 << 20} -1 50\n"
        done = stack.pyx("update", "busy-box")
        assert (done.returncode, done.stderr) == (1, "pyx: you must provide one or more flags when using this command\n")
        assert stack.pyx("update", "-m", "1m", "busy-box").returncode == 1
    finally:
        stack.pyx("rm", "-f", "busy-box", check=True)


def test_cidfile(stack: Any, tmp_path: Path) -> None:
    path = tmp_path / "cid"
    stack.pyx("run", "--rm", "--cidfile", str(path), "busybox", "true", check=True)
    assert len(path.read_text()) == 64
    again = stack.pyx("run", "--rm", "--cidfile", str(path), "busybox", "true")
    assert again.returncode == 125 and "container ID file found" in again.stderr


def test_version_and_info(stack: Any) -> None:
    assert "containerd" in stack.pyx("version", check=True).stdout
    assert json.loads(stack.pyx("info", "--format", "json").stdout)["DefaultRuntime"]


@pytest.mark.parametrize("service", ["containerd", "busd"])
def test_a_foreground_run_outlives_a_restart(stack: Any, service: str) -> None:
    """kill -9 of containerd, or of the broker: the output goes on and the exit code arrives."""
    with stack.popen(
        "run", "--rm", "-i", "busybox", "sh", "-c", "echo one; read x; echo two $x; exit 9", stdin=PIPE, stdout=PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"one\n"
        old = stack.service_pid(service)
        os.kill(old, signal.SIGKILL)
        process.stdin.write(b"three\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"two three\n"
        assert process.wait(30) == 9


def test_a_second_up_says_it_is_running(stack: Any) -> None:
    done = stack.pyx("system", "up", "--detach")
    assert done.returncode == 0 and "already running" in done.stderr
    done = stack.pyx("system", "up")
    assert done.returncode == 1 and "already running" in done.stderr


def test_without_a_stack(tmp_path: Path, stack: Any) -> None:
    done = stack.pyx("--bus", str(tmp_path / "bus.sock"), "ps")
    assert done.returncode == 1
    assert done.stderr == (
        f"pyx: cannot connect to the bus at {tmp_path}/bus.sock: is the stack running?\nhint: start it with: pyx system up --detach\n"
    )
    assert stack.pyx("--bus", str(tmp_path / "bus.sock"), "run", "busybox").returncode == 125


def test_a_tail_of_a_busy_log_is_no_longer_than_asked(stack: Any) -> None:
    script = "while :; do echo out; echo err >&2; done"
    stack.pyx("run", "-d", "--name", "busy", "--log-opt", "max-size=1m", "busybox", "sh", "-c", script, check=True)
    try:
        for _ in range(10):
            done = stack.pyx("logs", "--tail", "3", "busy", check=True)
            assert len((done.stdout + done.stderr).splitlines()) <= 3
    finally:
        stack.pyx("rm", "-f", "busy", check=True)

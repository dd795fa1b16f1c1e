"""Health checks as a person and a monitoring tool see them: an image's own, the flags, ps, inspect, events, and a kill of containerd."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.conftest import wait_for
from tests.images import busybox_tar, oci_layout

pytestmark = pytest.mark.root
FAST = ("--health-interval", "50ms", "--health-retries", "2")


def health(stack: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stack.pyx("inspect", "--format", "{{json .State.Health}}", name, check=True).stdout)
    return found


def status(stack: Any, name: str) -> str:
    shown: str = stack.pyx("ps", "-a", "--filter", f"name={name}", "--format", "{{.Status}}", check=True).stdout.strip()
    return shown


@pytest.fixture(autouse=True)
def nothing_checked_beyond_the_test(stack: Any) -> Iterator[None]:
    """Twenty execs a second would crowd the other tests' events."""
    yield
    ids = stack.pyx("ps", "-aq", check=True).stdout.split()
    if ids:
        stack.pyx("rm", "-f", *ids, check=True)


@pytest.fixture(scope="module")
def checked(stack: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with a HEALTHCHECK, and a SHELL that runs it."""
    home = tmp_path_factory.mktemp("checked")
    config = {
        "Cmd": ["sleep", "1000"],
        "Env": ["PATH=/bin"],
        "Shell": ["/bin/sh", "-euc"],
        "Healthcheck": {"Test": ["CMD-SHELL", "test ! -e /ill; echo $-"], "Interval": 50_000_000, "Retries": 1},
    }
    layout = oci_layout(home / "oci", [busybox_tar(home / "busybox.tar").read_bytes()], tag="checked:latest", config=config)
    with tarfile.open(home / "checked.tar", "w") as tar:
        for path in sorted(layout.rglob("*")):
            tar.add(path, str(path.relative_to(layout)), recursive=False)
    stack.pyx("load", "-i", str(home / "checked.tar"), check=True)
    return "checked"


def test_the_check_of_the_image(stack: Any, checked: str) -> None:
    stack.pyx("run", "-d", "--name", "own", checked, check=True)
    wait_for(lambda: status(stack, "own").endswith("(healthy)"), what="a healthy container")
    document = json.loads(stack.pyx("inspect", "own", check=True).stdout)[0]
    assert document["Config"]["Healthcheck"] == {"Test": ["CMD-SHELL", "test ! -e /ill; echo $-"], "Interval": 50_000_000, "Retries": 1}
    (last, *_) = document["State"]["Health"]["Log"]
    assert last["ExitCode"] == 0 and {"e", "u"} <= set(last["Output"].strip())  # the image's shell ran it
    stack.pyx("exec", "own", "touch", "/ill", check=True)
    wait_for(lambda: status(stack, "own").endswith("(unhealthy)"), what="an unhealthy container")
    assert stack.pyx("ps", "-q", "--filter", "health=unhealthy", "--filter", "name=own", check=True).stdout
    assert not stack.pyx("ps", "-q", "--filter", "health=healthy", "--filter", "name=own", check=True).stdout
    told = stack.pyx(
        "events", "--since", "1m", "--until", "0s", "-f", "container=own", "-f", "label!=healthcheck", "--format", "{{.Action}}", check=True
    ).stdout.splitlines()
    assert [one for one in told if not one.startswith("exec_")] == [
        "create", "start", "health_status: starting", "health_status: healthy", "health_status: unhealthy",
    ]  # fmt: skip
    assert [one for one in told if one.startswith("exec_")] == ["exec_create: touch /ill", "exec_start: touch /ill", "exec_die"]
    only = stack.pyx("events", "--since", "1m", "--until", "0s", "-f", "container=own", "-f", "event=health_status: unhealthy", check=True)
    assert only.stdout.count("\n") == 1 and " container health_status: unhealthy " in only.stdout


def test_the_flags_go_over_the_image(stack: Any, checked: str) -> None:
    stack.pyx("run", "-d", "--name", "off", "--no-healthcheck", checked, check=True)
    assert stack.pyx("inspect", "--format", "{{json .Config.Healthcheck.Test}}", "off", check=True).stdout == '["NONE"]\n'
    assert status(stack, "off").startswith("Up ") and "(" not in status(stack, "off")
    stack.pyx("create", "--name", "over", "--health-cmd", "true", "--health-start-period", "2s", checked, check=True)
    merged = json.loads(stack.pyx("inspect", "--format", "{{json .Config.Healthcheck}}", "over", check=True).stdout)
    assert merged == {"Test": ["CMD-SHELL", "true"], "Interval": 50_000_000, "StartPeriod": 2 * 10**9, "Retries": 1}
    for words, said in (
        (["--no-healthcheck", "--health-cmd", "x"], "--no-healthcheck conflicts with --health-* options"),
        (["--health-interval", "1us"], "less than 1ms"),
        (["--health-interval", "-1s"], "--health-interval cannot be negative"),
        (["--health-action", "reboot"], "invalid health action: 'reboot'"),
    ):
        done = stack.pyx("run", "--rm", *words, checked, "true")
        assert done.returncode == 125 and said in done.stderr, done.stderr
    assert "invalid value" in stack.pyx("ps", "--filter", "health=fine").stderr


def test_one_that_hangs_leaves_nothing(stack: Any) -> None:
    command = "echo now; sleep 2000 & sleep 2001"
    flags = [*FAST, "--health-timeout", "200ms", "--health-cmd", command]
    stack.pyx("run", "-d", "--name", "hangs", *flags, "busybox", "sleep", "1000", check=True)
    wait_for(lambda: health(stack, "hangs")["Status"] == "unhealthy", what="an unhealthy container")
    entry = health(stack, "hangs")["Log"][0]
    assert (entry["ExitCode"], entry["Output"]) == (-1, "Health check exceeded timeout (200ms): now\n")
    stack.pyx("pause", "hangs", check=True)
    seen = stack.pyx("top", "hangs", "-o", "pid,args", check=True).stdout
    assert "sleep 1000" in seen and "sleep 200" not in seen
    stack.pyx("rm", "-f", "hangs", check=True)


def test_a_kill_of_containerd_changes_nothing(stack: Any) -> None:
    stack.pyx("run", "-d", "--name", "kept", *FAST, "--health-cmd", "sleep 0.05", "busybox", "sleep", "1000", check=True)
    wait_for(lambda: len(health(stack, "kept")["Log"]) == 5, what="five results")
    before = health(stack, "kept")["Log"]
    os.kill(stack.service_pid("containerd"), signal.SIGKILL)
    wait_for(lambda: stack.pyx("ps").returncode == 0, what="the next containerd")
    after = health(stack, "kept")
    assert after["Status"] == "healthy" and {entry["ExitCode"] for entry in after["Log"]} == {0}
    assert after["Log"][-1]["End"] >= before[-1]["End"]
    wait_for(lambda: health(stack, "kept")["Log"][0]["Start"] > before[-1]["End"], what="five new results")
    assert {entry["ExitCode"] for entry in health(stack, "kept")["Log"]} == {0}
    pid = int(stack.pyx("inspect", "--format", "{{.State.Pid}}", "kept", check=True).stdout)
    stack.pyx("stop", "-t", "0", "kept", check=True)
    assert not Path(f"/proc/{pid}").exists()
    assert health(stack, "kept")["Status"] == "unhealthy" and status(stack, "kept").startswith("Exited")


def test_an_unhealthy_one_is_restarted(stack: Any) -> None:
    stack.pyx(
        "run", "-d", "--name", "again", *FAST, "--health-action", "restart", "--stop-timeout", "0", "--health-cmd", "test ! -e /tmp/ill",
        "--tmpfs", "/tmp", "busybox", "sleep", "1000", check=True,
    )  # fmt: skip
    wait_for(lambda: health(stack, "again")["Status"] == "healthy", what="a healthy container")
    started = stack.pyx("inspect", "--format", "{{.State.StartedAt}}", "again", check=True).stdout
    stack.pyx("exec", "again", "touch", "/tmp/ill", check=True)  # gone with the run
    wait_for(lambda: stack.pyx("inspect", "--format", "{{.State.StartedAt}}", "again", check=True).stdout != started, what="a restart")
    wait_for(lambda: health(stack, "again")["Status"] == "healthy", what="a healthy container")
    stack.pyx("rm", "-f", "again", check=True)

"""A container's end is told once, whoever is killed between it and its telling."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
from tests.e2e.conftest import wait_for
from tests.e2e.test_restarts import replaced

pytestmark = pytest.mark.root


def test_a_die_that_the_broker_never_saw_survives_containerd_and_the_broker(stack: Any) -> None:
    container = stack.pyx("run", "-d", "busybox", "sh", "-c", "sleep 1000 & wait; exit 7", check=True).stdout.strip()
    try:
        before = {name: stack.service_pid(name) for name in ("busd", "containerd")}
        pid = int(stack.pyx("inspect", "--format", "{{.State.Pid}}", container, check=True).stdout)
        os.kill(before["busd"], signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: _kept(stack, container), 20, "the event in containerd's file")
        for process in before.values():
            os.kill(process, signal.SIGKILL)
        wait_for(lambda: replaced(stack, before), 20, "a new broker and a new containerd")
        wait_for(lambda: _dies(stack, container), 20, "the event")
        (die,) = _dies(stack, container)
        assert die["Actor"]["Attributes"]["exitCode"] == "137"
    finally:
        stack.pyx("rm", "-f", container, check=True)
    assert len(_dies(stack, container)) == 1


def _kept(stack: Any, container: str) -> bool:
    """Whether containerd's files have the end of this container as the last one."""
    data = b"".join(path.read_bytes() for path in (stack.run / "containerd").glob("events-*"))
    return container in data.rpartition(b"container.die")[2].decode(errors="replace") and b"container.die" in data


def _dies(stack: Any, container: str) -> list[dict[str, Any]]:
    options = ["--since", "1h", "--until", "0s", "--filter", f"container={container}", "--filter", "event=die"]
    said = stack.pyx("events", *options, "--format", "json", check=True).stdout
    return [json.loads(line) for line in said.splitlines()]

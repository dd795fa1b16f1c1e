"""containerd, killed with SIGKILL while a health check goes on or is being begun: what was found is kept, no process of it is left."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import trio
from tests.containerd_stack import stack, wait_nothing_left
from tests.kernel.test_containerd_crash import Process, no_process_left, remove_all

from pyx_bus.contract import containerd as c
from pyx_bus.contract.imaged import HealthCheck
from pyx_bus.service import stack_prefix
from pyx_containerd import kernel

__all__ = ["no_process_left"]  # a fixture
MS = 10**6
FIRST_HANGS = "mkdir /begun || exit 0; sleep 1000 & sleep 1001"


async def start(s, command: str, **fields) -> str:
    healthcheck = HealthCheck(test=["CMD-SHELL", command], **{"interval_ns": 30 * MS, "retries": 1, **fields})
    spec = c.ContainerSpec(image="busybox", command=["sleep", "100"], name="box", healthcheck=healthcheck)
    return (await s.bus.call(c.RUN, c.RunContainer(spec=spec, detach=True), timeout_s=20)).id


async def health(s) -> dict:
    return (await s.bus.call(c.INSPECT, c.ContainerRef(container="box"), timeout_s=10)).document["State"]["Health"]


def commands(tmp_path: Path, id_: str) -> list[str]:
    found = []
    for pid in kernel.cgroup_processes(f"/{stack_prefix(tmp_path / 'run')}/{id_}"):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
    return sorted(found)


async def until(condition, within_s: float = 15) -> None:
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.005)


async def clean(s, process: Process, tmp_path: Path) -> None:
    await remove_all(s)
    await wait_nothing_left(tmp_path, stack_prefix(tmp_path / "run"))
    await process.end(signal.SIGTERM)
    assert list(Path("/sys/fs/cgroup").glob(f"*/{stack_prefix(tmp_path / 'run')}")) == []


async def test_killed_while_a_check_goes_on(tmp_path):
    async with stack(tmp_path, containerd=False) as s, s.bus.events("container.health_status") as events:
        process = Process(tmp_path, s.bus_path)
        await process.ready(s.bus)
        id_ = await start(s, FIRST_HANGS)
        await until(lambda: commands(tmp_path, id_) == ["sleep 100", "sleep 1000", "sleep 1001"])
        await process.end(signal.SIGKILL)
        process = Process(tmp_path, s.bus_path)
        await process.ready(s.bus)
        statuses = []
        with trio.fail_after(15):
            async for event in events:  # one that's given up has no result: a failure would have made it unhealthy
                statuses.append(event.payload.status)
                if statuses[-1] != "starting":
                    break
        assert set(statuses[:-1]) == {"starting"} and statuses[-1] == "healthy"
        assert {entry["ExitCode"] for entry in (await health(s))["Log"]} == {0}
        assert not {"sleep 1000", "sleep 1001"} & set(commands(tmp_path, id_))
        await clean(s, process, tmp_path)


async def test_killed_while_a_check_is_being_begun(tmp_path, monkeypatch):
    """The runtime is at work for the shim: it will begin the check after its asker's death."""
    real = shutil.which("runc") or shutil.which("crun")
    assert real
    tools = tmp_path / "tools"
    tools.mkdir()
    mark = tmp_path / "beginning"
    name = Path(real).name
    # mkdir is the lock: only the first is held up
    script = f"""#!/bin/sh
case "$*" in *" exec "*)
    if mkdir {mark} 2>/dev/null; then
        while [ ! -e {mark}/go ]; do sleep 0.01; done
        {real} "$@" && cp exec-*.pid {mark}/pid
        exit
    fi;;
esac
exec {real} "$@"
"""
    for runtime in ("crun", "runc"):
        (tools / runtime).write_text(script if runtime == name else "#!/bin/sh\nexit 1\n")
        (tools / runtime).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    async with stack(tmp_path, containerd=False) as s:
        process = Process(tmp_path, s.bus_path)
        await process.ready(s.bus)
        id_ = await start(s, "exec sleep 1000", timeout_ns=200 * MS)
        await until(mark.exists)
        await process.end(signal.SIGKILL)
        process = Process(tmp_path, s.bus_path)
        await process.ready(s.bus)
        assert commands(tmp_path, id_) == ["sleep 100"] and (await health(s))["Log"] == []
        (mark / "go").touch()
        await until((mark / "pid").exists)
        orphan = int((mark / "pid").read_text())
        await until(lambda: orphan not in kernel.cgroup_processes(f"/{stack_prefix(tmp_path / 'run')}/{id_}"))
        with trio.fail_after(15):
            while len((await health(s))["Log"]) < 2:  # the others go on
                assert commands(tmp_path, id_).count("sleep 1000") <= 1
                await trio.sleep(0.01)
        bundle = tmp_path / "run" / "containerd" / "bundles" / id_
        await s.bus.call(c.PAUSE, c.ContainerRef(container="box"), timeout_s=10)
        assert [entry for entry in os.listdir(bundle) if entry.startswith(("exec-", "check"))] == []
        await clean(s, process, tmp_path)


@pytest.mark.parametrize("seed", range(2))
async def test_killed_at_any_instant(tmp_path, seed):
    """The results go on where they were, healthy all the way; at the end only the container's own process is left."""
    chance = random.Random(seed)
    async with stack(tmp_path, containerd=False) as s:
        process = Process(tmp_path, s.bus_path)
        await process.ready(s.bus)
        id_ = await start(s, "sleep 0.02; echo $$", interval_ns=MS)
        last = ""
        for _ in range(6):
            with trio.fail_after(15):
                while (now := await health(s))["Status"] != "healthy" or now["Log"][-1]["End"] <= last:
                    await trio.sleep(0.005)
            await trio.sleep(chance.uniform(0, 0.08))
            before = (await health(s))["Log"]
            await process.end(signal.SIGKILL)
            process = Process(tmp_path, s.bus_path)
            await process.ready(s.bus)
            log = (await health(s))["Log"]
            assert {entry["ExitCode"] for entry in log} == {0}
            ends = [entry["End"] for entry in log]
            assert ends == sorted(ends) and ends[-1] >= before[-1]["End"]
            last = ends[-1]
        await s.bus.call(c.PAUSE, c.ContainerRef(container="box"), timeout_s=10)
        await until(lambda: commands(tmp_path, id_) == ["sleep 100"])
        bundle = tmp_path / "run" / "containerd" / "bundles" / id_
        assert [entry for entry in os.listdir(bundle) if entry.startswith(("exec-", "check"))] == []
        await s.bus.call(c.UNPAUSE, c.ContainerRef(container="box"), timeout_s=10)
        await clean(s, process, tmp_path)

"""The real containerd process, killed with SIGKILL at many instants of a container's life, and started again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import trio
from tests.containerd_stack import leftovers, stack, wait_nothing_left

from pyx_bus import errors
from pyx_bus.contract import containerd as c
from pyx_bus.contract.base import Empty
from pyx_bus.contract.bus import SERVICES
from pyx_bus.service import stack_prefix


class Process:
    """pyx-containerd as its own process against the test's broker."""

    started: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, directory: Path, bus: Path) -> None:
        environment = {"PYX_RUN": str(directory / "run"), "PYX_ROOT": str(directory / "root"), "PYX_BUS": str(bus)}
        self.log = open(directory / "containerd.log", "ab")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyx_containerd"], env={**os.environ, **environment}, stderr=self.log, stdin=subprocess.DEVNULL
        )
        self.started.append(self.process)

    async def ready(self, bus, within_s=15):
        with trio.fail_after(within_s):
            while True:
                with contextlib.suppress(errors.BusError):
                    listed = await bus.call(SERVICES, Empty())
                    if any(entry.name == "containerd" and entry.pid == self.process.pid for entry in listed.services):
                        return
                await trio.sleep(0.01)

    async def end(self, signal_number):
        self.process.send_signal(signal_number)
        await trio.to_thread.run_sync(self.process.wait)
        self.log.close()


async def remove_all(s):
    for row in (await s.bus.call(c.LIST, c.ListContainers(all=True), timeout_s=10)).containers:
        await s.bus.call(c.REMOVE, c.RemoveContainer(container=row.id, force=True), timeout_s=20)


@pytest.fixture(autouse=True)
def no_process_left():
    """A test that fails in the middle must not leave its containerd to the host."""
    yield
    while Process.started:
        process = Process.started.pop()
        process.kill()
        process.wait()


def spec(*command, **fields):
    return c.ContainerSpec(image="busybox", command=list(command), **fields)


@pytest.mark.parametrize("auto_remove", [True, False])
async def test_killed_at_any_instant_of_a_run(tmp_path, auto_remove):
    """A short container's whole life takes about 60 ms: kill somewhere in it, and see that the next start makes sense of what's there."""
    prefix = stack_prefix(tmp_path / "run")
    chance = random.Random(4711 + auto_remove)
    async with stack(tmp_path, containerd=False) as s:
        process = Process(tmp_path, s.bus_path)
        await process.ready(s.bus)
        await s.bus.call(c.RUN, c.RunContainer(spec=spec("true", auto_remove=True)), timeout_s=20)  # the runtime is chosen now
        for round_ in range(6):

            async def run(name=f"round{round_}"):
                with contextlib.suppress(errors.BusError):
                    await s.bus.call(c.RUN, c.RunContainer(spec=spec("true", name=name, auto_remove=auto_remove)), timeout_s=20)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await trio.sleep(chance.uniform(0.002, 0.08))
                await process.end(signal.SIGKILL)
                process = Process(tmp_path, s.bus_path)
                await process.ready(s.bus)
            listed = (await s.bus.call(c.LIST, c.ListContainers(all=True), timeout_s=10)).containers
            for row in listed:
                try:
                    with trio.fail_after(10):  # whatever was left of it comes to its end
                        status = await s.bus.call(c.WAIT, c.WaitContainer(container=row.id), timeout_s=10)
                    assert status.exit_code in (0, 255)
                except errors.NotFound:  # it was listed on its way out
                    assert auto_remove
            await remove_all(s)
            await wait_nothing_left(tmp_path, prefix)
            with trio.fail_after(5):
                while not s.holders.empty:  # retain has told them
                    await trio.sleep(0.01)
        await process.end(signal.SIGTERM)
    assert list(Path("/sys/fs/cgroup").glob(f"*/{prefix}")) == []


async def test_a_long_one_lives_through_many_kills(tmp_path):
    async with stack(tmp_path, containerd=False) as s:
        process = Process(tmp_path, s.bus_path)
        await process.ready(s.bus)
        trap = "trap 'exit 11' TERM; while :; do sleep 0.02; done"
        started = await s.bus.call(c.RUN, c.RunContainer(spec=spec("sh", "-c", trap, name="long"), detach=True), timeout_s=20)
        codes = []

        async def wait():
            codes.append((await s.bus.call(c.WAIT, c.WaitContainer(container="long"), timeout_s=60)).exit_code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)  # idempotent: the client asks again after each kill
            for _ in range(3):
                await process.end(signal.SIGKILL)
                process = Process(tmp_path, s.bus_path)
                await process.ready(s.bus)
                document = (await s.bus.call(c.INSPECT, c.ContainerRef(container="long"), timeout_s=10)).document
                assert document["State"]["Running"]
                assert document["Id"] == started.id
            await s.bus.call(c.STOP, c.StopContainer(container="long"), timeout_s=20)
        assert codes == [11]
        await remove_all(s)
        await wait_nothing_left(tmp_path, stack_prefix(tmp_path / "run"))
        await process.end(signal.SIGTERM)


async def test_a_host_that_was_started_anew(tmp_path):
    """The run directory is gone, and so is every process: what was running has exited with 255."""
    async with stack(tmp_path, containerd=False) as s:
        process = Process(tmp_path, s.bus_path)
        await process.ready(s.bus)
        await s.bus.call(c.RUN, c.RunContainer(spec=spec("sleep", "1000", name="old"), detach=True), timeout_s=20)
        document = (await s.bus.call(c.INSPECT, c.ContainerRef(container="old"))).document
        pid = document["State"]["Pid"]
        status = Path(f"/proc/{pid}/status").read_text()
        shim = int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid")))
        await process.end(signal.SIGKILL)
        os.kill(shim, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        bundle = tmp_path / "run" / "containerd" / "bundles" / document["Id"]
        subprocess.run(["umount", bundle / "rootfs"], check=True)
        subprocess.run(["rm", "-rf", tmp_path / "run" / "containerd"], check=True)
        process = Process(tmp_path, s.bus_path)
        await process.ready(s.bus)
        status = await s.bus.call(c.WAIT, c.WaitContainer(container="old"), timeout_s=10)
        assert status.exit_code == 255
        assert leftovers(tmp_path, stack_prefix(tmp_path / "run")) == []
        await s.bus.call(c.START, c.StartContainer(container="old"), timeout_s=20)  # and it can be started again
        await remove_all(s)
        await wait_nothing_left(tmp_path, stack_prefix(tmp_path / "run"))
        await process.end(signal.SIGTERM)


async def test_an_orderly_end_waits_for_clean_ups(tmp_path):
    """SIGTERM in the moment the last container has ended by SIGKILL: nothing of it is left for a next start."""
    prefix = stack_prefix(tmp_path / "run")
    async with stack(tmp_path, containerd=False) as s:
        for round_ in range(3):
            process = Process(tmp_path, s.bus_path)
            await process.ready(s.bus)
            name = f"deaf{round_}"
            await s.bus.call(c.RUN, c.RunContainer(spec=spec("sleep", "1000", name=name), detach=True), timeout_s=20)
            await s.bus.call(c.STOP, c.StopContainer(container=name, timeout_s=0), timeout_s=20)
            await process.end(signal.SIGTERM)
            assert leftovers(tmp_path, prefix) == []
        process = Process(tmp_path, s.bus_path)
        await process.ready(s.bus)
        await remove_all(s)
        await process.end(signal.SIGTERM)

"""update and top on a real container."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import trio
from tests.containerd_stack import serve_containerd, stack, wait_nothing_left

from pyx_bus import errors
from pyx_bus.contract import containerd as c
from pyx_bus.contract.base import Empty
from pyx_containerd import kernel

MIB = 1 << 20


@pytest.fixture
async def s(tmp_path):
    async with stack(tmp_path) as running:
        try:
            yield running
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(20):
                await running.bus.call(c.INFO, Empty())
                with contextlib.suppress(errors.BusError):
                    await running.bus.call(c.REMOVE, c.RemoveContainer(container="box", force=True))
                await wait_nothing_left(tmp_path, running.context.prefix)


async def start(s, *command, **fields):
    spec = c.ContainerSpec(image="busybox", command=list(command), name="box", **fields)
    return (await s.call(c.RUN, c.RunContainer(spec=spec, detach=True))).id


async def update(s, **limits):
    await s.call(c.UPDATE, c.UpdateContainer(container="box", resources=c.Resources(**limits)))


def limit(s, id_: str, *names: str) -> str:
    """The first of the files that exists, in any hierarchy of its cgroup."""
    for place in kernel.cgroup_directories(f"/{s.context.prefix}/{id_}"):
        for name in names:
            if (Path(place) / name).exists():
                return (Path(place) / name).read_text().strip()
    raise AssertionError(f"no {names}")


async def test_limits_of_a_running_container_change_and_are_kept(s, tmp_path):
    id_ = await start(s, "sleep", "100", resources=c.Resources(memory_bytes=64 * MIB))
    async with s.bus.events("container.update") as events:
        await update(s, memory_bytes=96 * MIB, nano_cpus=500_000_000, cpu_shares=512, pids_limit=33)
        with trio.fail_after(5):
            event = await anext(aiter(events))
        assert event.payload.attributes == {"image": "busybox", "name": "box"}
        assert event.payload.resources.memory_bytes == 96 * MIB
    memory = ("memory.max", "memory.limit_in_bytes")
    assert limit(s, id_, *memory) == str(96 * MIB)
    assert limit(s, id_, "pids.max") == "33"
    assert limit(s, id_, "cpu.max", "cpu.cfs_quota_us") in ("50000 100000", "50000")
    host = (await s.call(c.INSPECT, c.ContainerRef(container="box"))).document["HostConfig"]
    assert (host["Memory"], host["MemorySwap"]) == (96 * MIB, 128 * MIB)  # what the default had made of 64 MiB
    assert (host["NanoCpus"], host["CpuShares"], host["PidsLimit"]) == (500_000_000, 512, 33)
    await update(s, pids_limit=-1, memory_bytes=160 * MIB, memory_swap_bytes=200 * MIB)
    assert limit(s, id_, "pids.max") == "max"
    assert limit(s, id_, *memory) == str(160 * MIB)
    for wrong in (
        {"memory_bytes": 300 * MIB},  # above what memory and swap may have together
        {"memory_bytes": MIB},
        {"cpu_quota_us": 1000},
        {"cpuset_cpus": "a"},
        {"oom_score_adj": 5},
    ):
        with pytest.raises(errors.InvalidArgument):
            await update(s, **wrong)
    with pytest.raises(errors.Internal, match="box"):
        await update(s, cpuset_cpus="4000")
    assert (await s.call(c.INSPECT, c.ContainerRef(container="box"))).document["HostConfig"]["CpusetCpus"] == ""
    await s.call(c.RESTART, c.StopContainer(container="box", timeout_s=0))
    assert limit(s, id_, *memory) == str(160 * MIB)
    assert limit(s, id_, "cpu.max", "cpu.cfs_quota_us") in ("50000 100000", "50000")


async def test_a_stopped_container_has_them_at_its_next_start(tmp_path):
    async with stack(tmp_path, containerd=False) as s:
        async with serve_containerd(s.bus_path, tmp_path) as s.context:
            spec = c.ContainerSpec(image="busybox", command=["sleep", "100"], name="box")
            id_ = (await s.call(c.CREATE, c.CreateContainer(spec=spec))).id
            await update(s, memory_bytes=48 * MIB)
        async with serve_containerd(s.bus_path, tmp_path) as s.context:  # they're on disk
            await s.call(c.START, c.StartContainer(container="box"))
            assert limit(s, id_, "memory.max", "memory.limit_in_bytes") == str(48 * MIB)
            await s.call(c.REMOVE, c.RemoveContainer(container="box", force=True))
            await s.bus.call(c.INFO, Empty())
            await wait_nothing_left(tmp_path, s.context.prefix)


async def test_top_shows_the_container_s_processes_alone(s):
    await start(s, "sh", "-c", "sleep 1234 & sleep 4321; true")
    async with s.bus.events("container.top") as events:
        with trio.fail_after(10):
            while True:
                table = await s.call(c.TOP, c.TopContainer(container="box"))
                if len(table.processes) == 3:
                    break
        with trio.fail_after(5):
            assert (await anext(aiter(events))).payload.attributes["name"] == "box"
    assert table.titles[:3] == ["UID", "PID", "PPID"]
    assert sorted(row[-1] for row in table.processes)[-2:] == ["sleep 1234", "sleep 4321"]
    table = await s.call(c.TOP, c.TopContainer(container="box", ps_args=["-o", "pid,comm"]))
    assert table.titles == ["PID", "COMMAND"]
    assert sorted(row[1] for row in table.processes) == ["sh", "sleep", "sleep"]
    table = await s.call(c.TOP, c.TopContainer(container="box", ps_args=["f", "-A"]))  # doesn't go with -q
    assert len(table.processes) == 3
    for wrong, words in ((["--nonsense"], "unknown|unrecognized|error"), (["-o", "comm"], "PID column")):
        with pytest.raises(errors.InvalidArgument, match=words):
            await s.call(c.TOP, c.TopContainer(container="box", ps_args=wrong))
    await s.call(c.KILL, c.KillContainer(container="box"))
    await s.call(c.WAIT, c.WaitContainer(container="box"))
    with pytest.raises(errors.FailedPrecondition, match="not running"):
        await s.call(c.TOP, c.TopContainer(container="box"))

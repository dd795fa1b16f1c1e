"""Health checks of real containers: what is run, what it comes to, what is told of it, and that nothing is left of a check."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio
from tests.containerd_stack import serve_containerd, stack, wait_nothing_left

from pyx_bus import errors
from pyx_bus.contract import containerd as c
from pyx_bus.contract.base import Empty
from pyx_bus.contract.imaged import HealthCheck
from pyx_containerd import kernel

MS = 10**6


@pytest.fixture
async def s(tmp_path):
    async with stack(tmp_path) as running:
        try:
            yield running
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(20):
                await running.bus.call(c.INFO, Empty())
                for row in (await running.bus.call(c.LIST, c.ListContainers(all=True))).containers:
                    with contextlib.suppress(errors.BusError):
                        await running.bus.call(c.REMOVE, c.RemoveContainer(container=row.id, force=True))
                await wait_nothing_left(tmp_path, running.context.prefix)


def check(*test: str, interval_ms: int = 30, **fields) -> HealthCheck:
    return HealthCheck(test=list(test), interval_ns=interval_ms * MS, **fields)


async def start(s, healthcheck: HealthCheck | None, *command: str, name: str = "box", **fields) -> str:
    spec = c.ContainerSpec(image="busybox", command=list(command or ("sleep", "100")), name=name, healthcheck=healthcheck, **fields)
    return (await s.call(c.RUN, c.RunContainer(spec=spec, detach=True))).id


async def inspect(s) -> dict:
    return (await s.call(c.INSPECT, c.ContainerRef(container="box"))).document


async def health(s) -> dict:
    return (await inspect(s))["State"]["Health"]


async def results(s, count: int) -> list[dict]:
    """The log when it has that many results; polled, since a check that changes nothing isn't told."""
    with trio.fail_after(20):
        while len(log := (await health(s))["Log"]) < count:
            await trio.sleep(0.01)
    return log


async def row(s, **filters: list[str]) -> str:
    found = (await s.call(c.LIST, c.ListContainers(all=True, filters=filters))).containers
    return found[0].status if found else ""


async def in_container(s, command: str) -> int:
    request = c.ExecContainer(container="box", args=["sh", "-c", command])
    async with s.bus.stream(c.EXEC, request, timeout_s=20) as stream:
        return (await stream.result()).exit_code


@contextlib.asynccontextmanager
async def statuses(s) -> AsyncIterator:
    """The statuses as they're told."""
    async with s.bus.events("container.health_status") as events:

        async def following() -> str:
            with trio.fail_after(20):
                payload = (await anext(aiter(events))).payload
            assert payload.attributes["health_status"] == payload.status
            return payload.status

        yield following


def processes(s, id_: str) -> list[str]:
    """What runs in its cgroup."""
    found = []
    for pid in kernel.cgroup_processes(f"/{s.context.prefix}/{id_}"):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
    return sorted(found)


async def until_only(s, id_: str, *expected: str) -> None:
    with trio.fail_after(10):
        while processes(s, id_) != sorted(expected):
            await trio.sleep(0.01)


async def test_starting_healthy_unhealthy_and_back(s):
    async with statuses(s) as following:
        await start(s, check("CMD", "test", "!", "-e", "/ill", retries=2))
        assert await following() == "starting"
        assert await row(s) in ("Up Less than a second (health: starting)", "Up Less than a second (healthy)")
        assert await following() == "healthy"
        assert (await row(s, health=["healthy"])).endswith(" (healthy)")
        assert await row(s, health=["starting", "none"]) == ""
        await in_container(s, "touch /ill")
        assert await following() == "unhealthy"
        now = await health(s)
        assert now["Status"] == "unhealthy" and now["FailingStreak"] >= 2
        assert [entry["ExitCode"] for entry in now["Log"]][-2:] == [1, 1]
        assert all(entry["Start"] < entry["End"] for entry in now["Log"])
        assert (await row(s, health=["unhealthy"])).endswith(" (unhealthy)")
        await in_container(s, "rm /ill")
        assert await following() == "healthy"
        assert (await health(s))["FailingStreak"] == 0
        await results(s, 5)
    with pytest.raises(errors.InvalidArgument, match="health"):
        await row(s, health=["ill"])


async def test_what_is_run_and_what_is_kept_of_what_it_says(s):
    await start(s, check("CMD-SHELL", "id -u; echo $A; pwd; echo oops >&2; exit 7"), env=["A=b c"], user="1000:1000", working_dir="/tmp")
    log = await results(s, 6 - 1)
    assert {(entry["ExitCode"], entry["Output"]) for entry in log} == {(7, "1000\nb c\n/tmp\noops\n")}
    assert log[-1]["Start"] > log[0]["End"]
    document = await inspect(s)
    assert document["Config"]["Healthcheck"] == {"Test": ["CMD-SHELL", "id -u; echo $A; pwd; echo oops >&2; exit 7"], "Interval": 30 * MS}
    assert document["State"]["Health"]["Status"] == "unhealthy"  # of three retries


async def test_much_output_is_cut_and_holds_nothing_up(s):
    await start(s, check("CMD", "sh", "-c", "yes 012345678 | head -c 300000; exit 0"))
    (entry, *_) = await results(s, 1)
    assert entry["ExitCode"] == 0
    assert entry["Output"] == ("012345678\n" * 410)[:4096] + "..."


async def test_one_that_cannot_be_run_is_a_failure(s):
    async with statuses(s) as following:
        await start(s, check("CMD", "nope", retries=1))
        assert [await following(), await following()] == ["starting", "unhealthy"]
        entry = (await health(s))["Log"][0]
        assert entry["ExitCode"] == -1 and 'exec: "nope": executable file not found' in entry["Output"]


async def test_what_it_is_called_may_be_long(s):
    await start(s, check("CMD", "x" * 50_000, interval_ms=20))
    log = await results(s, 5)
    assert all(entry["ExitCode"] == -1 and len(entry["Output"]) == 4096 + len("...") for entry in log)


async def test_none_and_no_check_at_all(s):
    for number, healthcheck in enumerate((None, HealthCheck(test=["NONE"]), HealthCheck(interval_ns=5 * MS))):
        id_ = await start(s, healthcheck, name=f"n{number}")
        document = (await s.call(c.INSPECT, c.ContainerRef(container=id_))).document
        assert "Health" not in document["State"]
        assert ("Healthcheck" in document["Config"]) == (healthcheck is not None)
    listed = (await s.call(c.LIST, c.ListContainers(filters={"health": ["none"]}))).containers
    assert len(listed) == 3 and {entry.health for entry in listed} == {""}
    assert "(" not in listed[0].status


@pytest.mark.parametrize(
    "healthcheck",
    [
        HealthCheck(test=["CMD"]), HealthCheck(test=["SH", "x"]), HealthCheck(test=["CMD", "true"], interval_ns=1),
        HealthCheck(test=["CMD", "true"], timeout_ns=-1), HealthCheck(test=["CMD", "true"], retries=-1),
    ],
)  # fmt: skip
async def test_bad_ones_are_refused(s, healthcheck):
    with pytest.raises(errors.InvalidArgument):
        await start(s, healthcheck)
    assert (await s.call(c.LIST, c.ListContainers(all=True))).containers == []


async def test_one_that_hangs_is_killed_with_all_it_has_begun(s):
    hang = "echo begun; sleep 1000 & (sleep 1001 & sleep 1002) & setsid sleep 1003 & wait"
    async with statuses(s) as following:
        id_ = await start(s, check("CMD-SHELL", hang, interval_ms=200, timeout_ns=300 * MS, retries=2))
        assert [await following(), await following()] == ["starting", "unhealthy"]
    log = (await health(s))["Log"]
    assert [entry["ExitCode"] for entry in log] == [-1, -1]
    assert log[0]["Output"] == "Health check exceeded timeout (300ms): begun\n"
    await s.call(c.PAUSE, c.ContainerRef(container="box"))  # no other check begins
    await until_only(s, id_, "sleep 100")


async def test_at_most_one_at_a_time(s):
    await start(s, check("CMD-SHELL", "mkdir /busy || exit 9; sleep 0.2; rmdir /busy", interval_ms=1))
    log = await results(s, 5)
    assert [entry["ExitCode"] for entry in log] == [0] * 5


async def test_the_start_period(s):
    """Failures in it don't count, and it has an interval of its own."""
    before_s = trio.current_time()
    async with statuses(s) as following:
        start_period = {"start_period_ns": 60_000 * MS, "start_interval_ns": 30 * MS}
        unhurried = check("CMD", "test", "-e", "/ready", interval_ms=60_000, retries=1, **start_period)
        await start(s, unhurried)
        await results(s, 3)
        now = await health(s)
        assert (now["Status"], now["FailingStreak"]) == ("starting", 0)
        await in_container(s, "touch /ready")
        assert [await following(), await following()] == ["starting", "healthy"]
    assert trio.current_time() - before_s < 30


async def test_paused_stopped_and_started_again(s, tmp_path):
    id_ = await start(s, check("CMD-SHELL", "echo x >>/log; sleep 0.05"), stop_signal="KILL")
    await results(s, 2)
    await s.call(c.PAUSE, c.ContainerRef(container="box"))
    assert processes(s, id_) == ["sleep 100"]  # the check under way is given up before the freezer
    count = len((await health(s))["Log"])
    assert "(Paused)" in await row(s)
    ran = (tmp_path / "held" / "snapshots" / id_ / "upper" / "log").stat().st_size
    await trio.sleep(0.2)  # six intervals
    assert (tmp_path / "held" / "snapshots" / id_ / "upper" / "log").stat().st_size == ran
    assert len((await health(s))["Log"]) == count
    assert all(entry["ExitCode"] == 0 for entry in (await health(s))["Log"])
    await s.call(c.UNPAUSE, c.ContainerRef(container="box"))
    await results(s, count + 1)
    await s.call(c.STOP, c.StopContainer(container="box"))
    stopped = await health(s)
    assert stopped["Status"] == "unhealthy" and {entry["ExitCode"] for entry in stopped["Log"]} == {0}
    assert (await row(s, health=["unhealthy"])).startswith("Exited (137)")
    async with statuses(s) as following:
        await s.call(c.START, c.StartContainer(container="box"))
        assert [await following(), await following()] == ["starting", "healthy"]
    assert len((await health(s))["Log"]) >= len(stopped["Log"])  # kept over the restart


async def test_the_end_of_the_container_is_no_result(s):
    """What ends because its container ends hasn't failed."""
    async with s.bus.events("container.>", filters={"label!": ["healthcheck"]}) as events:
        await start(s, check("CMD-SHELL", "touch /begun; sleep 50", retries=1), "sh", "-c", "until [ -e /begun ]; do sleep 0.02; done")
        topics = []
        with trio.fail_after(20):
            async for event in events:
                topics.append(event.topic.removeprefix("container."))
                if event.topic == "container.die":
                    break
    assert topics == ["create", "start", "health_status", "die"]
    assert (await health(s))["Log"] == []


async def test_subscribers_can_leave_the_execs_of_checks_out(s):
    async with s.bus.events("container.exec.>") as every, s.bus.events("container.exec.>", filters={"label!": ["healthcheck"]}) as others:
        await start(s, check("CMD", "true", interval_ms=5))
        await results(s, 3)
        await in_container(s, "exit 3")
        with trio.fail_after(10):
            seen = [await anext(aiter(every)) for _ in range(9)]
            left = [await anext(aiter(others)) for _ in range(3)]
    assert [event.topic for event in seen[:3]] == ["container.exec.create", "container.exec.start", "container.exec.die"]
    assert {event.payload.attributes.get("healthcheck") for event in seen[:9]} == {"true"}
    assert seen[0].payload.attributes["command"] == "true"
    assert [event.topic for event in left] == ["container.exec.create", "container.exec.start", "container.exec.die"]
    assert msgspec.to_builtins(left[2].payload)["exit_code"] == 3


async def test_the_service_restarts(tmp_path):
    """What was found is kept, the check under way is given up, the others go on, and nothing is told twice."""
    async with stack(tmp_path, containerd=False) as s, s.bus.events("container.health_status") as events:
        async with serve_containerd(s.bus_path, tmp_path) as s.context:
            id_ = await start(s, check("CMD-SHELL", "exec sleep 0.1", interval_ms=50))
            before = await results(s, 5)
            with trio.fail_after(10):
                assert [(await anext(aiter(events))).payload.status for _ in range(2)] == ["starting", "healthy"]
        await until_only(s, id_, "sleep 100")
        async with serve_containerd(s.bus_path, tmp_path) as s.context:
            now = await health(s)
            kept = sum(entry in now["Log"] for entry in before)
            assert kept >= 3 and now["Status"] == "healthy" and {entry["ExitCode"] for entry in now["Log"]} == {0}
            with trio.fail_after(10):
                while (await health(s))["Log"][0]["Start"] <= before[-1]["End"]:
                    await trio.sleep(0.01)
            assert {entry["ExitCode"] for entry in (await health(s))["Log"]} == {0}
            await s.call(c.REMOVE, c.RemoveContainer(container="box", force=True))
            with trio.move_on_after(0.1) as quiet:
                await anext(aiter(events))
            assert quiet.cancelled_caught
            await wait_nothing_left(tmp_path, s.context.prefix)


@pytest.mark.parametrize("action", ["restart", "stop", "none"])
async def test_the_health_action(s, action):
    async with s.bus.events("container.*", filters={"event": ["start", "stop", "restart", "health_status"]}) as events:
        await start(s, check("CMD", "test", "!", "-e", "/ill", retries=1), health_action=action, stop_signal="KILL")
        await results(s, 1)
        await in_container(s, "touch /ill")
        last = {"restart": "restart", "stop": "stop", "none": "health_status"}[action]
        topics = []
        with trio.fail_after(20):
            async for event in events:
                topics.append(event.topic.removeprefix("container."))
                if topics[-1] == last and (action != "none" or event.payload.status == "unhealthy"):
                    break
    told = ["start", "health_status", "health_status", "health_status"]
    assert topics == told + {"restart": ["stop", "start", "health_status", "restart"], "stop": ["stop"], "none": []}[action]
    running = (await inspect(s))["State"]["Running"]
    assert running == (action != "stop")


async def test_a_health_action_that_is_none_of_them(s):
    with pytest.raises(errors.InvalidArgument, match="health action"):
        await start(s, None, health_action="pray")


async def test_nothing_is_left_of_many_checks(s):
    await start(s, check("CMD", "true", interval_ms=1))
    await results(s, 5)
    before = len(os.listdir("/proc/self/fd"))
    first = (await health(s))["Log"][-1]["End"]
    with trio.fail_after(20):
        while (await health(s))["Log"][0]["Start"] <= first:
            await trio.sleep(0.02)
    await s.call(c.PAUSE, c.ContainerRef(container="box"))
    assert len(os.listdir("/proc/self/fd")) <= before
    bundle = s.directory / "run" / "containerd" / "bundles" / (await inspect(s))["Id"]
    assert [name for name in os.listdir(bundle) if name.startswith(("exec-", "check"))] == []

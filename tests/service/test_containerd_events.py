"""What containerd tells: each event where it belongs, with Docker's attributes, at the moment the state changes."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import termios
from collections.abc import AsyncIterator

import msgspec
import pytest
import trio
from tests.containerd_stack import Stack, serve_containerd, stack, wait_nothing_left

from pyx_bus import errors
from pyx_bus.contract import containerd as c
from pyx_bus.contract.base import Empty, Event
from pyx_containerd import kernel

Told = list[tuple[str, dict[str, str]]]


@pytest.fixture
async def s(tmp_path):
    async with stack(tmp_path) as running:
        try:
            yield running
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(20):
                await running.bus.call(c.INFO, Empty())
                listed = await running.bus.call(c.LIST, c.ListContainers(all=True))
                for row in listed.containers:
                    with contextlib.suppress(errors.BusError):
                        await running.bus.call(c.REMOVE, c.RemoveContainer(container=row.id, force=True, volumes=True))
                await wait_nothing_left(tmp_path, running.context.prefix)


class Tale:
    """What was published since the block began."""

    def __init__(self, events) -> None:
        self._events = events
        self.events: list[tuple[str, Event]] = []

    async def until(self, topic: str) -> list[str]:
        """The topics up to and with ``topic``, without the common first word."""
        with trio.fail_after(15):
            async for event in self._events:
                payload = msgspec.to_builtins(event.payload)
                self.events.append((event.topic, payload))
                if event.topic == "container." + topic:
                    break
        topics = [topic.removeprefix("container.") for topic, _ in self.events]
        self.seen, self.events = self.events, []
        return topics

    def payload(self, topic: str) -> dict:
        return next(payload for name, payload in self.seen if name == "container." + topic)

    def extra(self, topic: str) -> dict[str, str]:
        """Its attributes but for those all have."""
        return {key: value for key, value in self.payload(topic)["attributes"].items() if key not in ("image", "name")}


@contextlib.asynccontextmanager
async def tale(s: Stack) -> AsyncIterator[Tale]:
    async with s.bus.events("container.>") as events:
        yield Tale(events)


def spec(*command, **fields):
    return c.ContainerSpec(image="busybox", command=list(command), **fields)


async def run_detached(s, *command, **fields):
    return (await s.call(c.RUN, c.RunContainer(spec=spec(*command, **fields), detach=True))).id


async def test_create_start_stop_restart_remove(s):
    async with tale(s) as told:
        created = await s.call(c.CREATE, c.CreateContainer(spec=spec("sleep", "100", name="one", stop_signal="KILL", labels={"a": "b"})))
        await s.call(c.START, c.StartContainer(container="one"))
        await s.call(c.PAUSE, c.ContainerRef(container="one"))
        await s.call(c.UNPAUSE, c.ContainerRef(container="one"))
        await s.call(c.RENAME, c.RenameContainer(container="one", name="two"))
        await s.call(c.STOP, c.StopContainer(container="two"))
        assert await told.until("stop") == ["create", "start", "pause", "unpause", "rename", "kill", "die", "stop"]
        assert all(payload["id"] == created.id for _, payload in told.seen)
        assert told.payload("create")["attributes"] == {"image": "busybox", "name": "one", "a": "b"}
        assert told.payload("rename")["attributes"] == {"image": "busybox", "name": "two", "a": "b", "oldName": "/one"}
        assert told.extra("kill") == {"a": "b", "signal": "9"}
        died = told.payload("die")
        assert told.extra("die") == {"a": "b", "exitCode": "137", "execDuration": "0", "signal": "9"}
        assert (died["exit_code"], died["signal"], died.get("oom_killed", False)) == (137, 9, False)
        assert 0 < died["run_time_ns"] < 60 * 10**9
        await s.call(c.RESTART, c.StopContainer(container="two"))
        assert await told.until("restart") == ["start", "restart"]
        await s.call(c.REMOVE, c.RemoveContainer(container="two", force=True))
        assert await told.until("destroy") == ["kill", "die", "destroy"]


async def test_the_stages_of_an_exec(s):
    await run_detached(s, "sleep", "100", name="host")
    async with tale(s) as told:
        request = c.ExecContainer(container="host", args=["sh", "-c", "exit 3"], env=["SECRET=x"])
        items = []
        async with s.bus.stream(c.EXEC, request, timeout_s=20) as stream:
            async for item in stream:
                items.append(item)
            assert (await stream.result()).exit_code == 3
        assert await told.until("exec.die") == ["exec.create", "exec.start", "exec.die"]
        key = items[0].exec_id
        assert len(key) == 16
        assert {payload["exec_id"] for _, payload in told.seen} == {key}
        assert told.extra("exec.create") == told.extra("exec.start") == {"execID": key, "command": "sh -c exit 3"}
        assert told.extra("exec.die") == {"execID": key, "exitCode": "3"}
        assert told.payload("exec.die")["exit_code"] == 3
        assert "SECRET" not in repr(told.seen)
        with pytest.raises(errors.FailedPrecondition):
            await s.call(c.EXEC, c.ExecContainer(container="host", args=["nope"]))
        assert await told.until("exec.die") == ["exec.create", "exec.die"]
        assert told.payload("exec.die")["exit_code"] == 127
        async with s.bus.stream(c.EXEC, c.ExecContainer(container="host", args=["sleep", "100"]), timeout_s=20) as stream:
            started = await anext(aiter(stream))
            await s.call(c.DETACH, c.DetachClient(container="host", exec_id=started.exec_id))
            await s.call(c.KILL, c.KillContainer(container="host"))
        # what ends with its container has ended before it
        assert await told.until("die") == ["exec.create", "exec.start", "exec.detach", "kill", "exec.die", "die"]
        assert told.extra("exec.detach") == {"execID": started.exec_id}


async def test_attach_detach_resize(s):
    async with tale(s) as told:
        request = c.RunContainer(
            spec=spec("sh", tty=True, open_stdin=True, name="term"), attach=c.AttachOptions(stdin=True, rows=30, columns=90)
        )
        async with s.bus.stream(c.RUN, request, timeout_s=20) as stream:
            async for item in stream:
                if item.phase == "started":
                    break
            assert await told.until("resize") == ["create", "attach", "start", "resize"]
            assert told.extra("resize") == {"height": "30", "width": "90"}
            (master,) = stream.take_fds()
            await s.call(c.RESIZE, c.ResizeContainer(container="term", rows=11, columns=22))
            assert struct.unpack("HHHH", _size(master))[:2] == (11, 22)
            os.close(master)
            await s.call(c.DETACH, c.DetachClient(container="term"))
            assert await told.until("detach") == ["resize", "detach"]
            with pytest.raises(errors.InvalidArgument):
                await s.call(c.RESIZE, c.ResizeContainer(container="term", rows=0, columns=22))
            with pytest.raises(errors.NotFound):
                await s.call(c.DETACH, c.DetachClient(container="term", exec_id="nope"))
            await s.call(c.KILL, c.KillContainer(container="term"))
    await run_detached(s, "sleep", "100", name="plain")
    with pytest.raises(errors.FailedPrecondition, match="no terminal"):
        await s.call(c.RESIZE, c.ResizeContainer(container="plain", rows=1, columns=1))


def _size(fd: int) -> bytes:
    import fcntl

    return fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))


async def test_out_of_memory_is_told_before_the_end(s):
    limits = c.Resources(memory_bytes=16 << 20, memory_swap_bytes=16 << 20)
    async with tale(s) as told:
        await run_detached(s, "sh", "-c", "x=x; while :; do x=$x$x$x$x; done", resources=limits)
        assert await told.until("die") == ["create", "start", "oom", "die"]
        assert told.payload("die")["oom_killed"] is True


async def test_out_of_memory_is_told_while_it_goes_on(s):
    """The kernel ends a child, and the container survives."""
    limits = c.Resources(memory_bytes=16 << 20, memory_swap_bytes=16 << 20)
    async with tale(s) as told:
        script = "sh -c 'x=x; while :; do x=$x$x$x$x; done'; sh -c 'y=y; while :; do y=$y$y$y$y; done'; sleep 100"
        await run_detached(s, "sh", "-c", script, resources=limits, name="tough")
        assert await told.until("oom") == ["create", "start", "oom"]
        assert await told.until("oom") == ["oom"]
        assert told.payload("oom").get("kills", 1) == 1
        assert (await s.call(c.INSPECT, c.ContainerRef(container="tough"))).document["State"]["Running"]
        await s.call(c.KILL, c.KillContainer(container="tough"))
        assert await told.until("die") == ["kill", "die"]


async def test_the_list_agrees_with_the_events_at_every_moment(s, monkeypatch):
    """Whenever something is published, what LIST would answer has just changed; and it never changes without."""
    import pyx_containerd.engine

    engines: list[pyx_containerd.engine.Engine] = []
    publish = pyx_containerd.engine.Engine.publish
    told: list[str] = []

    def spy(self, kind, record, *arguments, **extra):
        if not engines:
            engines.append(self)
        told.append(kind.topic)
        publish(self, kind, record, *arguments, **extra)

    monkeypatch.setattr(pyx_containerd.engine.Engine, "publish", spy)
    states: list[tuple[int, tuple]] = []

    def look() -> None:
        if engines:
            now = tuple((live.record.name, live.record.state.value, len(live.executions)) for live in engines[0].containers.values())
            if not states or states[-1][1] != now:
                states.append((len(told), now))

    class Watch(trio.abc.Instrument):
        def after_task_step(self, task) -> None:
            look()

    trio.lowlevel.add_instrument(watch := Watch())
    try:
        await run_detached(s, "sleep", "100", name="xx")
        await s.call(c.EXEC, c.ExecContainer(container="xx", args=["true"]))
        await s.call(c.PAUSE, c.ContainerRef(container="xx"))
        await s.call(c.UNPAUSE, c.ContainerRef(container="xx"))
        await s.call(c.RENAME, c.RenameContainer(container="xx", name="yy"))
        await s.call(c.KILL, c.KillContainer(container="yy"))
        await s.call(c.WAIT, c.WaitContainer(container="yy"))
        await s.call(c.REMOVE, c.RemoveContainer(container="yy"))
        status = await s.call(c.RUN, c.RunContainer(spec=spec("true", auto_remove=True, name="zz")))
        assert status.exit_code == 0
    finally:
        trio.lowlevel.remove_instrument(watch)
    for (before, old), (after, new) in itertools.pairwise(states):
        leaving = [name for name, state, _ in new if state == "removing"]  # on its way to its destroy event
        assert after > before or leaving, (old, new, told[before:after])
    assert [state for _, state in states][-1] == ()
    assert told[-1] == "container.destroy"


async def test_what_a_kill_left_is_told_after_the_restart(tmp_path):
    """A pause whose event and row a killed service had no time for, and a container nobody knows."""
    async with stack(tmp_path, containerd=False) as s:
        async with serve_containerd(s.bus_path, tmp_path) as context:
            prefix = context.prefix
            id_ = await run_detached(s, "sleep", "100", name="frozen")
        cgroup = f"/{prefix}/{id_}"
        for place in kernel.cgroup_directories(cgroup):
            for name, word in (("cgroup.freeze", "1"), ("freezer.state", "FROZEN")):
                if (place / name).exists():
                    (place / name).write_text(word)
        unknown = tmp_path / "run" / "containerd" / "bundles" / ("e" * 64)
        unknown.mkdir()
        async with tale(s) as told, serve_containerd(s.bus_path, tmp_path):
            await told.until("pause")
            assert told.payload("pause")["attributes"]["name"] == "frozen"
            if not any(payload["id"] == "e" * 64 for _, payload in told.seen):
                await told.until("destroy")
            assert told.payload("destroy")["id"] == "e" * 64
            await s.call(c.REMOVE, c.RemoveContainer(container=id_, force=True))
            await wait_nothing_left(tmp_path, prefix)


async def test_a_life_shorter_than_the_news_of_it_has_a_run_time(s):
    async with tale(s) as told:
        for _ in range(5):
            created = await s.bus.call(c.CREATE, c.CreateContainer(spec=spec("true", name="short")))
            await s.bus.call(c.START, c.StartContainer(container=created.id))
            await told.until("die")
            state = (await s.bus.call(c.INSPECT, c.ContainerRef(container="short"))).document["State"]
            assert "0001" < state["StartedAt"] < state["FinishedAt"]
            assert 0 < told.payload("die")["run_time_ns"] < 10**10
            await s.bus.call(c.REMOVE, c.RemoveContainer(container="short"))
            await told.until("destroy")

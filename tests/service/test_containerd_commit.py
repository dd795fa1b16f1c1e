"""commit and diff as containerd does them: what imaged is asked for; the container stands still while it is read, and no longer."""

from __future__ import annotations

import os

import pytest
import trio
from tests.containerd_stack import stack, wait_nothing_left

from pyx_bus import errors
from pyx_bus.contract import containerd as c
from pyx_bus.contract import imaged


async def until(condition, seconds=10):
    with trio.fail_after(seconds):
        while not await condition():
            await trio.sleep(0.01)


class Box:
    """A running container of a stack, looked at through the bus."""

    def __init__(self, s):
        self.s = s

    async def state(self):
        return (await self.s.call(c.INSPECT, c.ContainerRef(container="box"))).document["State"]["Status"]

    async def commit(self, **fields):
        return await self.s.call(c.COMMIT, c.CommitContainer(container="box", **fields))


@pytest.fixture
async def box(tmp_path):
    async with stack(tmp_path) as s:
        spec = c.ContainerSpec(
            image="busybox", name="box", command=["sleep", "1000"], env=["A=1", "GONE"], labels={"l": "v"}, user="1:2", stop_signal="INT",
            exposed_ports=["80"], working_dir="/tmp", mounts=[c.MountRequest(type="volume", target="/data")],
        )  # fmt: skip
        await s.call(c.RUN, c.RunContainer(spec=spec, detach=True))
        try:
            yield Box(s)
        finally:
            await s.call(c.REMOVE, c.RemoveContainer(container="box", force=True))
            await wait_nothing_left(tmp_path, s.context.prefix)


async def test_what_imaged_is_asked_for(box):
    made = await box.commit(reference="x:1", author="me", message="why", changes=["CMD a"])
    assert made == imaged.ImageID(id="sha256:" + "c" * 64, reference="x:1")
    (request,) = box.s.holders.commits
    assert (request.reference, request.author, request.message, request.changes) == ("x:1", "me", "why", ["CMD a"])
    assert request.created_by == "sleep 1000"
    assert request.config == imaged.ImageConfig(
        id=request.config.id, reference=request.config.reference, user="1:2", env=["A=1"], cmd=["sleep", "1000"], working_dir="/tmp",
        volumes=["/data"], exposed_ports=["80/tcp"], labels={"l": "v"}, stop_signal="INT",
    )  # fmt: skip


async def test_it_stands_still_while_it_is_read_and_no_longer(box):
    box.s.holders.read = trio.Event()
    box.s.holders.stored = trio.Event()
    results = []
    async with box.s.bus.events("container.*") as events, trio.open_nursery() as nursery:

        async def commit():
            results.append(await box.commit(message="why"))

        nursery.start_soon(commit)
        await until(lambda: has(box.s.holders.commits))
        assert await box.state() == "paused"
        box.s.holders.read.set()
        await until(lambda: is_state(box, "running"))
        assert not results
        box.s.holders.stored.set()
        topics = [await anext(events) for _ in range(3)]
    assert [event.topic for event in topics] == ["container.pause", "container.unpause", "container.commit"]
    told = topics[2].payload.attributes
    assert (told["comment"], told["imageID"], told["imageRef"], told["name"]) == ("why", results[0].id, "", "box")


async def has(things):
    return bool(things)


async def is_state(box, state):
    return await box.state() == state


async def test_it_goes_on_after_a_failure(box):
    box.s.holders.fail["imaged.commit"] = errors.ResourceExhausted("no space left")
    with pytest.raises(errors.ResourceExhausted, match="no space left"):
        await box.commit()
    assert await box.state() == "running"


async def test_it_goes_on_when_whoever_asked_has_gone(box):
    box.s.holders.read = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.commit)
        await until(lambda: has(box.s.holders.commits))
        assert await box.state() == "paused"
        nursery.cancel_scope.cancel()
    await until(lambda: is_state(box, "running"))


async def test_who_is_paused_stays_so(box):
    await box.s.call(c.PAUSE, c.ContainerRef(container="box"))
    await box.commit()
    assert await box.state() == "paused"
    await box.s.call(c.UNPAUSE, c.ContainerRef(container="box"))


async def test_without_pause(box):
    box.s.holders.read = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: box.commit(pause=False))
        await until(lambda: has(box.s.holders.commits))
        assert await box.state() == "running"
        box.s.holders.read.set()


async def test_two_at_once_and_an_end_meanwhile(box):
    """The second waits for the first, and the container may be stopped under both."""
    box.s.holders.read = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.commit)
        nursery.start_soon(box.commit)
        await until(lambda: has(box.s.holders.commits))
        assert len(box.s.holders.commits) == 1
        await box.s.call(c.STOP, c.StopContainer(container="box", timeout_s=0))
        box.s.holders.read.set()
    assert len(box.s.holders.commits) == 2 and await box.state() == "exited"
    await box.commit()


async def test_diff_hands_the_pipe_on(box):
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as reader:
        try:
            await box.s.bus.call(c.DIFF, c.DiffContainer(container="box"), fds=[write_end])
        finally:
            os.close(write_end)
        assert reader.read().startswith(b"A /")
    assert not c.DIFF.read_only and not c.COMMIT.read_only  # names of files aren't for monitors
    with pytest.raises(errors.InvalidArgument, match="one descriptor"):
        await box.s.call(c.DIFF, c.DiffContainer(container="box"))
    for method, request in ((c.DIFF, c.DiffContainer(container="nosuch")), (c.COMMIT, c.CommitContainer(container="nosuch"))):
        with pytest.raises(errors.NotFound):
            await box.s.bus.call(method, request)

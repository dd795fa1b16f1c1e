"""containerd whose own file system is full: how containers ended is neither lost, nor wrong, nor told twice."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from tests.containerd_stack import leftovers, stack
from tests.kernel.test_containerd_crash import Process, no_process_left, remove_all, spec

from pyx_bus import errors
from pyx_bus.contract import containerd as c
from pyx_bus.service import stack_prefix

pytestmark = pytest.mark.root
_libc = ctypes.CDLL(None, use_errno=True)
__all__ = ["no_process_left"]


@contextlib.contextmanager
def small(place: Path) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    assert _libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"size=400k,nr_inodes=200") == 0
    try:
        yield
    finally:
        _libc.umount2(os.fsencode(place), 2)


def fill(place: Path) -> Path:
    """Take all room there is; removing what is returned gives it back."""
    filler = place / "filler"
    with open(filler, "ab", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    return filler


@contextlib.asynccontextmanager
async def tale(s):
    """The events of containers from now on, as (what, name, exit code)."""
    seen = []
    async with trio.open_nursery() as nursery, s.bus.events("container.>") as events:

        async def read():
            async for event in events:
                payload = event.payload
                attributes = payload.attributes
                seen.append((event.topic.rpartition(".")[2], attributes.get("name", ""), attributes.get("exitCode", "")))

        nursery.start_soon(read)
        yield seen
        nursery.cancel_scope.cancel()


async def status(s, name):
    document = (await s.bus.call(c.INSPECT, c.ContainerRef(container=name), timeout_s=10)).document
    state = document["State"]
    return state["Status"], state["ExitCode"], state["FinishedAt"]


async def pid(s, name):
    return (await s.bus.call(c.INSPECT, c.ContainerRef(container=name), timeout_s=10)).document["State"]["Pid"]


async def ended(s, name):
    return (await s.bus.call(c.WAIT, c.WaitContainer(container=name), timeout_s=20)).exit_code


async def settled(tmp_path):
    """Nothing is left to write."""
    with trio.fail_after(10):
        while any((tmp_path / "run" / "containerd" / "rows").iterdir()):
            await trio.sleep(0.05)


async def nothing_left(tmp_path):
    """But for the small file systems."""
    places = [f"mount {tmp_path / kind / 'containerd'}" for kind in ("root", "run")]
    with trio.fail_after(10):
        while [found for found in leftovers(tmp_path, stack_prefix(tmp_path / "run")) if found not in places]:
            await trio.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_what_happens_on_a_full_disk_is_known_after_restarts(tmp_path, how):
    room = tmp_path / "root" / "containerd"
    with small(room):
        async with stack(tmp_path, containerd=False) as s, tale(s) as seen:
            process = Process(tmp_path, s.bus_path)
            await process.ready(s.bus)
            for name, command in (("seven", "exit 7"), ("eight", "exit 8"), ("away", "exit 9"), ("paused", "exit 10")):
                wait = "while [ ! -e /go ]; do sleep 0.02; done; "
                made = spec("sh", "-c", wait + command, name=name, auto_remove=name == "away")
                await s.bus.call(c.RUN, c.RunContainer(spec=made, detach=True), timeout_s=20)
            filler = fill(room)
            pids = {name: await pid(s, name) for name in ("seven", "eight", "away", "paused")}

            def go(name):
                Path(f"/proc/{pids[name]}/root/go").touch()

            await s.bus.call(c.PAUSE, c.ContainerRef(container="paused"), timeout_s=10)
            go("seven")
            assert await ended(s, "seven") == 7
            go("away")
            with trio.fail_after(10):
                while ("destroy", "away", "") not in seen:
                    await trio.sleep(0.02)
            with pytest.raises(errors.ResourceExhausted):  # what can be refused is
                await s.bus.call(c.RENAME, c.RenameContainer(container="seven", name="other"), timeout_s=10)
            before = await status(s, "seven")
            await process.end(how)
            go("eight")  # it ends while nobody is there

            process = Process(tmp_path, s.bus_path)  # on the full disk
            await process.ready(s.bus)
            assert await ended(s, "eight") == 8
            assert await status(s, "seven") == before
            assert (await status(s, "paused"))[0] == "paused"
            with pytest.raises(errors.NotFound):
                await status(s, "away")
            eight = await status(s, "eight")
            await process.end(how)
            filler.unlink()

            process = Process(tmp_path, s.bus_path)  # with room
            await process.ready(s.bus)
            await settled(tmp_path)
            await s.bus.call(c.UNPAUSE, c.ContainerRef(container="paused"), timeout_s=10)
            go("paused")
            assert await ended(s, "paused") == 10
            await process.end(signal.SIGKILL)

            process = Process(tmp_path, s.bus_path)  # from the rows alone
            await process.ready(s.bus)
            assert await status(s, "seven") == before
            assert await status(s, "eight") == eight
            assert (await status(s, "paused"))[:2] == ("exited", 10)
            await remove_all(s)
            await nothing_left(tmp_path)
            await process.end(signal.SIGTERM)
            died = [event[1:] for event in seen if event[0] == "die"]
            assert sorted(died) == [("away", "9"), ("eight", "8"), ("paused", "10"), ("seven", "7")]
            assert [event for event in seen if event[0] == "pause"] == [("pause", "paused", "")]


async def test_the_row_is_written_when_there_is_room_again(tmp_path):
    room = tmp_path / "root" / "containerd"
    with small(room):
        async with stack(tmp_path, containerd=False) as s:
            process = Process(tmp_path, s.bus_path)
            await process.ready(s.bus)
            made = spec("sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.02; done", name="seven")
            await s.bus.call(c.RUN, c.RunContainer(spec=made, detach=True), timeout_s=20)
            filler = fill(room)
            await s.bus.call(c.STOP, c.StopContainer(container="seven"), timeout_s=20)
            assert any((tmp_path / "run" / "containerd" / "rows").iterdir())
            filler.unlink()
            await settled(tmp_path)
            await s.bus.call(c.REMOVE, c.RemoveContainer(container="seven"), timeout_s=10)
            await process.end(signal.SIGTERM)


def fill_inodes(place: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        for number in itertools.count():
            (place / f"filler{number}").touch()


async def test_where_nothing_can_be_written_the_shim_stays(tmp_path):
    """The run directory is on a full file system, too: only the shim's memory knows how it ended."""
    room, run = tmp_path / "root" / "containerd", tmp_path / "run" / "containerd"
    with small(room), small(run):
        async with stack(tmp_path, containerd=False) as s:
            process = Process(tmp_path, s.bus_path)
            await process.ready(s.bus)
            made = spec("sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.02; done", name="seven")
            await s.bus.call(c.RUN, c.RunContainer(spec=made, detach=True), timeout_s=20)
            for place in (room, run):
                fill(place)
                fill_inodes(place)
            await s.bus.call(c.STOP, c.StopContainer(container="seven"), timeout_s=20)
            before = await status(s, "seven")
            for call, request in ((c.START, c.StartContainer(container="seven")), (c.REMOVE, c.RemoveContainer(container="seven"))):
                with pytest.raises(errors.ResourceExhausted):
                    await s.bus.call(call, request, timeout_s=20)
            assert await status(s, "seven") == before
            await process.end(signal.SIGKILL)
            for filler in (*room.glob("filler*"), *run.glob("filler*")):
                filler.unlink()
            process = Process(tmp_path, s.bus_path)
            await process.ready(s.bus)
            assert await ended(s, "seven") == 7
            assert await status(s, "seven") == before
            await nothing_left(tmp_path)
            await remove_all(s)
            await process.end(signal.SIGTERM)

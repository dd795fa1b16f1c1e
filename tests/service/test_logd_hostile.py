"""Output made to hurt: lines so short that their records are a hundred times as long; a rotation when no descriptor is left."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.service.test_logd_service import ID, Container, read_all, stack

from pyx_bus.contract import logd
from pyx_bus.contract.base import Retain
from pyx_logd.clients import Client
from pyx_logd.drivers.json_file import JsonFile
from pyx_logd.frames import raw
from pyx_logd.model import Chunk
from pyx_logd.reader import LogReader, Selection
from pyx_logd.window import READ_MAX_BYTES, Window


async def test_empty_lines_are_read_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each becomes a record of 70 bytes: a full read of them would hold everybody else up for 40 ms."""
    limits: Counter[int] = Counter()
    read = Window.read

    def counted(self: Window, fd: int, mark: Any, limit: int = READ_MAX_BYTES) -> bytes | None:
        limits[limit] += 1
        return read(self, fd, mark, limit)

    monkeypatch.setattr(Window, "read", counted)
    async with stack(tmp_path) as s:
        container = Container(s)
        fcntl.fcntl(container.out, fcntl.F_SETPIPE_SZ, 1 << 20)
        os.write(container.out, b"\n" * 400_000)  # all there before the first read: reads are as large as they may be
        await container.open()
        await container.end()
        assert len((s.root / ID / f"{ID}-json.log").read_bytes().splitlines()) == 400_000
    assert min(limits) < READ_MAX_BYTES


async def test_a_rotation_that_a_follower_cannot_see_costs_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor is left for the follower: it ends, the container's output is stored all the same."""
    segments = JsonFile.segments
    refuse = False

    def refusing(self: JsonFile) -> Any:
        if refuse:
            raise OSError(24, "Too many open files")
        return segments(self)

    monkeypatch.setattr(JsonFile, "segments", refusing)
    async with stack(tmp_path) as s:
        container = Container(s)
        await container.open(options={"max-size": "1k", "max-file": "2"})
        read_end, write_end = os.pipe()
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                await s.bus.call(logd.READ, logd.ReadLogs(container_id=ID, follow=True), fds=[write_end], timeout_s=20)

            nursery.start_soon(follow)
            os.write(container.out, b"first\n")
            with trio.fail_after(10):
                await trio.lowlevel.wait_readable(read_end)
            os.close(write_end)
            refuse = True
            for number in range(40):
                os.write(container.out, b"line %d\n" % number)
            with trio.fail_after(10):
                assert b"first" in await read_all(read_end)
        await container.end()
        assert s.log()[-1]["log"] == "line 39\n"


async def test_rotations_while_the_tail_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that looks goes on with the files it had; they aren't closed under it."""
    (tmp_path / "c").mkdir()
    driver = JsonFile(tmp_path / "c", {"max-size": "100", "max-file": "12"}, lambda what, error, lost: None)
    driver.open()

    def write(first: int) -> None:
        for number in range(first, first + 30):
            driver.write([Chunk("stdout", b"%d\n" % number, 1)])

    write(0)
    look = LogReader._lines_back
    looks = 0

    def slowly(segment: Any, wanted: int, *, newest: bool) -> tuple[int, int]:
        nonlocal looks
        looks += 1
        if looks == 2:
            write(30)
        return look(segment, wanted, newest=newest)

    monkeypatch.setattr(LogReader, "_lines_back", staticmethod(slowly))
    read_end, write_end = os.pipe()
    client = Client(write_end, raw)
    reader = LogReader(driver, Selection(tail=8), raw)
    reader.follow()
    await reader.send_to(client)
    reader.close()
    client.close()
    await driver.aclose()
    assert (await read_all(read_end)).split() == [b"%d" % number for number in range(22, 60)]


async def test_what_is_no_log_is_left_alone(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        (s.root / "lost+found").mkdir()
        released = await s.bus.call(logd.RETAIN, Retain(container_ids=[], before_ns=1 << 62))
        assert released.container_ids == [] and (s.root / "lost+found").is_dir()

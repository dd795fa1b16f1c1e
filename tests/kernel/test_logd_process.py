"""logd as the process it is: killed at any moment, and on a disk that's full."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from pyx_bus import testing
from pyx_bus.client import Bus, connect
from pyx_bus.contract import logd
from pyx_bus.errors import BusError, InvalidArgument, Unavailable
from pyx_logd.window import available

ID = "ab" * 32


class Process:
    """A logd of its own, beside a broker that stays."""

    def __init__(self, directory: Path, bus: Path) -> None:
        self.environment = {**os.environ, "PYX_ROOT": str(directory / "root"), "PYX_RUN": str(directory / "run"), "PYX_BUS": str(bus)}
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyx_logd"], env=self.environment, stderr=subprocess.PIPE, start_new_session=True
        )

    def end(self, number: int) -> str:
        self.process.send_signal(number)
        return self.process.communicate(timeout=10)[1].decode()


@asynccontextmanager
async def stack(directory: Path) -> AsyncIterator[tuple[Bus, Process]]:
    async with testing.broker(directory) as path, connect(str(path), "test") as bus:
        process = Process(directory, path)
        try:
            yield bus, process
        finally:
            if process.process.returncode is None:
                process.end(signal.SIGTERM)


async def open_log(bus: Bus, out: int, err: int, *clients: int) -> None:
    """As containerd does: again and again until logd is back."""
    with trio.fail_after(15):
        while True:
            try:
                request = logd.OpenLog(container_id=ID, run=1, streams=["stdout", "stderr"], attached=len(clients))
                await bus.call(logd.OPEN, request, fds=[out, err, *clients], timeout_s=5)
                return
            except BusError:
                await trio.sleep(0.02)


WRITER = """
import os
for number in range(60000):
    os.write(1, b"line %d %s" % (number, b"x" * (number % 90)))
    os.write(1, b"\\n")
"""


async def test_no_line_is_lost_or_doubled_when_logd_is_killed(tmp_path: Path) -> None:
    out_read, out = os.pipe()
    err_read, err = os.pipe()
    async with stack(tmp_path) as (bus, process):
        await open_log(bus, out_read, err_read)
        writer = subprocess.Popen([sys.executable, "-c", WRITER], stdout=out, stderr=err)
        os.close(out)
        os.close(err)
        kills = 0
        while writer.poll() is None or kills < 3:
            await trio.sleep(0.03 + 0.011 * kills)
            await trio.to_thread.run_sync(process.end, signal.SIGKILL)
            kills += 1
            process.start()
            await open_log(bus, out_read, err_read)
            if kills > 20:
                break
        await bus.call(logd.WAIT_DRAINED, logd.WaitDrained(container_id=ID, run=1), timeout_s=20)
        await trio.to_thread.run_sync(writer.wait)
        os.close(out_read)
        os.close(err_read)
        lines = (tmp_path / "root" / "logd" / ID / f"{ID}-json.log").read_bytes().splitlines()
        texts = [json.loads(line)["log"] for line in lines]
        assert texts == [f"line {number} {'x' * (number % 90)}\n" for number in range(60_000)]
        assert list((tmp_path / "run" / "logd").iterdir()) == []


async def blocked(pipe: int) -> None:
    """Until the pipe is full and stays so."""
    last, same = -1, 0
    with trio.fail_after(10):
        while same < 20:
            now = available(pipe)
            same = same + 1 if now == last and now > 400_000 else 0
            last = now
            await trio.sleep(0.005)


async def test_an_attached_client_that_comes_again_gets_every_byte_once(tmp_path: Path) -> None:
    out_read, out = os.pipe()
    err_read, err = os.pipe()
    client_read, client = os.pipe()
    async with stack(tmp_path) as (bus, process):
        await open_log(bus, out_read, err_read, client)
        got = bytearray()

        def read_slowly() -> None:
            while block := os.read(client_read, 3000):
                got.extend(block)

        writer = subprocess.Popen([sys.executable, "-c", WRITER], stdout=out, stderr=err)
        os.close(out)
        os.close(err)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                # Nobody reads: the client's pipe gets full, with a part of a frame in it, and logd waits. (In the flow of output a
                # kill may come between a write to the client and its being noted, and then repeats that write.)
                await blocked(client_read)
                await trio.to_thread.run_sync(process.end, signal.SIGKILL)
                got.extend(os.read(client_read, 100_001))
                process.start()
                await open_log(bus, out_read, err_read, client)
            await blocked(client_read)
            nursery.start_soon(trio.to_thread.run_sync, read_slowly)
            await bus.call(logd.WAIT_DRAINED, logd.WaitDrained(container_id=ID, run=1), timeout_s=20)
            os.close(client)
            await trio.to_thread.run_sync(writer.wait)
        text = b""
        while got:
            assert got[:4] == b"\1\0\0\0"
            size = int.from_bytes(got[4:8], "big")
            text += got[8 : 8 + size]
            del got[: 8 + size]
        assert text == b"".join(b"line %d %s\n" % (number, b"x" * (number % 90)) for number in range(60_000))
        for fd in (out_read, err_read, client_read):
            os.close(fd)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_who_waits_for_the_end_waits_for_a_restarted_logd(tmp_path: Path, end: int) -> None:
    out_read, out = os.pipe()
    err_read, err = os.pipe()
    async with stack(tmp_path) as (bus, process):
        await open_log(bus, out_read, err_read)
        path = tmp_path / "root" / "logd" / ID / f"{ID}-json.log"
        os.write(out, b"first\nunfinished ")
        with trio.fail_after(5):
            while not path.read_bytes():
                await trio.sleep(0.005)
        await trio.to_thread.run_sync(process.end, end)
        os.write(out, b"line\nlast")
        os.close(out)
        os.close(err)
        process.start()
        stored_at_the_end: list[str] = []

        async def wait() -> None:
            await bus.call(logd.WAIT_DRAINED, logd.WaitDrained(container_id=ID, run=1), timeout_s=10)
            stored_at_the_end.extend(json.loads(line)["log"] for line in path.read_bytes().splitlines())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            with trio.fail_after(10), suppress(InvalidArgument):  # it needs a descriptor: so logd is there
                while True:
                    with suppress(Unavailable):
                        await bus.call(logd.READ, logd.ReadLogs(container_id=ID), timeout_s=5)
                    await trio.sleep(0.01)
            assert not stored_at_the_end
            await open_log(bus, out_read, err_read)
        assert stored_at_the_end == ["first\n", "unfinished line\n", "last"]
    os.close(out_read)
    os.close(err_read)


def mount(source: str, target: Path, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), str(target).encode(), b"tmpfs", 0, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "mount", str(target))


@pytest.mark.root
async def test_a_full_disk_stops_no_container(tmp_path: Path) -> None:
    root = tmp_path / "root" / "logd"
    root.mkdir(parents=True)
    mount("pyx-test", root, "size=256k")
    try:
        async with stack(tmp_path) as (bus, process):
            out_read, out = os.pipe()
            err_read, err = os.pipe()
            await open_log(bus, out_read, err_read)
            client_read, client = os.pipe()
            await bus.call(logd.ATTACH, logd.AttachLog(container_id=ID), fds=[client])
            os.close(client)
            data = b"".join(b"%09d\n" % number for number in range(200_000))

            def write() -> None:
                view = memoryview(data)
                while view:
                    view = view[os.write(out, view) :]
                os.close(out)
                os.close(err)

            def read() -> int:
                total = 0
                while block := os.read(client_read, 1 << 20):
                    total += len(block)
                return total

            total = 0

            async def collect() -> None:
                nonlocal total
                total = await trio.to_thread.run_sync(read)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(collect)
                nursery.start_soon(trio.to_thread.run_sync, write)
            assert total > len(data)  # the client has all of it, with the frames' headers
            await bus.call(logd.WAIT_DRAINED, logd.WaitDrained(container_id=ID, run=1), timeout_s=10)
            stored = (root / ID / f"{ID}-json.log").read_bytes()
            assert stored.endswith(b"\n") and len(stored) > 100_000
            for line in stored.splitlines():
                json.loads(line)
            told = []
            with trio.fail_after(10):
                async with bus.events("log.>", since="beginning") as events:
                    async for event in events:
                        told.append((event.topic, event.payload.id, event.payload.attributes))
                        if event.topic == "log.recovered":
                            assert event.payload.lost_bytes > 0
                            assert told[-1][2]["lostBytes"] == str(event.payload.lost_bytes)
                            break
            common = {"container": ID, "driver": "json-file"}
            assert [one[:2] for one in told] == [("log.trouble", ID), ("log.recovered", ID)]  # once each, however many writes failed
            assert told[0][2] == {**common, "reason": "no space left on device"}
            errors = await trio.to_thread.run_sync(process.end, signal.SIGTERM)
            assert "output lost" in errors and ID in errors and "No space left" in errors
            for fd in (out_read, err_read, client_read):
                os.close(fd)
    finally:
        ctypes.CDLL(None).umount2(str(root).encode(), 2)

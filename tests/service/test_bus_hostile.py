"""Hostile input on the live socket: the broker stays up, others are served, and its memory and descriptors are as before."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from msgpack import packb

from pyx_bus import client, testing, wire
from pyx_bus.contract import bus as bus_contract
from pyx_bus.contract.base import Empty
from pyx_bus.wire import HEADER, encode

HELLO = encode(wire.HELLO, b"", packb({"version": 1, "oldest": 1, "name": "hostile"}))


def raw(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(str(path))
    return sock


def ends(sock: socket.socket) -> bytes:
    """Everything the broker still says, up to its closing the connection."""
    data = b""
    while True:
        try:
            chunk = sock.recv(65536)
        except ConnectionResetError:
            return data
        if not chunk:
            return data
        data += chunk


def garbage() -> Iterator[bytes]:
    generator = random.Random(1)
    for _ in range(30):
        yield generator.randbytes(generator.randint(24, 2000)) + b"\xff" * 24
        yield HELLO + generator.randbytes(generator.randint(24, 2000)) + b"\xff" * 24
    yield HEADER.pack(wire.MAX_HELLO + 1, wire.HELLO, 0, 0, 0, 0, 0, 0)
    yield HELLO + HEADER.pack(wire.MAX_FRAME + 1, wire.CALL, 0, 0, 0, 0, 1, 0)
    yield HELLO + HEADER.pack(0xFFFFFFFF, wire.CALL, 0, 0, 255, 0, 1, 0)
    yield HELLO + encode(wire.SUBSCRIBE, b"", b"\x91" * 3000, 1, 1)  # nested deeper than any reader goes
    yield HELLO + encode(wire.SUBSCRIBE, b"", b"\xdd\xff\xff\xff\xff", 1, 1)  # an array of four billion
    yield HELLO + encode(99, b"", b"")


async def test_garbage_ends_the_connection_and_nothing_else(tmp_path: Path) -> None:
    def attack() -> None:
        for data in garbage():
            with raw(path) as sock:
                sock.sendall(data)
                ends(sock)

    async with testing.broker(tmp_path) as path, client.connect(str(path)) as bus:
        before = len(os.listdir("/proc/self/fd"))
        with trio.fail_after(20):
            await trio.to_thread.run_sync(attack)
            stats = await bus.call(bus_contract.STATS, Empty(), timeout_s=5)
        assert stats.connections == 1
        assert stats.protocol_errors >= 30
        assert len(os.listdir("/proc/self/fd")) == before


async def test_oversized_frame_is_named_before_the_end(tmp_path: Path) -> None:
    def attack() -> bytes:
        with raw(path) as sock:
            sock.sendall(HELLO + HEADER.pack(wire.MAX_FRAME + 1, wire.CALL, 0, 0, 0, 0, 1, 0))
            return ends(sock)

    async with testing.broker(tmp_path) as path:
        assert b"bad frame header" in await trio.to_thread.run_sync(attack)


async def test_descriptors_where_none_belong_are_closed(tmp_path: Path) -> None:
    def attack() -> None:
        for data in (b"x", HELLO, HELLO + encode(wire.PING, b"", b""), HELLO + encode(wire.PUBLISH, b"a.b", b"\x80", fds=1)):
            read_end, write_end = os.pipe()
            with raw(path) as sock:
                fds = struct.pack("i", write_end)
                sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
                os.close(write_end)
                sock.shutdown(socket.SHUT_WR)
                ends(sock)
            assert os.read(read_end, 1) == b"", "the broker kept the descriptor"
            os.close(read_end)

    async with testing.broker(tmp_path) as path:
        with trio.fail_after(10):
            await trio.to_thread.run_sync(attack)


async def test_hundreds_of_idle_connections_do_not_disturb(tmp_path: Path) -> None:
    async with testing.broker(tmp_path) as path, client.connect(str(path)) as bus:
        before = len(os.listdir("/proc/self/fd"))
        socks = [raw(path) for _ in range(300)]
        with trio.fail_after(10):
            while (await bus.call(bus_contract.STATS, Empty(), timeout_s=2)).connections < 301:
                await trio.sleep(0.005)
            for sock in socks:
                sock.close()
            while (await bus.call(bus_contract.STATS, Empty(), timeout_s=2)).connections > 1:
                await trio.sleep(0.005)
        assert len(os.listdir("/proc/self/fd")) == before


async def test_peer_that_never_reads_is_bounded_and_others_are_served(tmp_path: Path) -> None:
    """A subscriber that never reads loses events; the publisher and other readers don't notice."""

    def subscribe_and_sleep() -> socket.socket:
        sock = raw(path)
        sock.sendall(HELLO + encode(wire.SUBSCRIBE, b"", packb({"patterns": [">"]}), 1, 1))
        sock.recv(10)
        return sock

    async with testing.broker(tmp_path) as path, client.connect(str(path)) as bus:
        deaf = await trio.to_thread.run_sync(subscribe_and_sleep)
        with trio.fail_after(20):
            async with bus.events("big.*") as events:
                publisher = await trio.to_thread.run_sync(raw, path)
                publisher.setblocking(False)
                body = packb({"id": "x" * 500_000, "time_ns": 1})
                stream = HELLO
                for sequence in range(1, 41):
                    stream += encode(wire.PUBLISH, b"big.one", body, 0, 0, sequence)
                    while stream:
                        await trio.lowlevel.wait_writable(publisher)
                        stream = stream[publisher.send(stream) :]
                    assert (await anext(events)).topic == "big.one"
            stats = await bus.call(bus_contract.STATS, Empty(), timeout_s=5)
            assert stats.events_dropped > 10
        publisher.close()
        deaf.close()


@pytest.mark.root
async def test_other_users_are_refused(tmp_path: Path) -> None:
    async with testing.broker(tmp_path) as path:
        for parent in (tmp_path, *tmp_path.parents):
            if str(parent).startswith("/tmp/"):
                parent.chmod(0o755)
        path.chmod(0o666)

        def as_nobody() -> bytes:
            read_end, write_end = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    os.setgroups([])
                    os.setresgid(65534, 65534, 65534)
                    os.setresuid(65534, 65534, 65534)
                    with raw(path) as sock:
                        os.write(write_end, ends(sock))
                finally:
                    os._exit(0)
            os.close(write_end)
            os.waitpid(pid, 0)
            with os.fdopen(read_end, "rb") as answer:
                return answer.read()

        assert b"permission_denied" in await trio.to_thread.run_sync(as_nobody)

"""The load on a bus, a process of its own for every part: ``python -m benchmarks.busload PART JSON``; the figures come as JSON.

Subscribers are sockets in one process that reads them with epoll and counts, publisher and caller are raw sockets: the same code for
every bus. The parts named ``client_`` measure with the client library of pyx.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.buses import ANSWER, CALLS, KINDS, REQUEST, event_payload
from pyx_bus import wire
from pyx_bus.contract.base import Message, Method

PER_WRITE = 64  # events a publisher hands over at a time
IN_FLIGHT = 64
GIVE_UP_S = 60.0


def cpu_ns(pid: int) -> int:
    """What a process has used: its CPU clock by number (clock_getcpuclockid(3))."""
    return time.clock_gettime_ns((~pid << 3) | 2)


def quantiles(samples: list[float]) -> dict[str, float]:
    samples.sort()
    return {"median": samples[len(samples) // 2], "p99": samples[int(len(samples) * 0.99)]}


class BatchCounter:
    """Counts events in a stream of frames by what their headers say."""

    def __init__(self) -> None:
        self.count = 0
        self._skip = 0
        self._head = b""

    def feed(self, data: bytearray, size: int) -> None:
        position = self._skip
        if self._head:
            lacking = wire.HEADER_SIZE - len(self._head)
            self._head += data[: min(lacking, size)]
            if len(self._head) < wire.HEADER_SIZE:
                return
            position = self._take(self._head, 0) - wire.HEADER_SIZE + lacking
            self._head = b""
        while position + wire.HEADER_SIZE <= size:
            position += self._take(data, position)
        if position < size:
            self._head = bytes(data[position:size])
            position = size
        self._skip = position - size

    def _take(self, data: bytes | bytearray, position: int) -> int:
        whole, kind, _, _, _, _, serial, _ = wire.HEADER.unpack_from(data, position)
        if kind == wire.EVENT:
            self.count += serial or 1
        elif kind == wire.GAP:
            raise SystemExit("a subscriber has lost events")
        return int(whole)


def subscribers(kind: str, path: str, count: int) -> list[socket.socket]:
    bus = KINDS[kind]
    found = []
    for _ in range(count):
        sock = bus.connect(path, "subscriber")
        bus.subscribe(sock)
        found.append(sock)
    return found


def count_events(kind: str, socks: list[socket.socket], events: int, told: int) -> None:
    """Read until every subscriber has ``events`` events; one that's published beforehand tells how many bytes each is. Writes a byte
    to ``told`` as soon as it has begun, and one at the end."""
    poll = select.epoll()
    readers = {}
    for sock in socks:
        poll.register(sock, select.EPOLLIN)
        readers[sock.fileno()] = sock.recv_into
    buffer = bytearray(1 << 20)
    os.write(told, b"x")
    if KINDS[kind].counts_bytes:
        size = 0
        for sock in socks:  # the first event, and nothing but it
            size = sock.recv_into(buffer)
        os.write(told, b"f")
        left = size * events * len(socks)
        while left > 0:
            for fd, _ in poll.poll(GIVE_UP_S) or sys.exit(f"{left} bytes are missing"):
                left -= readers[fd](buffer)
    else:
        counters = {fd: BatchCounter() for fd in readers}
        wanted = len(socks)
        while sum(counter.count for counter in counters.values()) < wanted:
            for fd, _ in poll.poll(GIVE_UP_S) or sys.exit("the first event is missing"):
                counters[fd].feed(buffer, readers[fd](buffer))
        os.write(told, b"f")
        waiting = set(readers)
        while waiting:
            for fd, _ in poll.poll(GIVE_UP_S) or sys.exit(f"{len(waiting)} subscribers miss events"):
                counter = counters[fd]
                counter.feed(buffer, readers[fd](buffer))
                if counter.count >= events + 1:
                    waiting.discard(fd)
    os.write(told, b"d")


def publish(kind: str, sock: socket.socket, writes: list[bytes], last: int) -> None:
    """Send all, a write at a time, taking acknowledgements (or Redis's answers) as they come; return when that of the sequence number
    ``last`` has come."""
    sock.setblocking(False)
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLOUT)
    acks = Acknowledged() if kind == "pyx" else None
    waiting = iter(writes)
    rest = memoryview(next(waiting))
    while rest:
        for _, what in poll.poll(GIVE_UP_S * 1000) or sys.exit("the publisher can't write"):
            if what & ~select.POLLOUT:
                data = sock.recv(1 << 20)
                if acks is not None:
                    acks.feed(data)
            if what & select.POLLOUT:
                rest = rest[sock.send(rest) :] or memoryview(next(waiting, b""))
    sock.setblocking(True)
    sock.settimeout(GIVE_UP_S)
    while acks is not None and acks.last < last:
        acks.feed(sock.recv(1 << 20))


class Acknowledged:
    """The last sequence number that was acknowledged."""

    def __init__(self) -> None:
        self.last = 0
        self._rest = b""

    def feed(self, data: bytes) -> None:
        if not data:
            raise SystemExit("the broker has closed the publisher's connection")
        data = self._rest + data
        whole = len(data) // wire.HEADER_SIZE * wire.HEADER_SIZE
        self._rest = data[whole:]
        if whole:
            _, kind, _, _, _, _, _, self.last = wire.HEADER.unpack_from(data, whole - wire.HEADER_SIZE)
            if kind != wire.ACK:
                raise SystemExit(f"no acknowledgement: {data[:500]!r}")


def rate(kind: str, path: str, pid: int, readers: int, events: int) -> dict[str, float]:
    """Events a second until every subscriber has all of them, and the daemon's CPU for one."""
    bus = KINDS[kind]
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            count_events(kind, subscribers(kind, path, readers), events, write_end)
        finally:
            os._exit(0)
    os.close(write_end)
    sock = bus.connect(path, "publisher")
    payload = event_payload()
    first = bus.events(1, payload)
    writes = [bus.events(min(PER_WRITE, events - done), payload, done + 2) for done in range(0, events, PER_WRITE)]
    wait_for(read_end)
    sock.sendall(first)
    wait_for(read_end)
    used = cpu_ns(pid)
    started = time.perf_counter()
    publish(kind, sock, writes, events + 1)
    acknowledged = time.perf_counter() - started
    wait_for(read_end)
    elapsed = time.perf_counter() - started
    used = cpu_ns(pid) - used
    os.waitpid(child, 0)
    return {"events_s": events / elapsed, "acknowledged_s": events / acknowledged, "cpu_us": used / 1000 / events}


def wait_for(fd: int) -> None:
    if not os.read(fd, 1):
        raise SystemExit("the subscribers failed")


def fan(kind: str, path: str, pid: int, readers: int, events: int) -> dict[str, float]:
    """One event at a time, until all have it, in us."""
    bus = KINDS[kind]
    socks = subscribers(kind, path, readers)
    sock = bus.connect(path, "publisher")
    payload = event_payload()
    messages = [bus.events(1, payload, index + 1) for index in range(events)]
    samples: list[float] = []
    used = 0
    for index, message in enumerate(messages):
        if index == events // 10:  # what came before warms up
            samples.clear()
            used = cpu_ns(pid)
        started = time.perf_counter()
        sock.sendall(message)
        for reader in socks:
            reader.recv(65536)
        samples.append((time.perf_counter() - started) * 1e6)
        if kind != "dbus":
            sock.recv(65536)
    return {**quantiles(samples), "cpu_us": (cpu_ns(pid) - used) / 1000 / len(samples)}


def raw_service(kind: str, path: str) -> None:
    """Serve until killed."""
    calls = CALLS[kind]
    sock, name = calls.serve(path)
    print(json.dumps(name), flush=True)
    pending = b""
    while data := sock.recv(1 << 18):
        data = pending + data
        offset, answers = 0, []
        while len(data) - offset >= calls.head_size and len(data) - offset >= (size := calls.size(data, offset)):
            answers.append(calls.answer(data, offset))
            offset += size
        pending = data[offset:]
        if answers:
            sock.sendall(b"".join(answers))


def raw_calls(kind: str, path: str, service: str, count: int) -> dict[str, float]:
    """Round trips one after the other (us), then with 64 in flight (calls a second)."""
    calls = CALLS[kind]
    sock, make = calls.call(path, service)
    messages = [make(serial) for serial in range(2, count + 2)]
    warm_up = count // 10
    samples = []
    for message in messages:
        started = time.perf_counter()
        sock.sendall(message)
        data = sock.recv(65536)
        while len(data) < calls.head_size or calls.size(data, 0) > len(data):
            data += sock.recv(65536)
        samples.append((time.perf_counter() - started) * 1e6)
    messages = [make(serial) for serial in range(count + 2, 3 * count + 2)]
    sent = done = 0
    pending = b""
    started = time.perf_counter()
    while done < len(messages):
        if wanted := min(IN_FLIGHT - (sent - done), len(messages) - sent):
            sock.sendall(b"".join(messages[sent : sent + wanted]))
            sent += wanted
        pending += sock.recv(1 << 18)
        offset = 0
        while len(pending) - offset >= calls.head_size and len(pending) - offset >= (size := calls.size(pending, offset)):
            done += 1
            offset += size
        pending = pending[offset:]
    return {**quantiles(samples[warm_up:]), "calls_s": len(messages) / (time.perf_counter() - started)}


# --- with the client library ----------------------------------------------------------------------------------------------


class State(Message, frozen=True, kw_only=True):
    """Both what's asked and what's answered."""

    text: str


def state(service: str) -> Method[State, State]:
    return Method(f"{service}.state", State, State, read_only=True)


def client_service(backend: str, path: str, service: str, plain: bool) -> None:
    """Serve ``<service>.state`` until killed, by a plain or an async function."""
    import anyio

    from pyx_bus import client
    from pyx_bus.server import Call, Service

    served = Service(service)
    handler: Any
    if plain:

        def handler(call: Call, request: State) -> State:
            return State(text=ANSWER)
    else:

        async def handler(call: Call, request: State) -> State:
            return State(text=ANSWER)

    served.method(state(service))(handler)

    async def run() -> None:
        async with client.connect(path, service) as bus:
            await bus.serve(served)
            print(json.dumps(service), flush=True)
            await anyio.sleep_forever()

    anyio.run(run, backend=backend)


def client_calls(backend: str, path: str, service: str, count: int) -> dict[str, float]:
    import anyio

    from pyx_bus import client

    method = state(service)
    request = State(text=REQUEST)

    async def run() -> dict[str, float]:
        async with client.connect(path, "caller") as bus:
            call = bus.call
            samples = []
            for _ in range(count):
                started = time.perf_counter()
                await call(method, request)
                samples.append((time.perf_counter() - started) * 1e6)

            async def worker() -> None:
                for _ in range(2 * count // IN_FLIGHT):
                    await call(method, request)

            started = time.perf_counter()
            async with anyio.create_task_group() as group:
                for _ in range(IN_FLIGHT):
                    group.start_soon(worker)
            elapsed = time.perf_counter() - started
        return {**quantiles(samples[count // 10 :]), "calls_s": 2 * count // IN_FLIGHT * IN_FLIGHT / elapsed}

    return anyio.run(run, backend=backend)


def client_events(backend: str, path: str, pid: int, events: int) -> dict[str, float]:
    """The rate at which ``async for`` takes what a raw publisher in another process sends."""
    import anyio

    from pyx_bus import client

    payload = event_payload()
    writes = [KINDS["pyx"].events(min(PER_WRITE, events - done), payload, done + 2) for done in range(0, events, PER_WRITE)]
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            sock = KINDS["pyx"].connect(path, "publisher")
            os.read(read_end, 1)
            sock.sendall(KINDS["pyx"].events(1, payload))
            publish("pyx", sock, writes, events + 1)
        finally:
            os._exit(0)
    del writes

    async def run() -> float:
        async with client.connect(path, "reader") as bus, bus.events("container.*") as stream:
            os.write(write_end, b"x")
            left = events + 1
            started = 0.0
            async for _ in stream:
                left -= 1
                if left == events:
                    started = time.perf_counter()
                if not left:
                    break
            return time.perf_counter() - started

    used = cpu_ns(pid)
    elapsed = anyio.run(run, backend=backend)
    os.waitpid(child, 0)
    return {"events_s": events / elapsed, "cpu_us": (cpu_ns(pid) - used) / 1000 / events}


def client_paced(backend: str, path: str, events: int, pause_s: float) -> dict[str, float]:
    """From a raw publisher's write to the reader's ``async for``, in us; both read the same monotonic clock."""
    import anyio

    from pyx_bus import client

    ready, go = os.pipe()
    child = os.fork()
    if not child:
        try:
            sock = KINDS["pyx"].connect(path, "publisher")
            os.read(ready, 1)
            for sequence in range(1, events + 1):
                sock.sendall(KINDS["pyx"].events(1, event_payload(time.monotonic_ns()), sequence))
                sock.recv(65536)
                time.sleep(pause_s)
        finally:
            os._exit(0)

    async def run() -> list[float]:
        samples = []
        async with client.connect(path, "reader") as bus, bus.events("container.*") as stream:
            os.write(go, b"x")
            async for event in stream:
                payload: Any = event.payload
                sent = payload["time_ns"] if isinstance(payload, dict) else payload.time_ns
                samples.append((time.monotonic_ns() - sent) / 1000)
                if len(samples) == events:
                    break
        return samples

    samples = anyio.run(run, backend=backend)
    os.waitpid(child, 0)
    return quantiles(samples[events // 10 :])


def stalled(path: str, count: int) -> None:
    """Subscribers that never read; until killed."""
    socks = subscribers("pyx", path, count)
    print(json.dumps(len(socks)), flush=True)
    time.sleep(3600)


def flood(kind: str, path: str, events: int) -> dict[str, float]:
    """Publish to whoever is there."""
    bus = KINDS[kind]
    sock = bus.connect(path, "publisher")
    payload = event_payload()
    writes = [bus.events(min(PER_WRITE, events - done), payload, done + 1) for done in range(0, events, PER_WRITE)]
    started = time.perf_counter()
    publish(kind, sock, writes, events)
    return {"events_s": events / (time.perf_counter() - started)}


PARTS: dict[str, Callable[..., dict[str, float] | None]] = {
    part.__name__: part
    for part in (rate, fan, raw_service, raw_calls, client_service, client_calls, client_events, client_paced, stalled, flood)
}

if __name__ == "__main__":
    figures = PARTS[sys.argv[1]](**json.loads(sys.argv[2]))
    if figures is not None:
        print(json.dumps(figures), flush=True)

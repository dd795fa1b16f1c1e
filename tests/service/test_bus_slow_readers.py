"""A reader that stops delays nobody: not the publisher, not the broker, not other readers; and it loses nothing that's still kept."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.bus_process import BrokerProcess, RawPeer, broker_process

from pyx_bus.broker.events import MAX_EVENT_QUEUE
from pyx_bus.wire import MAX_BATCH

EVENTS = 40_000
FIRST, LAST = 2, EVENTS + 1  # the first event of all tells that the broker is up
GO = 64
PROMPT_S = 0.5  # the machine that runs this may be busy; a stopped reader would hold things up for good
SMALL_JOURNAL = "[bus]\njournal_segment_bytes = 262144\njournal_max_bytes = 1048576\n"


class StoppedReader:
    """A process that subscribes, is stopped by SIGSTOP, and when told to go on reports ``result``."""

    def __init__(self, broker: BrokerProcess, result: Callable[[RawPeer], str]) -> None:
        self._pipe, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                peer = RawPeer(broker.path, "stopped")
                assert peer.subscribe("a.>") == FIRST
                os.kill(os.getpid(), signal.SIGSTOP)
                os.write(writer, result(peer).encode())
            except BaseException as error:
                os.write(writer, repr(error).encode())
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(self.pid, os.WUNTRACED)

    def __enter__(self) -> StoppedReader:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._pipe)

    def go_on(self) -> str:
        os.kill(self.pid, signal.SIGCONT)
        said = b""
        while piece := os.read(self._pipe, 65536):
            said += piece
        return said.decode()


def publish_and_watch(broker: BrokerProcess) -> tuple[int, float]:
    """Publish, with another reader at the same time: (the last offset, the longest wait for an acknowledgement)."""
    with RawPeer(broker.path, "publisher", "p") as publisher, RawPeer(broker.path, "other") as other:
        first = other.subscribe("a.>")
        slowest = 0.0
        got: list[int] = []
        for sequence in range(1, EVENTS + 1, GO):
            started = time.monotonic()
            publisher.publish(b"a.b", sequence, GO)
            publisher.wait_acknowledged(sequence + GO - 1)
            offsets, gaps = other.events_until(first + sequence + GO - 2)
            slowest = max(slowest, time.monotonic() - started)
            assert not gaps
            got += offsets
        assert got == list(range(first, first + EVENTS))
        started = time.monotonic()
        stats = other.call(b"bus.stats")
        assert time.monotonic() - started < PROMPT_S
        assert (stats["slow_readers"], stats["slow_readers_total"]) == (1, 1)
        assert stats["most_behind"] > 1000
        return first + EVENTS - 1, slowest


def test_a_stopped_reader_delays_nobody_and_gets_everything_later(tmp_path: Path) -> None:
    with broker_process(tmp_path) as broker:
        before = broker.pss_bytes()

        def result(peer: RawPeer) -> str:
            offsets, gaps = peer.events_until(LAST)
            assert offsets == list(range(offsets[0], offsets[0] + len(offsets)))
            return f"{len(offsets)} events, {len(gaps)} gaps"

        with StoppedReader(broker, result) as stopped:
            last, slowest = publish_and_watch(broker)
            assert last == LAST
            assert slowest < PROMPT_S
            assert broker.pss_bytes() - before < MAX_EVENT_QUEUE + 8 * MAX_BATCH
            assert stopped.go_on() == f"{EVENTS} events, 0 gaps"


def test_what_retention_takes_from_a_stopped_reader_is_told_exactly(tmp_path: Path) -> None:
    with broker_process(tmp_path, SMALL_JOURNAL) as broker:

        def result(peer: RawPeer) -> str:
            offsets, gaps = peer.events_until(LAST)
            lost = [offset for first, last in gaps for offset in range(first, last + 1)]
            assert sorted(offsets + lost) == list(range(FIRST, LAST + 1))
            return f"{len(gaps)} gaps, {'some' if lost else 'nothing'} lost"

        with StoppedReader(broker, result) as stopped:
            publish_and_watch(broker)
            assert stopped.go_on() == "1 gaps, some lost"
        with RawPeer(broker.path) as peer:
            stats = peer.call(b"bus.stats")
        assert (stats["gaps"], stats["slow_readers"]) == (1, 0)
        assert stats["journal_bytes"] <= 1048576 + 262144


def test_a_hundred_stalled_readers_cost_a_bounded_amount(tmp_path: Path) -> None:
    """Live, they share what waits for them; the bound holds whatever they're at."""
    with broker_process(tmp_path) as broker:
        before = broker.pss_bytes()
        stalled = [RawPeer(broker.path, "stalled") for _ in range(100)]
        for peer in stalled:
            peer.subscribe("a.>")
        with RawPeer(broker.path, "publisher", "p") as publisher:
            for sequence in range(1, EVENTS + 1, GO):
                publisher.publish(b"a.b", sequence, GO)
                publisher.wait_acknowledged(sequence + GO - 1)
            stats = publisher.call(b"bus.stats")
            assert stats["slow_readers"] == 100
            assert broker.pss_bytes() - before < 100 * (MAX_EVENT_QUEUE + MAX_BATCH)
        for peer in stalled[50:]:
            peer.sock.close()
        for peer in stalled[:50]:
            offsets, gaps = peer.events_until(LAST)
            assert (len(offsets), gaps) == (EVENTS, [])
            peer.sock.close()

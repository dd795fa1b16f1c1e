"""The bus beside Redis's publish/subscribe and dbus-daemon: ``python -m benchmarks.bus [--rounds N] [--output docs/benchmarks.md]``.

Every round asks every bus once before the next round begins, so that noise hits all alike; figures are medians over the rounds (of the
medians and 99th percentiles of each, where a figure is a latency). All is on unix sockets; redis-server and dbus-daemon are started
here, with directories of their own, if they're installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.buses import CALLS, EVENT_BYTES, KINDS, Bus
from benchmarks.engines import pss_kib
from pyx_bus.wire import PROTOCOL_VERSION

# Readers → events in one measurement: long enough for its ends not to matter, short enough for many rounds.
EVENTS = {"pyx": {1: 150_000, 10: 60_000, 100: 10_000}, "redis": {1: 150_000, 10: 60_000, 100: 10_000}}
EVENTS["dbus"] = {1: 20_000, 10: 6_000, 100: 1_000}
CALLS_MADE = 4_000
PACED = 500
STALLED_READERS = 100
STALLED_EVENTS = 200_000
# The client library on both ends: (event loop, kind of handler) → the case.
CLIENT_CASES = {
    (backend, handler): f"call, pyx_bus on {backend}, {handler} handler"
    for backend in ("trio", "asyncio")
    for handler in ("plain", "async")
}

# (case, figure) → what the project wants of it; a ratio is to Redis's own in the same run.
Check = Callable[[dict[str, float]], bool]


class Mark(NamedTuple):
    text: str
    met: Check


def at_most(limit: float) -> Mark:
    return Mark(f"≤ {limit:,.0f}", lambda by: by["pyx"] <= limit)


def at_least(limit: float) -> Mark:
    return Mark(f"≥ {limit:,.0f}", lambda by: by["pyx"] >= limit)


AS_REDIS = Mark("≥ Redis", lambda by: by["pyx"] >= by.get("redis", 0))

CALL_MARKS = {"us, median": at_most(160), "us, p99": at_most(600), "a second, 64 in flight": at_least(50_000)}

Case = tuple[str, str]
MARKS: dict[Case, Mark] = {
    **{(case, figure): mark for case in CLIENT_CASES.values() for figure, mark in CALL_MARKS.items()},
    ("events to 1 reader", "a second"): at_least(100_000),
    ("events to 10 readers", "a second"): AS_REDIS,
    ("events to 100 readers", "a second"): AS_REDIS,
    ("event to a paced reader, pyx_bus on trio", "us, median"): at_most(500),
    ("event to a paced reader, pyx_bus on asyncio", "us, median"): at_most(500),
    ("daemon, idle", "MB PSS"): at_most(25),
}


def part(name: str, **arguments: Any) -> dict[str, float]:
    """Run a part of the load to its end."""
    command = [sys.executable, "-m", "benchmarks.busload", name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode or not done.stdout:
        raise RuntimeError(f"{name} {arguments}: {done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


@contextmanager
def lasting_part(name: str, **arguments: Any) -> Iterator[str]:
    """Run a part of the load for the length of the block; what it says when it's ready."""
    command = [sys.executable, "-m", "benchmarks.busload", name, json.dumps(arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.kill()


class Samples:
    """What was measured, by case, figure and bus."""

    def __init__(self) -> None:
        self.values: dict[Case, dict[str, list[float]]] = {}

    def add(self, case: str, figure: str, bus: str, value: float) -> None:
        self.values.setdefault((case, figure), {}).setdefault(bus, []).append(value)

    def latency(self, case: str, bus: str, figures: dict[str, float]) -> None:
        self.add(case, "us, median", bus, figures["median"])
        self.add(case, "us, p99", bus, figures["p99"])

    def calls(self, case: str, bus: str, figures: dict[str, float]) -> None:
        self.latency(case, bus, figures)
        self.add(case, "a second, 64 in flight", bus, figures["calls_s"])

    def medians(self) -> dict[Case, dict[str, float]]:
        return {case: {bus: statistics.median(values) for bus, values in by.items()} for case, by in self.values.items()}


def one_round(samples: Samples, buses: list[Bus], services: dict[str, str]) -> None:
    for bus in buses:
        if bus.name in services:
            figures = part("raw_calls", kind=bus.name, path=bus.path, service=services[bus.name], count=CALLS_MADE)
            samples.calls("call, raw sockets", bus.name, figures)
    path = buses[0].path
    for (backend, handler), case in CLIENT_CASES.items():
        figures = part("client_calls", backend=backend, path=path, service=backend + handler, count=CALLS_MADE)
        samples.calls(case, "pyx", figures)
    for readers in (1, 10, 100):
        for bus in buses:
            figures = part("rate", kind=bus.name, path=bus.path, pid=bus.pid, readers=readers, events=EVENTS[bus.name][readers])
            case = f"events to {readers} reader{'s' if readers > 1 else ''}"
            samples.add(case, "a second", bus.name, figures["events_s"])
            samples.add(case, "daemon's CPU, us each", bus.name, figures["cpu_us"])
    for readers in (1, 100):
        for bus in buses:
            figures = part("fan", kind=bus.name, path=bus.path, pid=bus.pid, readers=readers, events=PACED)
            samples.latency(f"one event to {readers} raw reader{'s' if readers > 1 else ''}", bus.name, figures)
    for backend in ("trio", "asyncio"):
        figures = part("client_events", backend=backend, path=path, pid=buses[0].pid, events=EVENTS["pyx"][10])
        samples.add(f"events to 1 reader, pyx_bus on {backend}", "a second", "pyx", figures["events_s"])
        samples.latency(
            f"event to a paced reader, pyx_bus on {backend}",
            "pyx",
            part("client_paced", backend=backend, path=path, events=PACED, pause_s=0.002),
        )


def measure_stalled(samples: Samples, bus: Bus) -> None:
    """The broker's memory with readers that never read, after so many events, after as many again, and when they have gone."""

    def megabytes() -> float:
        return pss_kib([bus.pid]) * 1024 / 1e6

    case = f"broker, {STALLED_READERS} readers that never read"
    with lasting_part("stalled", path=bus.path, count=STALLED_READERS):
        for times in (1, 2):
            figures = part("flood", kind=bus.name, path=bus.path, events=STALLED_EVENTS)
            samples.add(case, f"MB PSS after {times * STALLED_EVENTS:,} events", "pyx", megabytes())
            samples.add(case, f"events a second, {'first' if times == 1 else 'second'} {STALLED_EVENTS:,}", "pyx", figures["events_s"])
    time.sleep(1)
    samples.add(case, "MB PSS when they've left", "pyx", megabytes())


def render(table: dict[Case, dict[str, float]], names: list[str]) -> str:
    others = [name for name in names if name != "pyx"]
    titles = {"pyx": "pyx", "redis": "Redis", "dbus": "dbus-daemon"}
    columns = [*(titles[name] for name in names), *(f"pyx / {titles[name]}" for name in others)]
    lines = ["| case | figure | " + " | ".join([*columns, "mark"]) + " | |", "| --- | --- |" + " ---: |" * (len(columns) + 1) + " --- |"]
    before = ""
    for (case, figure), by in table.items():
        cells = [number(by[n]) if n in by else "" for n in names]
        ratios = [f"{by['pyx'] / by[n]:.2f}" if "pyx" in by and by.get(n) else "" for n in others]
        mark = MARKS.get((case, figure))
        verdict = "" if mark is None else "met" if mark.met(by) else "**missed**"
        row = [case if case != before else "", figure, *cells, *ratios, mark.text if mark else "", verdict]
        lines.append("| " + " | ".join(row) + " |")
        before = case
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def write(output: Path, heading: str, table: str) -> None:
    """Put the table between its markers, which are made at the page's end if they aren't there."""
    before, found, rest = output.read_text().partition("<!-- bus -->")
    _, _, after = rest.partition("<!-- end bus -->")
    if not found:
        before = before.rstrip("\n") + f"\n\n{INTRODUCTION}\n\n"
        after = "\n"
    output.write_text(f"{before}<!-- bus -->\n{heading}\n\n{table}\n<!-- end bus -->{after}")


INTRODUCTION = f"""## The bus

`python -m benchmarks.bus` runs the broker beside Redis's publish/subscribe and dbus-daemon, each in a process of its own on a unix
socket, in turns. An event is {EVENT_BYTES} bytes of payload; pyx writes it to its journal on disk before anybody gets it, then
acknowledges it; the others keep nothing. "Raw" are sockets that send messages serialised beforehand and count what comes, the same
code for all; what isn't raw is the client library, at both ends. Publishers don't wait between events but for "one event" (the next
when all have it) and "paced" (every 2 ms). A mark is what the project wants to keep."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bus", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--buses", default="pyx,redis,dbus")
    parser.add_argument("--output", type=Path, help="also write the table here, between its markers")
    options = parser.parse_args()
    samples = Samples()
    wanted = options.buses.split(",")
    kinds = [kind for kind in KINDS.values() if kind.name == "pyx" or (kind.name in wanted and kind.available())]
    # The journal belongs on a disk, which /tmp often isn't.
    with tempfile.TemporaryDirectory(prefix="pyx-bench-", dir="/var/tmp") as directory, ExitStack() as stack:
        buses = [kind(Path(directory)) for kind in kinds]
        for bus in buses:
            bus.start()
            stack.callback(bus.stop)
            samples.add("daemon, idle", "MB PSS", bus.name, pss_kib([bus.pid]) * 1024 / 1e6)
        services = {}
        for bus in buses:
            if bus.name in CALLS:
                services[bus.name] = stack.enter_context(lasting_part("raw_service", kind=bus.name, path=bus.path))
        for backend, handler in CLIENT_CASES:
            service = {"service": backend + handler, "plain": handler == "plain"}
            stack.enter_context(lasting_part("client_service", backend=backend, path=buses[0].path, **service))
        for turn in range(options.rounds):
            one_round(samples, buses, services)
            print(f"round {turn + 1} of {options.rounds}", flush=True)
        measure_stalled(samples, buses[0])
    table = render(samples.medians(), [bus.name for bus in buses])
    heading = (
        f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, protocol {PROTOCOL_VERSION}, "
        f"medians of {options.rounds}, {time.strftime('%Y-%m-%d')}."
    )
    print(heading, table, sep="\n\n")
    if options.output:
        write(options.output, heading, table)


if __name__ == "__main__":
    main()

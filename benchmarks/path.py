"""The path of one ``pyx run --rm``, step by step in milliseconds: ``python -m benchmarks.path``.

The broker logs the header of every frame ($PYX_LOG_LEVEL=debug), so the steps are seen from outside and no service is changed
for it. Prints a Markdown table of medians; ``--output docs/architecture.md`` puts it between that page's markers.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from benchmarks.__main__ import make_image, namespaced
from benchmarks.engines import Pyx, unmount_below

# What the broker sees, in order: (frame's kind, sender, routing text) → what has happened by then.
STEPS = [
    (("CALL", "pyx", "containerd.run"), "the command line has started and called containerd"),
    (("CALL", "containerd", "imaged.prepare"), "containerd has checked the request and asks imaged for the root file system"),
    (("CALL", "containerd", "netd.attach"), "… and netd, at the same time, for a namespace with an address"),
    (("RESULT", "imaged", ""), "imaged has made the snapshot"),
    (("RESULT", "netd", ""), "netd has made namespace, veth pair, address, route"),
    (("CALL", "containerd", "logd.open"), "root mounted, shim forked, bundle written, runtime executed: it runs, and logd gets its output"),
    (("RESULT", "logd", ""), "logd reads"),
    (("CALL", "containerd", "netd.detach"), "the process has ended, the shim has written its exit status to disk and told containerd"),
    (("CALL", "containerd", "imaged.release"), "root unmounted; network and snapshot are given back"),
    (("RESULT", "containerd", ""), "exit recorded and told; what nobody waits for follows"),
]  # fmt: skip
LINE = re.compile(r'timestamp=(\S+) .*event=frame peer=(\S*) frame="<(\w+) b\'([^\']*)\'')


def stamps(lines: list[str]) -> list[tuple[float, tuple[str, str, str]]]:
    """(Unix time in seconds, (kind, sender, routing text)) of every frame logged."""
    found = []
    for line in lines:
        match = LINE.search(line)
        if match:
            moment = datetime.fromisoformat(match[1]).timestamp()
            found.append((moment, (match[3], match[2], match[4])))
    return found


def one_run(engine: Pyx, log: Path) -> list[float] | None:
    """Milliseconds since the command was started, for every step, and at last for its end."""
    size = log.stat().st_size
    started = time.time()
    engine.run("run", "--rm", engine.image, "true")
    ended = time.time()
    time.sleep(0.3)  # the clean-up of this run shall not be in the next one's figures
    with log.open() as file:
        file.seek(size)
        seen = stamps(file.readlines())
    times = []
    position = 0
    for wanted, _ in STEPS:
        while position < len(seen) and seen[position][1] != wanted:
            position += 1
        if position == len(seen):
            return None
        times.append((seen[position][0] - started) * 1000)
    return [*times, (ended - started) * 1000]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.path", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    namespaced("benchmarks.path")
    with tempfile.TemporaryDirectory(prefix="pyx-path-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        make_image(directory / "busybox.tar")
        engine = Pyx(directory)
        engine.environment["PYX_LOG_LEVEL"] = "debug"
        try:
            engine.start(directory / "busybox.tar")
            log = next(Path(engine.environment["PYX_RUN"]).glob("busd.log"))
            runs = [times for _ in range(options.rounds + 1) if (times := one_run(engine, log))][1:]
        finally:
            engine.stop()
            unmount_below(directory)
    if not runs:
        sys.exit("the broker's log doesn't show the steps")
    rows = ["| ms | step took | |", "| ---: | ---: | --- |"]
    before = 0.0
    for index, text in enumerate([*(text for _, text in STEPS), "the command line has printed everything and ended"]):
        at = statistics.median(times[index] for times in runs)
        rows.append(f"| {at:.1f} | {at - before:.1f} | {text} |")
        before = at
    table = "\n".join(rows)
    print(table)
    if options.output:
        head, _, rest = options.output.read_text().partition("<!-- path -->")
        _, _, tail = rest.partition("<!-- end path -->")
        kernel = subprocess.run(["uname", "-r"], capture_output=True, text=True, check=True).stdout.strip()
        title = (
            "## The path of one run\n\n`pyx run --rm busybox true` on a bridge, medians of "
            f"{len(runs)} runs ({os.cpu_count()} cores, Linux {kernel}, every frame logged). `python -m benchmarks.path` renews it.\n\n"
        )
        options.output.write_text(f"{head}<!-- path -->\n{title}{table}\n<!-- end path -->{tail}")


if __name__ == "__main__":
    main()

"""Run the benchmarks and print a table: ``make bench`` or ``python -m benchmarks [--rounds N] [--output docs/benchmarks.md]``.

Every round asks every engine once before the next round begins, so that noise hits all alike; figures are medians of wall times of
the whole command line. It runs in network and mount namespaces of its own: nothing is left on the host.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.engines import Bare, Docker, Engine, Podman, Pyx, pss_kib, unmount_below, which

NAMESPACED = "PYX_BENCH_NAMESPACED"
Case = Callable[[Engine, int], float]


def timed(action: Callable[[], object]) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1000


def run_case(*options: str) -> Case:
    return lambda engine, _: timed(lambda: engine.run("run", "--rm", *options, engine.image, "true"))


def with_container(action: Callable[[Engine, str], float], *options: str, command: tuple[str, ...] = ("sleep", "1000")) -> Case:
    """Time something on a fresh detached container, which is removed afterwards."""

    def case(engine: Engine, turn: int) -> float:
        name = f"bench-{turn}"
        engine.run("run", "-d", "--name", name, *options, engine.image, *command)
        try:
            return action(engine, name)
        finally:
            engine.remove(name)

    return case


def run_detached_with_port(engine: Engine, turn: int) -> float:
    name = f"bench-port-{turn}"
    try:
        return timed(lambda: engine.run("run", "-d", "--name", name, "-p", f"{20000 + turn}:80", engine.image, "sleep", "1000"))
    finally:
        engine.remove(name)


# An init that ends as soon as it is asked to.
POLITE = ("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done")

CASES: dict[str, Case] = {
    "run --rm, network none": run_case("--network", "none"),
    "run --rm, network host": run_case("--network", "host"),
    "run --rm, bridge": run_case(),
    "run -d, published port": run_detached_with_port,
    "exec true": with_container(lambda engine, name: timed(lambda: engine.run("exec", name, "true"))),
    "stop (init exits at once)": with_container(lambda engine, name: timed(lambda: engine.run("stop", name)), command=POLITE),
    "rm -f of a running container": with_container(lambda engine, name: timed(lambda: engine.remove(name))),
}


def measure(engines: list[Engine], floors: list[Bare], rounds: int) -> dict[str, dict[str, float]]:
    samples: dict[str, dict[str, list[float]]] = {}
    for name, case in CASES.items():
        for turn in range(rounds + 1):
            for engine in engines:
                value = case(engine, turn)
                if turn:  # the first round warms the caches of all
                    samples.setdefault(name, {}).setdefault(engine.name, []).append(value)
            if name == "run --rm, network none" and turn:
                for floor in floors:
                    samples.setdefault("bare run of the same file system", {}).setdefault(floor.name, []).append(
                        timed(floor.run_once)
                    )
        print(f"  {name}: " + ", ".join(f"{k} {statistics.median(v):.0f}" for k, v in samples[name].items()), flush=True)
    return {name: {k: statistics.median(v) for k, v in by.items()} for name, by in samples.items()}


def measure_many(engines: list[Engine], rounds: int, containers: int) -> dict[str, dict[str, float]]:
    """Memory of the idle engine and per running container, and ``ps`` with many containers."""
    table: dict[str, dict[str, float]] = {"idle engine, MiB PSS": {}, "per running container, MiB PSS": {}}
    running = 10
    for engine in engines:
        idle = pss_kib(engine.engine_pids())
        table["idle engine, MiB PSS"][engine.name] = idle / 1024
        for i in range(running):
            engine.run("run", "-d", "--name", f"many-{i}", "--network", "none", engine.image, "sleep", "1000")
        grown = pss_kib(engine.engine_pids()) - idle
        table["per running container, MiB PSS"][engine.name] = grown / 1024 / running
        for i in range(running, containers):
            engine.run("create", "--name", f"many-{i}", "--network", "none", engine.image, "true")
        print(f"  {engine.name}: {containers} containers made", flush=True)
    samples: dict[str, list[float]] = {}
    for _ in range(rounds):
        for engine in engines:
            samples.setdefault(engine.name, []).append(timed(lambda engine=engine: engine.run("ps", "-a")))
    table[f"ps -a with {containers} containers"] = {k: statistics.median(v) for k, v in samples.items()}
    return table


def render(table: dict[str, dict[str, float]], names: list[str]) -> str:
    """A Markdown table, with pyx's ratio to each other engine."""
    others = [n for n in names if n != "pyx"]
    lines = [
        "| case (ms unless it says otherwise) | " + " | ".join(names) + " | " + " | ".join(f"pyx / {n}" for n in others) + " |",
        "| --- |" + " ---: |" * (len(names) + len(others)),
    ]
    for case, by in table.items():
        cells = [f"{by[n]:.1f}" if n in by else "" for n in names]
        ratios = [f"{by['pyx'] / by[n]:.2f}" if "pyx" in by and by.get(n) else "" for n in others]
        lines.append(f"| {case} | " + " | ".join(cells + ratios) + " |")
    return "\n".join(lines)


def namespaced(module: str = "benchmarks") -> None:
    """Go on in namespaces of our own, so that no bridge, rule or mount of any engine outlives us."""
    if os.environ.get(NAMESPACED):
        subprocess.run([which("ip"), "link", "set", "lo", "up"], check=True)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed command has its bytecode
        return
    os.environ[NAMESPACED] = "1"
    arguments = ["unshare", "--net", "--mount", "--propagation", "private", sys.executable, "-m", module, *sys.argv[1:]]
    os.execvp("unshare", arguments)


def make_image(path: Path) -> None:
    """A root file system of the host's busybox-static."""
    root = path.parent / "image"
    for directory in ("bin", "etc", "tmp", "root", "proc", "sys", "dev"):
        (root / directory).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for applet in subprocess.run(["/bin/busybox", "--list"], capture_output=True, text=True, check=True).stdout.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    subprocess.run(["tar", "-C", root, "-cf", path, "."], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--containers", type=int, default=100, help="how many containers ps shall list")
    parser.add_argument("--engines", default="pyx,docker,podman")
    parser.add_argument("--output", type=Path, help="also write the table here, between its markers")
    options = parser.parse_args()
    namespaced()
    wanted = options.engines.split(",")
    kinds = [kind for kind in (Pyx, Docker, Podman) if kind.name in wanted and kind.available()]
    with tempfile.TemporaryDirectory(prefix="pyx-bench-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        image = directory / "busybox.tar"
        make_image(image)
        engines: list[Engine] = []
        try:
            for kind in kinds:
                engine = kind(directory)
                engines.append(engine)
                engine.start(image)
                print(f"{engine.name} is up", flush=True)
            floors = []
            for runtime in ("runc", "crun"):
                if which(runtime):
                    floor = Bare(runtime, directory, image)
                    try:
                        floor.run_once()
                    except subprocess.CalledProcessError as error:
                        print(f"bare {runtime} doesn't run here: {error.stderr.decode().strip()}", flush=True)
                        continue
                    floors.append(floor)
            table = measure(engines, floors, options.rounds)
            table |= measure_many(engines, options.rounds, options.containers)
        finally:
            for engine in engines:
                try:
                    engine.stop()
                except Exception as error:
                    print(f"stopping {engine.name}: {error}", file=sys.stderr)
            unmount_below(directory)
    names = [e.name for e in engines] + [f.name for f in floors]
    text = render(table, names)
    print(text)
    if options.output:
        heading = f"{os.cpu_count()} cores, Linux {platform.release()}, medians of {options.rounds}, {time.strftime('%Y-%m-%d')}."
        before, _, rest = options.output.read_text().partition("<!-- table -->")
        _, _, after = rest.partition("<!-- end -->")
        options.output.write_text(f"{before}<!-- table -->\n{heading}\n\n{text}\n<!-- end -->{after}")


if __name__ == "__main__":
    main()

"""The end of a run: recording the exit, telling those who wait, and taking down what the run had.

The die event comes at once, with the change of the state, as Docker's. What somebody could notice (the name, published ports, volumes
in use, the image in use) is free before the exit is reported to who waits for it, and before the destroy event; what
nobody refers to any more (the runtime's state, the cgroup, the last bytes on their way to the log, the bundle) goes afterwards.
Each exit is handled once: ``ended`` acts on the change from running, and there's only one of those.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import trio

from pyx_bus import errors
from pyx_bus.contract import containerd as contract
from pyx_bus.contract import imaged, logd, netd, volumed

from . import bundle as bundles
from . import cgroups, checks, copy, execute, health, kernel, oom
from .drivers.runtime import Runtime
from .engine import SERVICE_TIMEOUT_S, Engine, Live
from .errors import KernelError
from .model import Change
from .shim import EXIT_NAME, read_exit
from .shims import Exit

REPORT_WITHIN_S = 1.0  # the exit is reported at the latest then, even if a service is away and its release has to wait
DRAIN_TIMEOUT_S = 3600.0  # how long the shim keeps the streams of an ended run for a reader that doesn't read
LOST_EXIT_CODE = 137  # a container whose shim was killed is killed, too: nobody could tell its exit any more

Step = Callable[[], Awaitable[object]]


async def ended(engine: Engine, live: Live, exit_: Exit) -> None:
    """The init process has ended."""
    await live.spawned.wait()
    if live.running:
        with engine.clean_up():
            await _ended(engine, live, exit_)


async def _ended(engine: Engine, live: Live, exit_: Exit) -> None:
    checks.stop(live)
    record = live.record
    oom_kills = kernel.oom_kills(record.cgroup)
    # A short life may be over before the runtime says that it has begun: it began after the runtime was told to, at most some ms earlier.
    began_ns = record.started_at_ns if record.started_at_ns <= exit_.time_ns else min(live.launched_ns, exit_.time_ns)
    engine.change(
        live,
        Change.EXIT,
        pid=0,
        exit_code=exit_.code,
        signal=exit_.signal,
        oom_killed=oom_kills > 0,
        started_at_ns=began_ns,
        finished_at_ns=exit_.time_ns,
        sandbox=None,
        health=health.ended(record.health),
    )
    for execution in list(live.executions.values()):  # its end took them along
        execution.ended.set()
        execute.over(engine, live, execution)
    _tell_died(engine, live, exit_, began_ns, oom_kills)
    removing = live.leaving = record.spec.auto_remove and not live.restarting
    if removing:
        engine.change(live, Change.REMOVE)
    with trio.move_on_after(REPORT_WITHIN_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(step, engine, live, "row", lambda: _store(engine, live, removing))
            nursery.start_soon(_release, engine, live, network_steps(engine, live))
            await trio.lowlevel.checkpoint()  # they're on their way while the kernel takes its millisecond for the unmount
            unmount(engine, live)
            if removing:
                await copy.end_copies(live)
                nursery.start_soon(_release, engine, live, removal_steps(engine, live, volumes=True))
    unmount(engine, live)
    if removing:
        gone(engine, live)
    live.exited.set()
    await take_down(engine, live, ran=True)
    if removing:
        await step(engine, live, "log", lambda: engine.bus.call(logd.REMOVE, logd.RemoveLog(container_id=live.id)))
        engine.cleaning.pop(live.id, None)
    live.clean.set()


def gone(engine: Engine, live: Live) -> None:
    """It doesn't exist any more, and what it held is free; of its last run something may still be taken down."""
    engine.cleaning[live.id] = live
    engine.forget(live)
    engine.publish(contract.ContainerDestroyed, live.record)
    live.removed.set()


async def _store(engine: Engine, live: Live, removing: bool) -> None:
    if removing:
        await engine.store.delete(live.id)
    else:
        await engine.store.update(live.record)


def _tell_died(engine: Engine, live: Live, exit_: Exit, started_at_ns: int, oom_kills: int) -> None:
    oom.tell(engine, live, oom_kills)
    run_time_ns = max(0, exit_.time_ns - started_at_ns)
    extra = {"exitCode": str(exit_.code), "execDuration": str(run_time_ns // 10**9)}
    if exit_.signal:
        extra["signal"] = str(exit_.signal)
    fields = {
        "exit_code": exit_.code,
        "signal": exit_.signal,
        "oom_killed": live.record.oom_killed,
        "run_time_ns": run_time_ns,
    }
    engine.publish(contract.ContainerDied, live.record, fields, **extra)


def unmount(engine: Engine, live: Live) -> None:
    if live.mounted:
        try:
            kernel.unmount(str(engine.bundle(live.id) / "rootfs"))
            live.mounted = False
        except KernelError as error:
            engine.undone("unmount", live.id, error)


def network_steps(engine: Engine, live: Live) -> list[tuple[str, Step]]:
    """What gives back the network of a run."""
    if live.record.spec.network.startswith("container:"):
        return []
    request = netd.DetachContainer(container_id=live.id)
    return [("network", lambda: engine.bus.call(netd.DETACH, request, timeout_s=SERVICE_TIMEOUT_S))]


async def _release(engine: Engine, live: Live, steps: list[tuple[str, Step]]) -> None:
    """Do the steps at once. They outlive this task: a service that is away mustn't hold up the report, nor be forgotten."""
    left = len(steps)
    finished = trio.Event()
    if not steps:
        return

    async def run(name: str, action: Step) -> None:
        nonlocal left
        with engine.clean_up():
            await step(engine, live, name, action)
        left -= 1
        if not left:
            finished.set()

    for name, action in steps:
        engine.background(run, name, action)
    await finished.wait()


def removal_steps(engine: Engine, live: Live, *, volumes: bool) -> list[tuple[str, Step]]:
    """What gives back a container's snapshot and volumes for good; the root must be unmounted."""
    release = imaged.ReleaseSnapshot(container_id=live.id)
    steps: list[tuple[str, Step]] = [
        ("snapshot", lambda: engine.bus.call(imaged.RELEASE, release, timeout_s=SERVICE_TIMEOUT_S))
    ]
    if live.record.attached_volumes:
        detach = volumed.DetachVolumes(container_id=live.id, remove_anonymous=volumes)
        steps.append(("volumes", lambda: engine.bus.call(volumed.DETACH, detach, timeout_s=SERVICE_TIMEOUT_S)))
    return steps


async def step(engine: Engine, live: Live, name: str, action: Step) -> None:
    """Do one step of a clean-up; a failure is logged and the others go on."""
    try:
        await action()
    except (errors.BusError, OSError) as error:
        engine.undone(name, live.id, error)


async def take_down(engine: Engine, live: Live, *, ran: bool) -> None:
    """Everything of a run that's still there: runtime state, cgroup, shim, bundle; of a failed start also root and network."""
    if ran:
        await _drain(engine, live)
        await _until_kept(engine, live)
        await _end_shim(live)  # before the rest: with it goes what it holds of those attached, who wait for the end of their output
    await step(engine, live, "runtime", lambda: _delete(engine, live, ran=ran))
    if not ran:
        unmount(engine, live)
        await _release(engine, live, network_steps(engine, live))
        await _end_shim(live)
    await step(engine, live, "bundle", lambda: _remove_bundle(engine, live))


async def _end_shim(live: Live) -> None:
    if live.shim is not None:
        await live.shim.end()
        live.shim = None


async def _until_kept(engine: Engine, live: Live) -> None:
    """Where no file system has room for how it ended, only its shim can tell a restarted service: it must stay until then.
    Unless it's removed (which goes on in a hurry): then there's nothing to tell."""
    if engine.store.is_kept(live.id):
        return
    async with trio.open_nursery() as nursery:

        async def hurried() -> None:
            await live.hurry.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(hurried)
        await engine.store.until_kept(live.id)
        nursery.cancel_scope.cancel()


async def _drain(engine: Engine, live: Live) -> None:
    """Wait until logd has everything, and those attached have it; the shim's copies of the streams are what a restarted logd gets."""
    request = logd.WaitDrained(container_id=live.id, run=live.record.run)
    async with trio.open_nursery() as nursery:

        async def hurried() -> None:
            await live.hurry.wait()
            await trio.sleep(2)
            nursery.cancel_scope.cancel()

        def drained() -> Awaitable[object]:
            # With a timeout it's asked for that long, else only as long as a logd usually is away.
            return engine.bus.call(logd.WAIT_DRAINED, request, timeout_s=DRAIN_TIMEOUT_S)

        nursery.start_soon(hurried)
        with trio.move_on_after(DRAIN_TIMEOUT_S):
            if live.shim is not None and live.shim.is_open:  # else nobody could give logd the streams any more
                await live.logged.wait()
            await step(engine, live, "log", drained)
        nursery.cancel_scope.cancel()


async def _remove_bundle(engine: Engine, live: Live) -> None:
    bundles.remove(engine.bundle(live.id))
    live.mounted = False


async def _delete(engine: Engine, live: Live, *, ran: bool) -> None:
    """The runtime's state and the cgroup."""
    used = engine.runtimes.get(live.record.runtime)
    if ran and used is not None and used.has_plain_state:
        await cgroups.clear(live.record.cgroup)  # with whatever still runs in it
        if not kernel.cgroup_directories(live.record.cgroup):
            shutil.rmtree(Path(used.root) / live.id, ignore_errors=True)
    for runtime in engine.runtimes.values():  # whichever it was: a row from before its start doesn't know
        await delete_runtime_state(engine, live, runtime)
    await cgroups.clear(live.record.cgroup)


async def delete_runtime_state(engine: Engine, live: Live, runtime: Runtime) -> None:
    if not (Path(runtime.root) / live.id).exists():
        return
    if live.shim is not None and live.shim.is_open:
        try:
            await live.shim.run(runtime.delete(live.id))
        except errors.Unavailable:
            pass
    if (Path(runtime.root) / live.id).exists():
        await delete_without_shim(runtime, live.id)


async def delete_without_shim(runtime: Runtime, container_id: str) -> None:
    """``delete --force`` from here; what even that leaves of the state directory is removed."""
    argv = [runtime.path, "--root", runtime.root, "delete", "--force", container_id]
    try:
        with trio.move_on_after(30):
            await trio.run_process(argv, check=False, capture_stdout=True, capture_stderr=True)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
    shutil.rmtree(Path(runtime.root) / container_id, ignore_errors=True)


async def shim_lost(engine: Engine, live: Live) -> None:
    """A shim's connection has ended unasked: it was killed. Its exit file may still tell; else the container is ended for good."""
    await live.spawned.wait()
    if not live.running:
        return
    engine.log.error("shim is gone", container=live.id)
    exit_ = saved_exit(engine, live)
    if exit_ is None:
        runtime = engine.runtimes.get(live.record.runtime)
        if runtime is not None:
            await delete_without_shim(runtime, live.id)
        await cgroups.clear(live.record.cgroup)
        exit_ = Exit("", LOST_EXIT_CODE, 9, time.time_ns())
        live.record = msgspec.structs.replace(live.record, error="its shim was killed")
    await ended(engine, live, exit_)


def saved_exit(engine: Engine, live: Live) -> Exit | None:
    """What a shim wrote before it went."""
    try:
        found = read_exit((engine.bundle(live.id) / EXIT_NAME).read_bytes())
    except OSError:
        return None
    return Exit("", *found) if found else None

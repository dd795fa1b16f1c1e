"""After a start of the service: finding the containers again, and cleaning up what a crash left half-made.

What may be there, and what becomes of it:

- a running row whose shim answers: taken up again; if it has exited meanwhile, the shim knows how;
- a row that a full disk kept from being written is taken as it should be (``store.py``): how a container ended isn't told again;
- a running row without a shim: the shim was killed, or the host was started anew. Its exit file may tell; else exit code 255, as
  Docker's, after whatever still runs of it was killed;
- a created or exited row whose shim answers: the crash fell between the start and its commit, or into the clean-up of a run: a
  running one is taken up, an ended one cleaned up;
- a container that a commit had paused: it goes on;
- a bundle, cgroup or runtime state of an unknown ID: removed. The start was never acknowledged, or the removal was.

An event of what is found changed is published, if perhaps for the second time.

Then, and whenever one of them comes up again, the other services are told which IDs live, and logd gets the streams again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import trio

from pyx_bus import errors
from pyx_bus.contract import containerd as contract
from pyx_bus.contract import imaged, logd, netd, volumed
from pyx_bus.contract.base import Method, Released, Retain
from pyx_bus.contract.bus import ServiceUp

from . import bundle as bundles
from . import cgroups, checks, commit, end, kernel, oom, start
from .engine import Engine, Live
from .errors import KernelError
from .model import Change, Container, State
from .shims import Exit, Shim

UNKNOWN_EXIT_CODE = 255
RETRY_S = 1.0
TELL_AGAIN_AFTER_S = (5.0, 60.0)


async def recover(engine: Engine) -> None:
    """Before the service registers: every container in memory, in the state it is in."""
    for record in engine.store.load():
        if record.state is State.REMOVING:  # the row goes last but one: make it so
            await engine.store.delete(record.id)
            engine.publish(contract.ContainerDestroyed, record)
            continue
        live = Live(record)
        engine.containers[record.id] = live
        engine.names[record.name] = record.id
    present = {entry.name for entry in os.scandir(engine.bundles)} if engine.bundles.exists() else set()
    async with trio.open_nursery() as nursery:
        for live in list(engine.containers.values()):
            nursery.start_soon(_take_up, engine, live, live.id in present)
        for container_id in present - engine.containers.keys():
            nursery.start_soon(_discard, engine, container_id)
    for live in engine.containers.values():
        if live.record.committing:
            engine.background(commit.release, engine, live)
    _remove_stray_cgroups(engine)


async def _take_up(engine: Engine, live: Live, has_bundle: bool) -> None:
    record = live.record
    was_running = record.state in (State.RUNNING, State.PAUSED)
    health_known = has_bundle and checks.load(engine, live)
    shim = _connect(engine, live) if has_bundle else None
    if shim is not None:
        live.shim = shim
        live.mounted = True
        live.logged.set()
        engine.background(start.serve_shim, engine, live, shim)
        try:
            state = await shim.state()
        except errors.BusError:
            state = None
        if state is not None and state.phase == "running":
            _mark_running(engine, live, state.init_pid, record)
            engine.background(oom.watch, engine, live)
            paused = kernel.frozen(record.cgroup)
            if paused != (live.record.state is State.PAUSED):  # killed between the freezer and the row
                engine.change(live, Change.PAUSE if paused else Change.UNPAUSE)
                engine.publish(contract.ContainerPaused if paused else contract.ContainerUnpaused, live.record)
                engine.background(engine.store.update, live.record)
            checks.resume(engine, live, health_known)
            return
        if state is not None and state.phase == "exited" and state.exit.time_ns != record.finished_at_ns:
            _mark_running(engine, live, state.init_pid, record)
            engine.background(end.ended, engine, live, state.exit)
            return
        live.shim = shim if shim.is_open else None
    if was_running:
        live.exited, live.clean = trio.Event(), trio.Event()
        live.mounted = has_bundle
        exit_ = end.saved_exit(engine, live)
        if exit_ is None:
            await _kill_leftovers(engine, live)
            exit_ = Exit("", UNKNOWN_EXIT_CODE, 0, time.time_ns())
        engine.background(end.ended, engine, live, exit_)
    elif has_bundle or record.provisional:
        live.clean = trio.Event()
        if record.provisional:
            await engine.store.delete(live.id)
            end.gone(engine, live)
        engine.background(_clean, engine, live)


def _connect(engine: Engine, live: Live) -> Shim | None:
    try:
        return Shim.connect(engine.bundle(live.id))
    except OSError:
        return None


def _mark_running(engine: Engine, live: Live, pid: int, record: Container) -> None:
    live.exited, live.clean = trio.Event(), trio.Event()
    if record.state in (State.RUNNING, State.PAUSED):
        return
    engine.change(live, Change.START, pid=pid, run=max(1, record.run), started_at_ns=time.time_ns(), error="", provisional=False)
    engine.publish(contract.ContainerStarted, live.record)
    engine.background(engine.store.update, live.record)


async def _clean(engine: Engine, live: Live) -> None:
    with engine.clean_up():
        await _clean_all(engine, live)


async def _clean_all(engine: Engine, live: Live) -> None:
    await end.take_down(engine, live, ran=True)
    if live.id in engine.cleaning:  # a run nobody was told of: while it was cleaned up the others were told that it lives
        for name, action in (*end.network_steps(engine, live), *end.removal_steps(engine, live, volumes=True)):
            await end.step(engine, live, name, action)
        await end.step(engine, live, "log", lambda: engine.bus.call(logd.REMOVE, logd.RemoveLog(container_id=live.id)))
        del engine.cleaning[live.id]
    live.clean.set()


async def _kill_leftovers(engine: Engine, live: Live) -> None:
    for runtime in engine.runtimes.values():
        if (Path(runtime.root) / live.id).exists():
            await end.delete_without_shim(runtime, live.id)
    await cgroups.clear(live.record.cgroup)


async def _discard(engine: Engine, container_id: str) -> None:
    """Everything of a container nobody knows."""
    engine.log.info("removing what was left of an unknown container", container=container_id)
    bundle = engine.bundle(container_id)
    try:
        shim: Shim | None = Shim.connect(bundle)
    except OSError:
        shim = None
    if shim is not None:
        engine.background(shim.serve, _ignore, _ignore)
        try:
            await shim.state()  # a start that's under way must be over before it can be undone
        except errors.BusError as error:
            engine.undone("shim", container_id, error)
    for runtime in engine.runtimes.values():
        if (Path(runtime.root) / container_id).exists():
            await end.delete_without_shim(runtime, container_id)
    await cgroups.clear(f"{engine.cgroup_parent}/{container_id}")
    if shim is not None:
        try:
            await shim.end()
        except errors.BusError as error:
            engine.undone("shim", container_id, error)
    try:
        bundles.remove(bundle)
    except (KernelError, OSError) as error:
        engine.undone("bundle", container_id, error)
    engine.bus.publish(contract.ContainerDestroyed(id=container_id, time_ns=time.time_ns()))


async def _ignore(*_: object) -> None:
    return


def _remove_stray_cgroups(engine: Engine) -> None:
    for parent in kernel.cgroup_directories(engine.cgroup_parent):
        for entry in os.scandir(parent):
            if entry.is_dir() and entry.name not in engine.containers and entry.name not in kernel.OWN_CGROUPS:
                path = f"{engine.cgroup_parent}/{entry.name}"
                kernel.kill_cgroup(path)
                kernel.remove_cgroup(path)


# the other services -----------------------------------------------------------------------------------------------------


def _holders(engine: Engine) -> dict[str, tuple[Method[Retain, Released], Callable[[], list[str]]]]:
    """Who holds what, and for which IDs it still should."""

    def everybody() -> list[str]:
        return [*engine.containers, *engine.cleaning, *engine.creating]

    def with_network() -> list[str]:
        # a sandbox belongs to a run; one that's being started has its lock held, and its holding is newer than ``before_ns`` or wanted
        wanted = [id_ for id_, live in engine.containers.items() if live.running or live.lock.locked() or live.record.sandbox]
        return wanted + list(engine.creating)

    return {
        "imaged": (imaged.RETAIN, everybody),
        "netd": (netd.RETAIN, with_network),
        "volumed": (volumed.RETAIN, everybody),
        "logd": (logd.RETAIN, everybody),
    }


async def keep_told(engine: Engine) -> None:
    """As long as the service runs: tell each holder at our start and whenever it comes up.

    And twice more after our start: what our predecessor asked for as it died may have been done after the first list was drawn, and then
    counts as newer than it.
    """
    for name in _holders(engine):
        engine.background(_tell, engine, name)
    engine.background(_tell_again, engine)
    while True:
        try:
            async with engine.bus.events(ServiceUp.topic) as events:
                async for event in events:
                    name = event.id
                    if name in _holders(engine):
                        engine.background(_tell, engine, name)
        except errors.BusError as error:
            engine.log.warning("subscription to service events ended", error=error.message)
            await trio.sleep(RETRY_S)


async def _tell_again(engine: Engine) -> None:
    for pause_s in TELL_AGAIN_AFTER_S:
        await trio.sleep(pause_s)
        for name, (method, living) in _holders(engine).items():
            await _retain(engine, name, method, living())


async def _retain(engine: Engine, name: str, method: Method[Retain, Released], living: list[str]) -> None:
    request = Retain(container_ids=living, before_ns=time.time_ns())
    try:
        released = await engine.bus.call(method, request, timeout_s=60)
    except errors.BusError as error:  # it will come up, and be told then
        engine.log.info("a holder can't be told what lives", holder=name, error=error.message)
        return
    if released.container_ids:
        engine.log.info("leftovers released", holder=name, containers=released.container_ids)


async def _tell(engine: Engine, name: str) -> None:
    method, living = _holders(engine)[name]
    await _retain(engine, name, method, living())
    if name == "logd":
        await _reopen_logs(engine)


async def _reopen_logs(engine: Engine) -> None:
    """Give a new logd the streams of everything that runs, or still has output on its way."""
    for live in [*engine.containers.values(), *engine.cleaning.values()]:
        shim = live.shim
        if shim is None or not shim.is_open or not live.spawned.is_set():
            continue
        if live.running or not live.clean.is_set():
            try:
                held = await shim.descriptors()
            except errors.BusError as error:
                engine.undone("streams", live.id, error)
                continue
            try:
                clients = [held[key] for key in sorted(held) if key.startswith(start.CLIENT)]
                streams = {key: fd for key, fd in held.items() if key != "stdin" and not key.startswith(start.CLIENT)}
                if streams:
                    await start.open_log(engine, live, streams, clients)
            except errors.BusError as error:
                engine.log.error("logd refuses a running container's streams", container=live.id, error=error.message)
            finally:
                for fd in held.values():
                    os.close(fd)


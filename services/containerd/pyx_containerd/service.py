"""The use cases but for the start, the end and exec, which have modules of their own: create, run, stop, kill, wait, remove, ..."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio

from pyx_bus import errors
from pyx_bus.contract import containerd as contract
from pyx_bus.contract import imaged, logd, netd, volumed

from . import bundle as bundles
from . import checks, copy, end, health, kernel, names, plan, processes, start
from .drivers.runtime import parse_failure
from .engine import SERVICE_TIMEOUT_S, Engine, Live, Progress
from .errors import KernelError, is_paused, name_taken, no_such_container, not_running, start_failed
from .model import Change, Container, State
from .shim import set_window_size

DEFAULT_STOP_TIMEOUT_S = 10
KILL_TIMEOUT_S = 30.0  # after SIGKILL: a process in uninterruptible sleep may take its time

Created = Callable[[Live], Awaitable[None]]


async def create(engine: Engine, spec: contract.ContainerSpec, progress: Progress, *, to_start: bool = False) -> Live:
    """Make a container. Row, snapshot and volumes exist afterwards; with ``to_start`` its network, too (asked for at the same time
    as the snapshot), and the root stays mounted. Cancelled or failed, it leaves nothing. Errors: see ``contract.CreateContainer``.
    """
    plan.check(spec, engine.cpus)
    if spec.runtime:
        await engine.runtime(spec.runtime)
    container_id = os.urandom(32).hex()
    name = spec.name or names.random_name(secrets.randbelow, engine.names)
    engine.reserve_name(name, container_id)
    engine.creating.add(container_id)
    hostname = hostname_of(spec, container_id)
    sandboxes: list[netd.Sandbox] = []
    live: Live | None = None
    try:

        async def attach_network() -> None:
            sandboxes.append(await start.request_network(engine, container_id, name, spec, hostname, []))

        snapshot = await _both(
            prepare(engine, container_id, spec, progress), attach_network if to_start and not spec.publish_all_ports else None
        )
        if not to_start:
            await _check_network(engine, spec)
        record = _record(engine, spec, snapshot, container_id, name, hostname)
        if sandboxes:
            record = msgspec.structs.replace(record, sandbox=sandboxes[0])
        live = Live(record)
        wanted = plan.mounts(spec, snapshot.image)
        if wanted:
            bundles.mount_root(record, engine.bundle(container_id))
            live.mounted = True
            await start.attach_volumes(engine, live, wanted)
            if not to_start:
                end.unmount(engine, live)
                bundles.remove(engine.bundle(container_id))
        if not to_start:  # run writes its row beside the runtime's start: until it's acknowledged nobody may rely on it
            await engine.store.insert(live.record)
        engine.containers[container_id] = live
        engine.publish(contract.ContainerCreated, live.record)
    except BaseException as failure:
        with trio.CancelScope(shield=True):
            await _uncreate(engine, live, container_id, name, spec, attached=to_start)
        if isinstance(failure, KernelError):
            raise start_failed(name, failure.message, 125) from None
        raise
    finally:
        engine.creating.discard(container_id)
    return live


async def _both(first: Awaitable[imaged.Snapshot], second: Callable[[], Awaitable[None]] | None) -> imaged.Snapshot:
    """The two at once, each to its own end: a request that was cancelled could be carried out after the one that undoes it."""
    failures: list[Exception] = []

    async def guarded(action: Callable[[], Awaitable[None]]) -> None:
        try:
            await action()
        except Exception as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        if second is not None:
            nursery.start_soon(guarded, second)
        try:
            snapshot = await first
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return snapshot


async def _uncreate(
    engine: Engine, live: Live | None, container_id: str, name: str, spec: contract.ContainerSpec, *, attached: bool
) -> None:
    engine.free_name(name, container_id)
    engine.containers.pop(container_id, None)
    record = live.record if live else None
    if live is not None:
        end.unmount(engine, live)
    try:
        bundles.remove(engine.bundle(container_id))
    except KernelError as error:
        engine.log.warning("bundle left", container=container_id, error=error.message)
    calls: list[tuple[str, end.Step]] = [
        ("snapshot", lambda: engine.bus.call(imaged.RELEASE, imaged.ReleaseSnapshot(container_id=container_id), timeout_s=5))
    ]
    if attached and not spec.network.startswith("container:"):
        calls.append(("network", lambda: engine.bus.call(netd.DETACH, netd.DetachContainer(container_id=container_id), timeout_s=5)))
    if record is None or spec.mounts or record.attached_volumes:
        request = volumed.DetachVolumes(container_id=container_id, remove_anonymous=True)
        if record is not None:
            calls.append(("volumes", lambda: engine.bus.call(volumed.DETACH, request, timeout_s=5)))
    for what, call in calls:
        try:
            await call()
        except errors.BusError as error:
            engine.undone(what, container_id, error)


async def prepare(
    engine: Engine, container_id: str, spec: contract.ContainerSpec, progress: Progress
) -> imaged.Snapshot:
    """The snapshot, pulling the image first if the policy says so."""
    request = imaged.PrepareSnapshot(container_id=container_id, image=spec.image, platform=spec.platform)
    if spec.pull_policy != "always":
        try:
            return await start.settled(engine, imaged.PREPARE, request)
        except errors.NotFound:
            if spec.pull_policy == "never":
                raise
            await progress(contract.RunProgress(phase="pull", status=f"Unable to find image '{spec.image}' locally"))
    pull = imaged.PullImage(reference=spec.image, platform=spec.platform)
    async with engine.bus.stream(imaged.PULL, pull) as stream:
        async for item in stream:
            await progress(
                contract.RunProgress(
                    phase="pull",
                    id=item.id,
                    status=item.status,
                    current_bytes=item.current_bytes,
                    total_bytes=item.total_bytes,
                )
            )
        await stream.result()
    return await start.settled(engine, imaged.PREPARE, request)


async def _check_network(engine: Engine, spec: contract.ContainerSpec) -> None:
    kind, _, other = spec.network.partition(":")
    if kind == "container":
        engine.find(other)
    elif spec.network not in ("", "none", "host"):
        await engine.bus.call(netd.INSPECT, netd.NetworkRef(network=spec.network), timeout_s=SERVICE_TIMEOUT_S)


def hostname_of(spec: contract.ContainerSpec, container_id: str) -> str:
    if spec.hostname:
        return spec.hostname
    if spec.network == "host" or spec.uts_mode == "host":
        return bundles.host_name()
    return container_id[:12]


def _record(
    engine: Engine, spec: contract.ContainerSpec, snapshot: imaged.Snapshot, container_id: str, name: str, hostname: str
) -> Container:
    image = snapshot.image
    return Container(
        id=container_id,
        name=name,
        spec=spec,
        image=image,
        process=plan.process(spec, image, hostname),
        created_at_ns=time.time_ns(),
        hostname=hostname,
        labels={**image.labels, **spec.labels},
        exposed_ports=plan.exposed_ports(spec, image),
        rootfs_mounts=snapshot.mounts,
        writable_path=snapshot.writable_path,
        snapshotter=snapshot.snapshotter,
        healthcheck=health.merged(spec.healthcheck, image.healthcheck),
        cgroup=f"{spec.cgroup_parent.rstrip('/') if spec.cgroup_parent else engine.cgroup_parent}/{container_id}",
    )


async def run(
    engine: Engine, spec: contract.ContainerSpec, attach: contract.AttachOptions, clients: Sequence[int], progress: Progress
) -> tuple[Live, int]:
    """Create and start. (the container, the input asked for or -1, which is yours). With auto_remove a failed start removes it."""
    engine.warm()
    live = await create(engine, spec, progress, to_start=True)
    with trio.CancelScope(shield=True):  # from here on it goes on without its caller
        failures: list[BaseException] = []
        given = -1
        recorded = True

        async def insert() -> None:
            nonlocal recorded
            try:
                await engine.store.insert(msgspec.structs.replace(live.record, provisional=True))
            except errors.BusError as error:
                recorded = False
                failures.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(insert)
            try:
                try:
                    await progress(contract.RunProgress(phase="created", id=live.id))
                except errors.Cancelled:
                    pass  # the caller is gone, and it goes on without
                given = await start.start(engine, live, attach, clients)
            except BaseException as error:
                failures.append(error)
        if failures:
            if (spec.auto_remove or not recorded) and not live.removed.is_set():  # without a row it wouldn't outlive this process
                if given >= 0:
                    os.close(given)
                await remove(engine, live, force=True, volumes=True)
            raise failures[0]
    return live, given


async def stop(engine: Engine, live: Live, signal: str, timeout_s: int | None) -> None:
    """Ask, wait, kill. Returns when it has exited."""
    if not live.running:
        return
    number = plan.parse_signal(signal) if signal else live.record.process.stop_signal
    if timeout_s is None:
        timeout_s = live.record.spec.stop_timeout_s
    if timeout_s is None:
        timeout_s = DEFAULT_STOP_TIMEOUT_S
    exited = live.exited
    await _signal(engine, live, number)
    checks.stop(live)  # what has been asked to end needn't be found unhealthy
    try:
        await _stopped(engine, live, exited, timeout_s)
    finally:
        checks.begin(engine, live)  # if it goes on, because whoever asked has gone
    engine.publish(contract.ContainerStopped, live.record)


async def _stopped(engine: Engine, live: Live, exited: trio.Event, timeout_s: int) -> None:
    with trio.move_on_after(float("inf") if timeout_s < 0 else timeout_s):
        await exited.wait()
    if not exited.is_set():
        await _force(engine, live)


async def _signal(engine: Engine, live: Live, number: int) -> None:
    """To init; a paused one is resumed, since it couldn't react otherwise."""
    if live.shim is None:
        return
    try:
        await live.shim.kill("", number)
    except ProcessLookupError:
        return
    engine.publish(contract.ContainerKilled, live.record, signal=str(number))
    if live.record.state is State.PAUSED:
        runtime = await engine.runtime(live.record.runtime)
        if await live.shim.run(runtime.resume(live.id)):
            kernel.thaw(live.record.cgroup)  # the runtime refuses if somebody else was faster, or it is about to be gone
        if live.record.state is State.PAUSED:
            await _unpaused(engine, live)


async def _unpaused(engine: Engine, live: Live) -> None:
    engine.change(live, Change.UNPAUSE)
    engine.publish(contract.ContainerUnpaused, live.record)
    checks.begin(engine, live)
    await engine.store.update(live.record)


async def _force(engine: Engine, live: Live) -> None:
    exited = live.exited
    await _signal(engine, live, 9)
    if live.record.spec.pid_mode:
        kernel.kill_cgroup(live.record.cgroup)  # there's no PID namespace whose end would take the others along
    with trio.move_on_after(KILL_TIMEOUT_S):
        await exited.wait()
    if not exited.is_set():
        raise errors.Internal(f'container "{live.record.name}" was killed, but its process didn\'t end within {KILL_TIMEOUT_S:g} s')


async def kill(engine: Engine, live: Live, signal: str) -> None:
    number = plan.parse_signal(signal)
    if not live.running or live.shim is None:
        raise not_running(live.record.name)
    await _signal(engine, live, number)


async def restart(engine: Engine, live: Live, signal: str, timeout_s: int | None) -> None:
    live.restarting = True  # its exit doesn't remove it, even with auto_remove
    try:
        try:
            await stop(engine, live, signal, timeout_s)
        finally:
            live.restarting = False
        fd = await start.start(engine, live, contract.AttachOptions())
    except BaseException:
        if live.record.spec.auto_remove and not live.running:
            with trio.CancelScope(shield=True):
                await remove(engine, live, force=True, volumes=True)
        raise
    if fd >= 0:
        os.close(fd)
    engine.publish(contract.ContainerRestarted, live.record)


async def act_on_health(engine: Engine, live: Live) -> None:
    """What ``--health-action`` says of a container that has turned unhealthy."""
    action = live.record.spec.health_action
    engine.log.warning("acting on an unhealthy container", container=live.id, action=action)
    if action == "restart":
        await restart(engine, live, "", None)
    elif action == "stop":
        await stop(engine, live, "", None)


async def pause(engine: Engine, live: Live) -> None:
    if live.record.state is State.PAUSED:
        raise errors.FailedPrecondition(f'container "{live.record.name}" is already paused')
    if not live.running or live.shim is None:
        raise not_running(live.record.name)
    runtime = await engine.runtime(live.record.runtime)
    try:
        await checks.stopped(live)
        await _runtime_run(engine, live, runtime.pause(live.id))
        engine.change(live, Change.PAUSE)
    finally:
        checks.begin(engine, live)  # if it isn't paused
    engine.publish(contract.ContainerPaused, live.record)
    await engine.store.update(live.record)


async def unpause(engine: Engine, live: Live) -> None:
    if live.record.state is not State.PAUSED or live.shim is None:
        raise errors.FailedPrecondition(f'container "{live.record.name}" is not paused')
    runtime = await engine.runtime(live.record.runtime)
    await _runtime_run(engine, live, runtime.resume(live.id))
    await _unpaused(engine, live)


async def _runtime_run(engine: Engine, live: Live, argv: list[str]) -> None:
    assert live.shim is not None
    code = await live.shim.run(argv)
    if code:
        log = engine.bundle(live.id) / "pause.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        raise errors.Internal(f'container "{live.record.name}": {parse_failure(text, code).reason}')


async def wait(live: Live, condition: str) -> contract.ExitStatus:
    """Errors: invalid_argument."""
    if condition in ("", "not-running"):
        await live.exited.wait()
    elif condition == "next-exit":
        if live.exited.is_set():
            async with trio.open_nursery() as nursery:

                async def removed() -> None:
                    await live.removed.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(removed)
                await live.begins.wait()
                nursery.cancel_scope.cancel()
        await live.exited.wait()
    elif condition == "removed":
        await live.removed.wait()
    else:
        raise errors.InvalidArgument(f'invalid wait condition: "{condition}" (not-running, next-exit or removed)')
    return live.exit_status()


async def remove(engine: Engine, live: Live, *, force: bool, volumes: bool) -> None:
    """Errors: conflict (running). What it held is free when this returns; the last leftovers of its run may follow."""
    while True:
        if live.running and not force:
            paused = live.record.state is State.PAUSED
            what = "paused: unpause it first or force its removal" if paused else "running: stop it first or force its removal"
            raise errors.Conflict(f'cannot remove container "{live.record.name}": it is {what}')
        if live.running:
            await _force(engine, live)
        if live.leaving:
            await live.removed.wait()
        if live.removed.is_set() or live.id not in engine.containers:
            return  # it removed itself
        async with live.lock:
            if live.removed.is_set() or live.id not in engine.containers:
                return
            if not live.running and not live.leaving:
                await _remove(engine, live, volumes=volumes)
                return
        # it was being started, and is running now, or has ended and removes itself


async def _remove(engine: Engine, live: Live, *, volumes: bool) -> None:
    with trio.CancelScope(shield=True):
        before = live.record
        engine.change(live, Change.REMOVE)
        await copy.end_copies(live)
        end.unmount(engine, live)
        try:
            await engine.store.delete(live.id)
        except errors.ResourceExhausted:  # neither the store nor what it has beside it can be written: it stays as it was
            live.record = before
            await end.step(engine, live, "row", lambda: engine.store.update(before))
            raise
        async with trio.open_nursery() as nursery:
            for name, action in end.removal_steps(engine, live, volumes=volumes):
                nursery.start_soon(end.step, engine, live, name, action)
        end.gone(engine, live)
        engine.background(_finish_removal, engine, live)


async def _finish_removal(engine: Engine, live: Live) -> None:
    live.hurry.set()
    await live.clean.wait()
    request = logd.RemoveLog(container_id=live.id)
    with engine.clean_up():
        await end.step(engine, live, "log", lambda: engine.bus.call(logd.REMOVE, request, timeout_s=SERVICE_TIMEOUT_S))
    engine.cleaning.pop(live.id, None)


async def rename(engine: Engine, live: Live, name: str) -> None:
    """Errors: invalid_argument, already_exists."""
    name = name.removeprefix("/")
    plan.check_name(name)
    async with live.lock:
        if live.id not in engine.containers:
            raise no_such_container(live.record.name)
        old = live.record.name
        if engine.names.get(name) == live.id:
            raise errors.InvalidArgument(f'container "{old}" has this name already')
        if name in engine.names:
            raise name_taken(name, engine.names[name])
        engine.reserve_name(name, live.id)
        before = live.record
        try:
            await engine.store.rename(msgspec.structs.replace(before, name=name))
        except BaseException:
            engine.free_name(name, live.id)
            raise
        changed = live.record is not before
        live.record = msgspec.structs.replace(live.record, name=name)
        engine.free_name(old, live.id)
        engine.publish(contract.ContainerRenamed, live.record, oldName="/" + old)
        if changed:  # it ended meanwhile, say, and that was written under the old name
            await engine.store.update(live.record)


async def attach(engine: Engine, live: Live, options: contract.AttachOptions, clients: Sequence[int]) -> int:
    """Join a running container's output and input. The input asked for (yours), or -1. Errors: failed_precondition."""
    if live.record.state is State.PAUSED:
        raise is_paused(live.record.name)
    connection = live.shim
    if not live.running or connection is None:
        raise not_running(live.record.name)
    if options.output:
        request = logd.AttachLog(container_id=live.id, stdout=options.stdout, stderr=options.stderr)
        await engine.bus.call(logd.ATTACH, request, fds=clients, timeout_s=SERVICE_TIMEOUT_S)
    given = -1
    if options.stdin:
        held = await connection.descriptors(take_stdin=live.record.spec.stdin_once)
        given = held.pop("tty", -1)
        if given < 0:
            given = held.pop("stdin", -1)
        for fd in held.values():
            os.close(fd)
        if given >= 0 and live.record.spec.tty and options.rows:
            set_window_size(given, options.rows, options.columns)
    engine.publish(contract.ContainerAttached, live.record)
    if given >= 0 and live.record.spec.tty and options.rows:
        tell_resized(engine, live, options.rows, options.columns)
    return given


def detach(engine: Engine, live: Live, exec_id: str) -> None:
    """Tell that somebody who was attached has left. Errors: not_found, failed_precondition."""
    if not live.running:
        raise not_running(live.record.name)
    if not exec_id:
        engine.publish(contract.ContainerDetached, live.record)
    elif exec_id in live.executions:
        engine.publish(contract.ExecDetached, live.record, {"exec_id": exec_id}, execID=exec_id)
    else:
        raise errors.NotFound(f'no such exec in container "{live.record.name}": "{exec_id}"')


async def resize(engine: Engine, live: Live, rows: int, columns: int) -> None:
    """Errors: failed_precondition, invalid_argument."""
    if not (1 <= rows <= 0xFFFF and 1 <= columns <= 0xFFFF):
        raise errors.InvalidArgument(f"invalid size of a terminal: {rows} rows, {columns} columns")
    if not live.running or live.shim is None:
        raise not_running(live.record.name)
    if not live.record.spec.tty:
        raise errors.FailedPrecondition(f'container "{live.record.name}" has no terminal')
    held = await live.shim.descriptors()
    try:
        set_window_size(held["tty"], rows, columns)
    finally:
        for fd in held.values():
            os.close(fd)
    tell_resized(engine, live, rows, columns)


def tell_resized(engine: Engine, live: Live, rows: int, columns: int) -> None:
    engine.publish(contract.ContainerResized, live.record, height=str(rows), width=str(columns))


async def top(engine: Engine, live: Live, ps_args: Sequence[str]) -> contract.ProcessTable:
    """Errors: see ``contract.TopContainer``."""
    if not live.running:
        raise not_running(live.record.name)
    table = await processes.table(ps_args, kernel.cgroup_processes(live.record.cgroup))
    engine.publish(contract.ContainerTopped, live.record)
    return contract.ProcessTable(titles=table.titles, processes=table.rows)

"""Starting a container: from its record to a running process.

The order, and what runs beside what (the times are of docs/architecture.md):

1. the shim is forked and the root mounted, while netd makes the namespace and, if there are mounts, volumed prepares them;
2. the bundle's files are written, the runtime runs once (create and start in one execution);
3. the container runs: it is one in memory at once; the row is written and logd gets the streams at the same time.

logd gets the streams only after the runtime has succeeded. Until then the pipe buffers, and a runtime that fails writes its own
complaint to what would have been the container's stderr: nobody shall take that for the container's output, the caller gets it as
the error. Nor can a restarting logd keep a container from starting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio

from pyx_bus import errors
from pyx_bus.contract import containerd as contract
from pyx_bus.contract import logd, netd, volumed
from pyx_bus.contract.base import Method, Req, Res

from . import bundle as bundles
from . import checks, copy, end, kernel, oci, oom, plan, shim
from .drivers.runtime import LOG_FILE, PID_FILE, Runtime, parse_failure
from .engine import SERVICE_TIMEOUT_S, Engine, Live
from .errors import KernelError, is_paused, not_running, start_failed
from .model import Change, Container, State
from .shims import Exit, RuntimeFailed, Shim

START_TIMEOUT_S = 120.0
CLIENT = "client"  # what the shim calls the pipes of those who are attached from the start
LOG_TIMEOUT_S = 10.0  # a restarting logd is waited for this long before a start is reported without it


class Descriptors:
    """Descriptors of one start, closed together at its end."""

    def __init__(self) -> None:
        self._all: list[int] = []

    def own(self, fd: int) -> int:
        self._all.append(fd)
        return fd

    def pipe(self) -> tuple[int, int]:
        reader, writer = os.pipe()
        return self.own(reader), self.own(writer)

    def close(self) -> None:
        shim.close_all(self._all)


async def start(engine: Engine, live: Live, attach: contract.AttachOptions, clients: Sequence[int] = ()) -> int:
    """Start a created or exited container. ``clients``: write ends that get its output (they stay yours).

    Returns the input asked for by ``attach`` (stdin's write end or the master; yours), or -1. Once begun it isn't cancelled: it either
    runs afterwards, or nothing is left of the attempt. Errors: see ``contract.StartContainer``.
    """
    engine.warm()
    async with live.lock:
        if live.record.state is State.PAUSED:
            raise is_paused(live.record.name)
        if live.record.state is State.RUNNING:
            return -1
        if not engine.store.is_kept(live.id):  # a start would take what alone knows how the last run ended
            raise errors.ResourceExhausted("can't write the container store", hint="make room where pyx keeps its files")
        live.hurry.set()
        await live.clean.wait()
        if live.id not in engine.containers:
            raise errors.NotFound(f'no such container: "{live.record.name}"')
        if live.record.state is State.REMOVING:
            raise errors.FailedPrecondition(f'container "{live.record.name}" is being removed')
        await copy.end_copies(live)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + START_TIMEOUT_S):
            return await _start(engine, live, attach, clients)
        raise start_failed(live.record.name, f"it took longer than {START_TIMEOUT_S:g} s", 125)


async def _start(engine: Engine, live: Live, attach: contract.AttachOptions, clients: Sequence[int]) -> int:
    runtime = await engine.runtime(live.record.runtime or live.record.spec.runtime)
    fds = Descriptors()
    live.spawned, live.exited, live.clean, live.hurry = trio.Event(), trio.Event(), trio.Event(), trio.Event()
    live.logged = trio.Event()
    began = False
    live.record = msgspec.structs.replace(live.record, run=live.record.run + 1, runtime=runtime.name)
    try:
        await _prepare(engine, live)
        pid, streams, given = await _spawn(engine, live, runtime, fds, attach, clients)
        _now_running(engine, live, pid, attach)
        began = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.store.update, live.record)
                nursery.start_soon(open_log, engine, live, streams, clients)
        except* errors.BusError as group:
            # It runs, but its output can't go where it should: better no container than one whose log is silently missing.
            live.logged.set()
            await _kill(live)
            raise first_error(group) from None
        return os.dup(given) if given >= 0 else -1
    except BaseException as failure:
        if not began:
            await _undo(engine, live, failure)
        if isinstance(failure, KernelError):
            raise start_failed(live.record.name, failure.message, 125) from None
        raise
    finally:
        live.spawned.set()
        fds.close()


def first_error(group: BaseExceptionGroup[errors.BusError]) -> errors.BusError:
    for error in group.exceptions:
        return error if isinstance(error, errors.BusError) else first_error(error)
    raise AssertionError("an exception group is never empty")


async def _prepare(engine: Engine, live: Live) -> None:
    """Shim, root, network and volumes, at once."""
    bundle = engine.bundle(live.id)
    if not live.mounted:
        bundles.mount_root(live.record, bundle)
        live.mounted = True
    live.shim = Shim(engine.zygote.fork(bundle, live.id))
    engine.background(serve_shim, engine, live, live.shim)
    failures: list[errors.BusError] = []

    async def guarded(step: Callable[..., Awaitable[None]], *arguments: object) -> None:
        try:
            await step(*arguments)
        except errors.BusError as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        if live.record.sandbox is None:
            nursery.start_soon(guarded, attach_network, engine, live)
        if live.record.attached_volumes:
            nursery.start_soon(guarded, attach_volumes, engine, live, plan.mounts(live.record.spec, live.record.image))
    if failures:
        raise failures[0]


async def attach_network(engine: Engine, live: Live) -> None:
    """Have netd make the namespace; ``network=container:NAME`` joins another container's."""
    record = live.record
    sandbox = await request_network(engine, record.id, record.name, record.spec, record.hostname, record.exposed_ports)
    live.record = msgspec.structs.replace(live.record, sandbox=sandbox)


async def request_network(
    engine: Engine, container_id: str, name: str, spec: contract.ContainerSpec, hostname: str, exposed: list[str]
) -> netd.Sandbox:
    kind, _, other = spec.network.partition(":")
    if kind == "container":
        peer = joined(engine, other)
        sandbox = peer.record.sandbox or netd.Sandbox()
        return msgspec.structs.replace(sandbox, netns_path=f"/proc/{peer.record.pid}/ns/net", ports=[])
    request = netd.AttachContainer(
        container_id=container_id,
        container_name=name,
        network=spec.network or "bridge",
        ipv4_address=spec.ipv4_address,
        mac_address=spec.mac_address,
        hostname=hostname,
        ports=plan.ports(spec, exposed),
    )
    return await settled(engine, netd.ATTACH, request)


async def settled(engine: Engine, method: Method[Req, Res], request: Req, fds: Sequence[int] = ()) -> Res:
    """Ask another service for something to be held, and wait for the answer even if our own caller has gone: what was cancelled
    halfway could come to pass after the request that undoes it. Bounded; such requests take a millisecond."""
    with trio.CancelScope(shield=True):
        return await engine.bus.call(method, request, fds=fds, timeout_s=SERVICE_TIMEOUT_S)
    raise AssertionError("a shield has no deadline")


async def attach_volumes(engine: Engine, live: Live, wanted: list[volumed.MountRequest]) -> None:
    """Have volumed prepare the mounts; it fills new volumes from the root, which must be mounted."""
    root = os.open(engine.bundle(live.id) / "rootfs", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        request = volumed.AttachVolumes(container_id=live.id, mounts=wanted)
        attached = await settled(engine, volumed.ATTACH, request, [root])
    finally:
        os.close(root)
    live.record = msgspec.structs.replace(live.record, attached_volumes=attached.mounts)


def joined(engine: Engine, reference: str) -> Live:
    """The running container whose namespace another one joins. Errors: not_found, failed_precondition."""
    peer = engine.find(reference)
    if not peer.running:
        raise not_running(peer.record.name)
    return peer


def _namespace(engine: Engine, mode: str, name: str) -> str | None:
    """For ``Surroundings``: "" new, None the host's, else a path."""
    if mode == "host":
        return None
    if mode.startswith("container:"):
        return f"/proc/{joined(engine, mode.partition(':')[2]).record.pid}/ns/{name}"
    return ""


def _shared_memory(engine: Engine, live: Live) -> str:
    """Where the /dev/shm shared between containers is mounted on the host; "" for a container that has its own.

    Errors: failed_precondition (the other one's isn't shareable)."""
    spec = live.record.spec
    if spec.ipc_mode == "shareable":
        return bundles.mount_shared_memory(engine.bundle(live.id), spec.shm_size_bytes or oci.DEFAULT_SHM_BYTES)
    if spec.ipc_mode.startswith("container:"):
        peer = joined(engine, spec.ipc_mode.partition(":")[2])
        if peer.record.spec.ipc_mode != "shareable":
            raise errors.FailedPrecondition(
                f'container "{peer.record.name}" doesn\'t share its IPC namespace', hint="start it with --ipc shareable"
            )
        return str(engine.bundle(peer.id) / "shm")
    return ""


def _write_bundle(engine: Engine, live: Live, attach: contract.AttachOptions) -> None:
    record, bundle = live.record, engine.bundle(live.id)
    sandbox = record.sandbox or netd.Sandbox()
    rootfs = bundle / "rootfs"
    root = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        identity = bundles.identity(root, record.process.user, record.spec.group_add)
        if record.process.working_dir != "/":
            try:
                kernel.make_directories_in_root(root, record.process.working_dir, identity.uid, identity.gid)
            except KernelError as error:
                reason = f'the working directory "{record.process.working_dir}" can\'t be made: {error.message}'
                raise errors.InvalidArgument(reason, details={"exit_code": "126"}) from None
    finally:
        os.close(root)
    hostname_file, hosts_file, resolv_file = bundles.write_network_files(record, sandbox, bundle)
    mode = kernel.cgroup_mode()
    init = ""
    if record.spec.init:
        init = bundles.init_binary()
        if not init:
            raise errors.Unimplemented("no init for --init found on this host", hint="install tini or catatonit")
    around = oci.Surroundings(
        rootfs=str(rootfs),
        hostname_file=hostname_file,
        hosts_file=hosts_file,
        resolv_file=resolv_file,
        netns=sandbox.netns_path or None,
        pid_namespace=_namespace(engine, record.spec.pid_mode, "pid"),
        ipc_namespace=_namespace(engine, record.spec.ipc_mode, "ipc"),
        uts_namespace=None if record.spec.uts_mode == "host" else "",
        cgroup_namespace=mode == "v2" and not record.spec.privileged,
        swap_accounting=kernel.swap_accounting(),
        capability_bound=kernel.capability_bound(),
        shared_memory=_shared_memory(engine, live),
        devices=bundles.devices(record.spec),
        init_binary=init,
        rows=attach.rows,
        columns=attach.columns,
    )
    bundles.write_config(bundle, "config.json", oci.config(record, identity, around))


async def _spawn(
    engine: Engine,
    live: Live,
    runtime: Runtime,
    fds: Descriptors,
    attach: contract.AttachOptions,
    clients: Sequence[int],
) -> tuple[int, dict[str, int], int]:
    """Run the runtime. (pid, the streams for logd, the input for the client or -1); the descriptors belong to ``fds``."""
    assert live.shim is not None
    spec = live.record.spec
    _write_bundle(engine, live, attach)
    argv = runtime.run(live.id, tty=spec.tty)
    live.launched_ns = time.time_ns()
    kept = {f"{CLIENT}{number}": fd for number, fd in enumerate(clients)}
    try:
        if spec.tty:
            pid, master = await live.shim.spawn("", argv, PID_FILE, stdio=None, kept=kept, size=(attach.rows, attach.columns))
            fds.own(master)
            return pid, {"tty": master}, master if attach.stdin else -1
        out_reader, out_writer = fds.pipe()
        err_reader, err_writer = fds.pipe()
        kept |= {"stdout": out_reader, "stderr": err_reader}
        given = -1
        if spec.open_stdin:
            reader, writer = fds.pipe()
            given = writer if attach.stdin else -1
            if not (spec.stdin_once and attach.stdin):  # else the client's close must be the end of input: nobody else holds it
                kept["stdin"] = writer
        else:
            reader = fds.own(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        pid, _ = await live.shim.spawn("", argv, PID_FILE, stdio=(reader, out_writer, err_writer), kept=kept)
        return pid, {"stdout": out_reader, "stderr": err_reader}, given
    except RuntimeFailed as failed:
        failure = parse_failure(_read_log(engine, live.id, LOG_FILE), failed.exit_code)
        raise start_failed(live.record.name, failure.reason, failure.exit_code) from None


def _read_log(engine: Engine, container_id: str, name: str) -> str:
    try:
        return (engine.bundle(container_id) / name).read_text(errors="replace")
    except OSError:
        return ""


def _now_running(engine: Engine, live: Live, pid: int, attach: contract.AttachOptions) -> None:
    if attach.output or attach.stdin:
        engine.publish(contract.ContainerAttached, live.record)
    change = Change.START
    engine.change(
        live,
        change,
        pid=pid,
        started_at_ns=time.time_ns(),
        finished_at_ns=0,
        exit_code=0,
        signal=0,
        oom_killed=False,
        oom_kills=0,
        error="",
    )
    live.record = msgspec.structs.replace(live.record, provisional=False)
    engine.publish(contract.ContainerStarted, live.record)
    if live.record.spec.tty and attach.rows:
        engine.publish(contract.ContainerResized, live.record, height=str(attach.rows), width=str(attach.columns))
    checks.started(engine, live)
    engine.background(oom.watch, engine, live)
    live.spawned.set()
    live.begins.set()
    live.begins = trio.Event()


async def open_log(engine: Engine, live: Live, streams: dict[str, int], clients: Sequence[int]) -> None:
    """Give logd the streams, and those who are attached from the start.

    If it's away just now, the pipes wait for it: it gets them when it's back (recovery.py).
    """
    spec = live.record.spec
    request = logd.OpenLog(
        container_id=live.id,
        run=live.record.run,
        streams=list(streams),
        attached=len(clients),
        driver=spec.log_driver or str(engine.context.config.get("log_driver", "json-file")),
        options=spec.log_options,
    )
    try:
        opened = await engine.bus.call(logd.OPEN, request, fds=[*streams.values(), *clients], timeout_s=LOG_TIMEOUT_S)
    except (errors.Unavailable, errors.DeadlineExceeded) as error:
        engine.log.warning("logd is away, the output waits in its pipes", container=live.id, error=error.message)
        return
    live.logged.set()
    if opened.path != live.record.log_path:
        live.record = msgspec.structs.replace(live.record, log_path=opened.path)


async def serve_shim(engine: Engine, live: Live, connection: Shim) -> None:
    """Read what a shim says, for as long as the connection lives."""

    async def on_exit(exit_: Exit) -> None:
        if exit_.key:
            execution = live.executions.get(exit_.key)
            if execution is not None:
                execution.exit = exit_
                execution.ended.set()
        else:
            engine.background(end.ended, engine, live, exit_)

    async def on_lost() -> None:
        if live.shim is connection:
            engine.background(_find_again, engine, live, connection)

    await connection.serve(on_exit, on_lost)


async def _find_again(engine: Engine, live: Live, lost: Shim) -> None:
    """A connection to a shim has ended unasked. A shim lets go of one that doesn't read; only one that can't be reached is gone."""
    await live.spawned.wait()
    if not live.running or live.shim is not lost:
        return
    try:
        connection = live.shim = Shim.connect(engine.bundle(live.id))
        engine.background(serve_shim, engine, live, connection)
        state = await connection.state()
    except (OSError, errors.BusError):
        await end.shim_lost(engine, live)
        return
    engine.log.warning("reconnected to a shim", container=live.id)
    if state.phase == "exited":
        await end.ended(engine, live, state.exit)
        return
    for execution in list(live.executions.values()):  # their ends may have been told to nobody
        try:
            await connection.kill(execution.key, 0)
        except ProcessLookupError:
            execution.ended.set()
        except errors.BusError:
            return  # lost once more: that is another task's


async def _kill(live: Live) -> None:
    if live.shim is not None and live.running:
        try:
            await live.shim.kill("", 9)
        except (ProcessLookupError, errors.BusError):
            pass
    await live.exited.wait()


async def _undo(engine: Engine, live: Live, failure: BaseException) -> None:
    """A start failed: take down what it put up, and leave the container as it was, with the reason on record."""
    message = failure.message if isinstance(failure, errors.BusError) else repr(failure)
    code = int(failure.details.get("exit_code", "125")) if isinstance(failure, errors.BusError) else 125
    with trio.CancelScope(shield=True):
        await end.take_down(engine, live, ran=False)
        exit_code = 128 if code == 125 else code
        engine.change(live, Change.START_FAILED, pid=0, error=message, exit_code=exit_code, sandbox=None)
        try:
            if live.id in engine.containers:
                await engine.store.update(live.record)
        finally:
            live.exited.set()
            live.clean.set()


def effective(record: Container) -> tuple[str, list[str]]:
    """Docker's Path and Args."""
    return record.process.args[0], record.process.args[1:]

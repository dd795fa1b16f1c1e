"""The bus's methods: unpack the call, hand it to a use case, pack the result. Decides nothing."""

from __future__ import annotations

import os
import time

import trio

from pyx_bus import errors, masking
from pyx_bus.contract import containerd as contract
from pyx_bus.contract.base import Empty
from pyx_bus.contract.imaged import Document, ImageID
from pyx_bus.service import Call, Context, Service

from . import commit, copy, document, execute, host, kernel, listing, probe, recovery, service, start
from . import update as update_
from .drivers.runtime import Runtime
from .engine import Engine, Live
from .store import Store


async def setup(context: Context) -> Service:
    """Build the engine, recover, and register the methods."""
    context.root.chmod(0o700)  # environments are in the database, and people put secrets there
    engine = Engine(context, Store(context.root / "containers.db", context.run / "rows"))

    async def act_on_health(live: Live) -> None:
        await service.act_on_health(engine, live)

    engine.act_on_health = act_on_health
    context.exit_stack.callback(engine.close)
    context.finish = engine.finish
    engine.bundles.mkdir(parents=True, exist_ok=True)
    engine.bundles.chmod(0o700)
    engine.warm_path = kernel.warm_path(engine.cgroup_parent)
    engine.zygote.start()
    _find_runtimes(engine)
    await recovery.recover(engine)
    engine.background(_choose_runtime, engine)
    engine.background(recovery.keep_told, engine)
    return methods(engine)


def _find_runtimes(engine: Engine) -> None:
    configured = engine.context.config.get("runtimes", {})
    if not isinstance(configured, dict):
        raise errors.InvalidArgument('"runtimes" of the configuration must be a table: name = "path"')
    root = engine.context.run / "runtime"
    root.mkdir(mode=0o700, exist_ok=True)
    for name, path in probe.candidates({str(key): str(value) for key, value in configured.items()}).items():
        (root / name).mkdir(mode=0o700, exist_ok=True)
        engine.runtimes[name] = Runtime(name, path, str(root / name))


async def _choose_runtime(engine: Engine) -> None:
    paths = {name: runtime.path for name, runtime in engine.runtimes.items()}
    wanted = str(engine.context.config.get("default_runtime", ""))
    cache = engine.context.root / "runtime.json"
    scratch = engine.context.run / "probe"
    engine.choice = await probe.choose(paths, wanted, cache, scratch, engine.cgroup_parent)
    engine.chosen.set()
    engine.log.info("runtime chosen", runtime=engine.choice.name, reason=engine.choice.reason)


def _clients(call: Call, attach: contract.AttachOptions) -> list[int]:
    if len(call.fds) != (1 if attach.output else 0):
        raise errors.InvalidArgument(f"wrong number of descriptors: {len(call.fds)} came, output is {attach.output}")
    return call.fds


async def _started(call: Call, container_id: str, given: int) -> None:
    item = contract.RunProgress(phase="started", id=container_id)
    try:
        await call.send(item, [given] if given >= 0 else [])
    finally:
        if given >= 0:
            os.close(given)


def methods(engine: Engine) -> Service:
    """The service with every method of the contract."""
    bus = Service("containerd")

    @bus.method(contract.CREATE)
    async def create(call: Call, request: contract.CreateContainer) -> contract.CreatedContainer:
        live = await service.create(engine, request.spec, call.send)
        return contract.CreatedContainer(id=live.id)

    @bus.method(contract.RUN)
    async def run(call: Call, request: contract.RunContainer) -> contract.ExitStatus:
        clients = _clients(call, request.attach)
        live, given = await service.run(engine, request.spec, request.attach, clients, call.send)
        exited = live.exited
        call_fds_done(call)
        await _started(call, live.id, given)
        if request.detach:
            return contract.ExitStatus(id=live.id)
        await exited.wait()
        return live.exit_status()

    @bus.method(contract.START)
    async def start_(call: Call, request: contract.StartContainer) -> contract.ExitStatus:
        live = engine.find(request.container)
        clients = _clients(call, request.attach)
        if live.running and (clients or request.attach.stdin):
            given = await service.attach(engine, live, request.attach, clients)
        else:
            given = await start.start(engine, live, request.attach, clients)
        exited = live.exited
        call_fds_done(call)
        await _started(call, live.id, given)
        if not request.wait:
            return contract.ExitStatus(id=live.id)
        await exited.wait()
        return live.exit_status()

    @bus.method(contract.ATTACH)
    async def attach(call: Call, request: contract.AttachContainer) -> contract.ExitStatus:
        live = engine.find(request.container)
        exited = live.exited
        given = await service.attach(engine, live, request.attach, _clients(call, request.attach))
        call_fds_done(call)
        await _started(call, live.id, given)
        await exited.wait()
        return live.exit_status()

    @bus.method(contract.EXEC)
    async def exec_(call: Call, request: contract.ExecContainer) -> contract.ExitStatus:
        live = engine.find(request.container)

        async def started(exec_id: str, master: int) -> None:
            call_fds_done(call)
            item = contract.RunProgress(phase="started", id=live.id, exec_id=exec_id)
            await call.send(item, [master] if master >= 0 else [])

        return await execute.execute(engine, live, request, call.fds, started)

    @bus.method(contract.DETACH)
    async def detach(call: Call, request: contract.DetachClient) -> Empty:
        service.detach(engine, engine.find(request.container), request.exec_id)
        return Empty()

    @bus.method(contract.RESIZE)
    async def resize(call: Call, request: contract.ResizeContainer) -> Empty:
        await service.resize(engine, engine.find(request.container), request.rows, request.columns)
        return Empty()

    @bus.method(contract.STOP)
    async def stop(call: Call, request: contract.StopContainer) -> Empty:
        await service.stop(engine, engine.find(request.container), request.signal, request.timeout_s)
        return Empty()

    @bus.method(contract.RESTART)
    async def restart(call: Call, request: contract.StopContainer) -> Empty:
        await service.restart(engine, engine.find(request.container), request.signal, request.timeout_s)
        return Empty()

    @bus.method(contract.KILL)
    async def kill(call: Call, request: contract.KillContainer) -> Empty:
        await service.kill(engine, engine.find(request.container), request.signal)
        return Empty()

    @bus.method(contract.PAUSE)
    async def pause(call: Call, request: contract.ContainerRef) -> Empty:
        await service.pause(engine, engine.find(request.container))
        return Empty()

    @bus.method(contract.UNPAUSE)
    async def unpause(call: Call, request: contract.ContainerRef) -> Empty:
        await service.unpause(engine, engine.find(request.container))
        return Empty()

    @bus.method(contract.WAIT)
    async def wait(call: Call, request: contract.WaitContainer) -> contract.ExitStatus:
        status = await service.wait(engine.find(request.container), request.condition)
        call.snapshot()
        return status

    @bus.method(contract.REMOVE)
    async def remove(call: Call, request: contract.RemoveContainer) -> Empty:
        await service.remove(engine, engine.find(request.container), force=request.force, volumes=request.volumes)
        return Empty()

    @bus.method(contract.RENAME)
    async def rename(call: Call, request: contract.RenameContainer) -> Empty:
        await service.rename(engine, engine.find(request.container), request.name)
        return Empty()

    @bus.method(contract.LIST)
    async def list_(call: Call, request: contract.ListContainers) -> contract.ContainerList:
        now = time.time_ns()
        call.snapshot()
        records = [live.record for live in engine.containers.values()]
        chosen = listing.select(records, request.filters, all_=request.all, limit=request.limit)
        return contract.ContainerList(containers=[listing.summary(record, now) for record in chosen])

    @bus.method(contract.INSPECT)
    async def inspect(call: Call, request: contract.ContainerRef) -> Document:
        live: Live = engine.find(request.container)
        bundle = str(engine.bundle(live.id))
        call.snapshot()
        found = document.inspect(live.record, bundle=bundle, exec_ids=list(live.executions))
        return Document(document=masking.container(found) if call.monitor else found)

    @bus.method(contract.UPDATE)
    async def update(call: Call, request: contract.UpdateContainer) -> Empty:
        await update_.update(engine, engine.find(request.container), request.resources)
        return Empty()

    @bus.method(contract.STAT)
    async def stat(call: Call, request: contract.StatPath) -> contract.PathStat:
        return await copy.stat(engine, engine.find(request.container), request.path)

    @bus.method(contract.COPY_FROM)
    async def copy_from(call: Call, request: contract.CopyFrom) -> Empty:
        await copy.copy_from(engine, engine.find(request.container), request.path, one_descriptor(call))
        return Empty()

    @bus.method(contract.COPY_TO)
    async def copy_to(call: Call, request: contract.CopyTo) -> contract.CopiedTo:
        live = engine.find(request.container)
        size = await copy.copy_to(engine, live, request.path, one_descriptor(call), keep_owner=request.keep_owner)
        return contract.CopiedTo(size_bytes=size)

    @bus.method(contract.EXPORT)
    async def export(call: Call, request: contract.ExportContainer) -> Empty:
        await copy.export(engine, engine.find(request.container), one_descriptor(call))
        return Empty()

    @bus.method(contract.COMMIT)
    async def commit_(call: Call, request: contract.CommitContainer) -> ImageID:
        return await commit.commit(engine, engine.find(request.container), request)

    @bus.method(contract.DIFF)
    async def diff(call: Call, request: contract.DiffContainer) -> Empty:
        await commit.diff(engine, engine.find(request.container), one_descriptor(call))
        return Empty()

    @bus.method(contract.TOP)
    async def top(call: Call, request: contract.TopContainer) -> contract.ProcessTable:
        if call.monitor and request.ps_args:
            raise errors.PermissionDenied("a monitor can't give options to ps: some show environments")
        return await service.top(engine, engine.find(request.container), request.ps_args)

    @bus.method(contract.INFO)
    async def info(call: Call, request: Empty) -> contract.SystemInfo:
        with trio.move_on_after(5):
            await engine.chosen.wait()
        call.snapshot()
        return host.info(engine)

    return bus


def one_descriptor(call: Call) -> int:
    """Stays the call's, which closes it at the end."""
    if len(call.fds) != 1:
        raise errors.InvalidArgument(f"one descriptor is needed, to write to or read from, not {len(call.fds)}")
    return call.fds[0]


def call_fds_done(call: Call) -> None:
    """Close the request's descriptors: a client waits for the end of the pipe whose other end it sent us."""
    for fd in call.take_fds():
        os.close(fd)

"""``commit`` and ``diff``: imaged reads what the container changed; here it's made to stand still for that long, and goes on afterwards.

That it stands still for a commit is in its record before it does, so that it goes on even if this service is killed meanwhile
(``release``, called by recovery). One commit of a container at a time: the end of one would let it go on in the middle of another.
"""

from __future__ import annotations

import msgspec
import trio

from pyx_bus import errors
from pyx_bus.contract import containerd as contract
from pyx_bus.contract import imaged

from . import plan, service
from .engine import Engine, Live
from .model import Container, State


async def diff(engine: Engine, live: Live, fd: int) -> None:
    """Errors: see ``contract.DiffContainer``. ``fd`` stays the caller's."""
    _check(live)
    await engine.bus.call(imaged.DIFF, imaged.DiffSnapshot(container_id=live.id), fds=[fd])


async def commit(engine: Engine, live: Live, request: contract.CommitContainer) -> imaged.ImageID:
    """Errors: see ``contract.CommitContainer``."""
    async with live.committing:
        _check(live)
        try:
            if request.pause and live.record.state is State.RUNNING:
                await _hold(engine, live)
            return await _commit(engine, live, request)
        finally:
            await release(engine, live)


async def _commit(engine: Engine, live: Live, request: contract.CommitContainer) -> imaged.ImageID:
    record = live.record
    snapshot = imaged.CommitSnapshot(
        container_id=live.id,
        config=config(record),
        reference=request.reference,
        author=request.author,
        message=request.message,
        changes=request.changes,
        created_by=" ".join(config(record).cmd),
    )
    async with engine.bus.stream(imaged.COMMIT, snapshot) as stream:
        async for _ in stream:
            await release(engine, live)  # it has been read; the rest needs the container no more
        made = await stream.result()
        engine.publish(
            contract.ContainerCommitted, live.record, comment=request.message, imageID=made.id, imageRef=made.reference
        )
    return made


def _check(live: Live) -> None:
    if live.record.state in (State.REMOVING, State.DEAD):
        raise errors.FailedPrecondition(f'container "{live.record.name}" is being removed')


async def _hold(engine: Engine, live: Live) -> None:
    with trio.CancelScope(shield=True):  # half paused, nobody would know
        live.record = msgspec.structs.replace(live.record, committing=True)
        await engine.store.update(live.record)
        try:
            await service.pause(engine, live)
        except errors.FailedPrecondition:
            if live.record.state is State.RUNNING:
                raise
            # it has ended just now, or somebody else has paused it: it stands still anyway


async def release(engine: Engine, live: Live) -> None:
    """Let it go on if a commit holds it. Idempotent. Whoever asked for the commit may have gone."""
    if not live.record.committing:
        return
    with trio.CancelScope(shield=True):
        live.record = msgspec.structs.replace(live.record, committing=False)
        if live.record.state is State.PAUSED:
            try:
                await service.unpause(engine, live)
                return
            except errors.FailedPrecondition:
                pass  # somebody was faster
        await engine.store.update(live.record)


def config(record: Container) -> imaged.ImageConfig:
    """What an image of this container says of how to run it: Docker's Config of the container."""
    spec, image = record.spec, record.image
    anonymous = [mount.target for mount in spec.mounts if mount.type == "volume" and not mount.source]
    return imaged.ImageConfig(
        id=image.id,
        reference=image.reference,
        user=record.process.user,
        env=plan.merge_env(image.env, spec.env),
        entrypoint=image.entrypoint if spec.entrypoint is None else [word for word in spec.entrypoint if word],
        cmd=spec.command if spec.command is not None else image.cmd if spec.entrypoint is None else [],
        working_dir=spec.working_dir or image.working_dir,
        volumes=sorted({*image.volumes, *anonymous}),
        exposed_ports=record.exposed_ports,
        labels=record.labels,
        stop_signal=spec.stop_signal or image.stop_signal,
        healthcheck=record.healthcheck,
        shell=image.shell,
    )

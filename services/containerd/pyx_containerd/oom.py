"""Telling when the kernel's OOM killer strikes, while a container runs. How often it did in a run is in the row, so that a restart of the
service neither forgets nor repeats it."""

from __future__ import annotations

import msgspec
import trio

from pyx_bus.contract import containerd as contract

from . import kernel
from .engine import Engine, Live
from .errors import KernelError

COUNTED_WITHIN_S = 5.0  # from the notice to the kill's being counted (v1); the victim may have much memory to give back


async def watch(engine: Engine, live: Live) -> None:
    """For as long as this run lasts."""
    exited = live.exited
    try:
        notice = kernel.OomNotice(live.record.cgroup)
    except KernelError as error:
        if live.running:  # else it was a short one
            engine.log.warning("its OOM kills are told at its end only", container=live.id, error=error.message)
        return
    try:
        async with trio.open_nursery() as nursery:

            async def until_exit() -> None:
                await exited.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_exit)
            await _tell_if_new(engine, live)  # what was before the notice, or while the service was away
            while True:
                await trio.lowlevel.wait_readable(notice)
                notice.clear()
                pause = 0.001
                with trio.move_on_after(COUNTED_WITHIN_S):
                    while not await _tell_if_new(engine, live):
                        await trio.sleep(pause)
                        pause = min(0.1, pause * 2)
    finally:
        trio.lowlevel.notify_closing(notice)
        notice.close()


async def _tell_if_new(engine: Engine, live: Live) -> bool:
    if not live.running or not tell(engine, live, kernel.oom_kills(live.record.cgroup)):
        return False
    await engine.store.update(live.record)
    return True


def tell(engine: Engine, live: Live, kills: int) -> bool:
    """Publish what of ``kills`` hasn't been told. Doesn't write the row."""
    new = kills - live.record.oom_kills
    if new <= 0:
        return False
    live.record = msgspec.structs.replace(live.record, oom_kills=kills)
    engine.publish(contract.ContainerOutOfMemory, live.record, {"kills": new})
    return True

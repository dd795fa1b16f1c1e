"""``update``: other limits for a container that exists.

The runtime changes the cgroup from a file of ``linux.resources`` with all limits, not only the changed ones: what it would assume for
one that isn't named differs between runtimes. If it fails, it has put back what it changed, and nothing is recorded.
"""

from __future__ import annotations

import msgspec

from pyx_bus import errors
from pyx_bus.contract import containerd as contract

from . import bundle as bundles
from . import kernel, oci, plan
from .drivers.runtime import UPDATE_FILE, parse_failure
from .engine import Engine, Live
from .model import State


async def update(engine: Engine, live: Live, wanted: contract.Resources) -> None:
    """Errors: see ``contract.UpdateContainer``."""
    async with live.lock:
        if live.record.state is State.REMOVING or live.id not in engine.containers:
            raise errors.FailedPrecondition(f'container "{live.record.name}" is being removed')
        resources = plan.updated_resources(live.record.spec.resources, wanted, engine.cpus)
        if live.running and live.shim is not None:
            await _apply(engine, live, resources)
        spec = msgspec.structs.replace(live.record.spec, resources=resources)
        live.record = msgspec.structs.replace(live.record, spec=spec)
        engine.publish(contract.ContainerUpdated, live.record, {"resources": resources})
        await engine.store.update(live.record)


async def _apply(engine: Engine, live: Live, resources: contract.Resources) -> None:
    assert live.shim is not None
    bundle = engine.bundle(live.id)
    document = oci.limits(resources, swap_accounting=kernel.swap_accounting())
    if resources.pids_limit < 0:
        document["pids"] = {"limit": -1}
    bundles.write_config(bundle, UPDATE_FILE, document)
    log = bundle / "update.log"
    try:
        runtime = await engine.runtime(live.record.runtime)
        code = await live.shim.run(runtime.update(live.id))
        if code and live.running:  # else it has just ended, and the next start has the new ones
            text = log.read_text(errors="replace") if log.exists() else ""
            raise errors.Internal(f'cannot update container "{live.record.name}": {parse_failure(text, code).reason}')
    finally:
        for name in (UPDATE_FILE, "update.log"):
            (bundle / name).unlink(missing_ok=True)

"""logd on the bus: message → use case → reply."""

from __future__ import annotations

from pyx_bus.contract import logd as contract
from pyx_bus.contract.base import Empty, Released, Retain
from pyx_bus.errors import InvalidArgument
from pyx_bus.service import Call, Service

from .model import container_id
from .reader import Selection
from .service import LogService


def _one_descriptor(call: Call) -> int:
    if len(call.fds) != 1:
        raise InvalidArgument(f"one descriptor is needed, for the output, not {len(call.fds)}")
    return call.take_fds()[0]


def serve(logs: LogService) -> Service:
    """The service's methods."""
    service = Service("logd")

    @service.method(contract.OPEN)
    async def open_log(call: Call, request: contract.OpenLog) -> contract.LogOpened:
        container = container_id(request.container_id)
        path = logs.open(
            container, request.run, request.streams, request.attached, request.driver, request.options, call.take_fds()
        )
        return contract.LogOpened(path=path)

    @service.method(contract.ATTACH)
    async def attach(call: Call, request: contract.AttachLog) -> Empty:
        container = container_id(request.container_id)
        logs.attach(container, _one_descriptor(call), logs=request.logs, stdout=request.stdout, stderr=request.stderr)
        return Empty()

    @service.method(contract.WAIT_DRAINED)
    async def wait_drained(call: Call, request: contract.WaitDrained) -> Empty:
        await logs.wait_drained(container_id(request.container_id), request.run)
        return Empty()

    @service.method(contract.READ)
    async def read(call: Call, request: contract.ReadLogs) -> Empty:
        container = container_id(request.container_id)
        selection = Selection(
            stdout=request.stdout,
            stderr=request.stderr,
            since_ns=request.since_ns,
            until_ns=request.until_ns,
            tail=request.tail,
            timestamps=request.timestamps,
        )
        await logs.read(container, _one_descriptor(call), selection, follow=request.follow)
        return Empty()

    @service.method(contract.REMOVE)
    async def remove(call: Call, request: contract.RemoveLog) -> Empty:
        await logs.remove(container_id(request.container_id))
        return Empty()

    @service.method(contract.RETAIN)
    async def retain(call: Call, request: Retain) -> Released:
        return Released(container_ids=await logs.retain(set(request.container_ids), request.before_ns))

    return service

"""volumed on the bus: message → use case → reply."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from pyx_bus import masking
from pyx_bus.contract import volumed as contract
from pyx_bus.contract.base import Empty, Released, Retain
from pyx_bus.contract.imaged import Document
from pyx_bus.errors import InvalidArgument
from pyx_bus.service import Call, Service

from .model import VolumeRecord
from .service import VolumeService


def document(volume: VolumeRecord, mountpoint: str) -> dict[str, object]:
    """Docker's inspect JSON of a volume."""
    created = datetime.fromtimestamp(volume.created_ns // 1_000_000_000, UTC)
    return {
        "CreatedAt": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "Driver": volume.driver,
        "Labels": volume.labels or None,
        "Mountpoint": mountpoint,
        "Name": volume.name,
        "Options": volume.options or None,
        "Scope": "local",
    }


def serve(volumes: VolumeService) -> Service:
    """The service's methods."""
    service = Service("volumed")

    def message(volume: VolumeRecord) -> contract.Volume:
        return contract.Volume(
            name=volume.name,
            driver=volume.driver,
            mountpoint=volumes.mountpoint(volume),
            created_ns=volume.created_ns,
            labels=volume.labels,
            options=volume.options,
            anonymous=volume.anonymous,
            references=len(volumes.users(volume.name)),
        )

    @service.method(contract.ATTACH)
    async def attach(call: Call, request: contract.AttachVolumes) -> contract.AttachedVolumes:
        if not request.container_id:
            raise InvalidArgument("a container's ID is needed")
        if len(call.fds) > 1:
            raise InvalidArgument(f"at most one descriptor, the container's root directory, not {len(call.fds)}")
        # the descriptor stays the call's, which closes it: a thread that uses it is always waited for
        root_fd = call.fds[0] if call.fds else None
        return contract.AttachedVolumes(mounts=await volumes.attach(request.container_id, request.mounts, root_fd))

    @service.method(contract.DETACH)
    async def detach(call: Call, request: contract.DetachVolumes) -> Empty:
        await volumes.detach(request.container_id, remove_anonymous=request.remove_anonymous)
        return Empty()

    @service.method(contract.RETAIN)
    async def retain(call: Call, request: Retain) -> Released:
        return Released(container_ids=await volumes.retain(set(request.container_ids), request.before_ns))

    @service.method(contract.CREATE)
    async def create(call: Call, request: contract.CreateVolume) -> contract.Volume:
        return message(await volumes.create(request.name, request.driver, request.driver_options, request.labels))

    @service.method(contract.LIST)
    async def list_volumes(call: Call, request: contract.ListVolumes) -> contract.VolumeList:
        call.snapshot()
        found = [message(volume) for volume in volumes.select(request.filters)]
        if call.monitor:
            found = [msgspec.structs.replace(volume, options=masking.options(volume.options)) for volume in found]
        return contract.VolumeList(volumes=found)

    @service.method(contract.INSPECT)
    async def inspect(call: Call, request: contract.VolumeRef) -> Document:
        call.snapshot()
        volume = volumes.get(request.name)
        found = document(volume, volumes.mountpoint(volume))
        return Document(document=masking.volume(found) if call.monitor else found)

    @service.method(contract.REMOVE)
    async def remove(call: Call, request: contract.RemoveVolume) -> Empty:
        await volumes.remove(request.name, force=request.force)
        return Empty()

    return service

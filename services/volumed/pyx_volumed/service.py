"""The use cases of volumed.

State is in memory, the database behind it; a change is made on disk first, then in memory and told as an event, with no await between
the two: what list and inspect answer and the events after it fit together.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable
from typing import Any, TypeVar

import structlog
import trio

from pyx_bus.contract import volumed as contract
from pyx_bus.contract.base import Event
from pyx_bus.errors import Conflict, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted

from . import plan
from .copyup import open_source
from .drivers import Driver, find
from .locks import Locks
from .model import ANONYMOUS_LABEL, VolumeRecord, check_name
from .store import Reference, Store

T = TypeVar("T")

_FILTERS = ("name", "driver", "label", "dangling")


class VolumeService:
    """All volumes of the host."""

    def __init__(
        self, store: Store, drivers: dict[str, Driver], publish: Callable[[Event], None], logger: structlog.typing.FilteringBoundLogger
    ) -> None:
        self._store = store
        self._drivers = drivers
        self._publish = publish
        self._logger = logger
        self._volumes: dict[str, VolumeRecord] = {}
        self._references: dict[str, dict[str, Reference]] = {}  # container → target → reference
        self._locks = Locks()
        self._writing = trio.Lock()

    def start(self) -> list[VolumeRecord]:
        """Read the state, and finish or undo what the last process was at. Blocking. The volumes found that weren't recorded."""
        found: list[VolumeRecord] = []
        volumes, references = self._store.load()
        self._volumes = {volume.name: volume for volume in volumes}
        for reference in references:
            self._references.setdefault(reference.container_id, {})[reference.target] = reference
        for name, driver in self._drivers.items():
            for unknown in driver.recover([volume for volume in volumes if volume.driver == name]):
                try:
                    volume = VolumeRecord(check_name(unknown), name, time.time_ns())
                except InvalidArgument:
                    self._logger.warning("found a directory that can't be a volume", directory=unknown, driver=name)
                    continue
                self._store.change(add=[volume])
                self._volumes[volume.name] = volume
                found.append(volume)
                self._logger.warning("found a volume that wasn't recorded", volume=unknown, driver=name)
        return found

    def tell_found(self, volumes: list[VolumeRecord]) -> None:
        """They exist from now on, as far as anybody was told."""
        for volume in volumes:
            self._tell(contract.VolumeCreated, volume.name, volume.driver)

    # -- volumes ------------------------------------------------------------------------------------------------------------------

    async def create(self, name: str, driver: str, options: dict[str, str], labels: dict[str, str]) -> VolumeRecord:
        """Make it, or find the same one. Errors: not_found (driver), invalid_argument, conflict (exists otherwise)."""
        driver = driver or "local"
        find(self._drivers, driver).check(options)
        if not name:
            name = secrets.token_hex(32)
            labels = {ANONYMOUS_LABEL: "", **labels}
        check_name(name)
        async with self._locks.hold([name]):
            known = self._existing(name, driver, options)
            if known is not None:
                return known
            volume = VolumeRecord(name, driver, time.time_ns(), labels, options)
            await self._make([volume], [])
            return volume

    def _existing(self, name: str, driver: str, options: dict[str, str]) -> VolumeRecord | None:
        """Errors: conflict, if the volume of that name isn't what's asked for (an empty driver or no options ask for nothing)."""
        known = self._volumes.get(name)
        if known is None:
            return None
        if driver and driver != known.driver:
            raise Conflict(f'volume "{name}" exists with driver "{known.driver}", not "{driver}"')
        if options and options != known.options:
            raise Conflict(f'volume "{name}" exists with other driver options', hint="remove it first, or choose another name")
        return known

    async def _make(
        self,
        volumes: list[VolumeRecord],
        fill: list[tuple[VolumeRecord, int]],
        refer: list[Reference] | None = None,
        how: dict[str, dict[str, str]] | None = None,
    ) -> None:
        """Make and fill new volumes, fill old ones, and record everything at once; on a failure nothing new is left."""
        made: list[VolumeRecord] = []
        try:
            for volume in volumes:
                made.append(volume)
                await self._blocking(self._driver(volume).prepare, volume)
            for volume, source_fd in fill:
                await self._blocking(self._driver(volume).mount, volume)
                await self._blocking(self._driver(volume).fill, volume, source_fd)
            await self._change(add=volumes, refer=refer or [], how=how)
        except BaseException:
            with trio.CancelScope(shield=True):
                for volume in made:
                    if volume.name not in self._volumes:
                        await self._blocking(self._driver(volume).delete, volume.name)
            raise
        for volume in volumes:
            await self._blocking(self._driver(volume).settle, volume.name)

    async def remove(self, name: str, *, force: bool) -> None:
        """Errors: not_found (unless ``force``), conflict (in use)."""
        async with self._locks.hold([name]):
            volume = self._volumes.get(name)
            if volume is None:
                if force:
                    return
                raise NotFound(f'no such volume: "{name}"')
            users = self.users(name)
            if users:
                raise Conflict(
                    f'volume "{name}" is in use by container ' + ", ".join(user[:12] for user in users),
                    hint="remove the container first",
                    details={"containers": ",".join(users)},
                )
            await self._destroy(volume)

    async def _destroy(self, volume: VolumeRecord, release: list[Reference] | None = None) -> None:
        driver = self._driver(volume)
        await self._blocking(driver.unmount, volume)
        await self._blocking(driver.withdraw, volume.name)
        await self._change(release=release or [], remove=[volume.name])
        with trio.CancelScope(shield=True):
            try:
                await self._blocking(driver.delete, volume.name)
            except OSError as error:  # the volume is gone all the same; the next start tries again to delete what's left
                self._logger.error("can't delete all of a removed volume's files", volume=volume.name, error=str(error))

    def get(self, name: str) -> VolumeRecord:
        """Errors: not_found."""
        try:
            return self._volumes[name]
        except KeyError:
            raise NotFound(f'no such volume: "{name}"') from None

    def mountpoint(self, volume: VolumeRecord) -> str:
        return self._driver(volume).mountpoint(volume.name)

    def users(self, name: str) -> list[str]:
        """The containers that refer to a volume."""
        return sorted(
            container for container, held in self._references.items() if any(reference.volume == name for reference in held.values())
        )

    def select(self, filters: dict[str, list[str]]) -> list[VolumeRecord]:
        """Errors: invalid_argument (unknown filter)."""
        for name in filters:
            if name not in _FILTERS:
                raise InvalidArgument(f'invalid filter "{name}"', hint="one of " + ", ".join(_FILTERS))
        dangling = {_boolean(value) for value in filters.get("dangling", [])}
        return [
            volume
            for _, volume in sorted(self._volumes.items())
            if ("name" not in filters or any(value in volume.name for value in filters["name"]))
            and ("driver" not in filters or volume.driver in filters["driver"])
            and all(_has_label(volume.labels, value) for value in filters.get("label", []))
            and (not dangling or (not self.users(volume.name)) in dangling)
        ]

    # -- containers ---------------------------------------------------------------------------------------------------------------

    async def attach(self, container: str, requests: list[contract.MountRequest], root_fd: int | None) -> list[contract.MountPoint]:
        """Errors: as the contract says. ``root_fd`` stays the caller's."""
        planned = plan.plan(requests)
        for mount in planned:
            if mount.volume is not None:
                self._driver_of_request(mount.request)
        if any(mount.request.type == "bind" for mount in planned):
            await self._blocking(_check_binds, planned)
        names = [mount.volume for mount in planned if mount.volume]
        async with self._locks.hold([f"/{container}", *names]):
            return await self._attach(container, planned, root_fd)

    def _driver_of_request(self, request: contract.MountRequest) -> None:
        if request.driver or request.driver_options:
            find(self._drivers, request.driver or "local").check(request.driver_options)

    async def _attach(self, container: str, planned: list[plan.PlannedMount], root_fd: int | None) -> list[contract.MountPoint]:
        held = self._references.get(container, {})
        now = time.time_ns()
        chosen: dict[str, VolumeRecord] = {}
        fresh: dict[str, VolumeRecord] = {}
        refer: list[Reference] = []
        for mount in planned:
            if mount.volume is None:
                continue
            volume = self._choose(mount, held, fresh, now)
            chosen[mount.target] = volume
            known = held.get(mount.target)
            if known is None or known.volume != volume.name:
                refer.append(Reference(container, mount.target, volume.name, now))
        sources: list[tuple[VolumeRecord, int]] = []
        try:
            if root_fd is not None and refer:
                new = {reference.target for reference in refer}
                wanted = [(chosen[m.target], m.target) for m in planned if m.target in new and not m.request.no_copy]
                sources = await self._blocking(_open_sources, root_fd, wanted)
            if refer:
                how = {mount.target: self._how(mount, chosen[mount.target]) for mount in planned if mount.target in chosen}
                await self._make(list(fresh.values()), sources, refer, how)
        finally:
            for _, source_fd in sources:
                os.close(source_fd)
        try:
            for volume in chosen.values():
                if volume.options:
                    await self._blocking(self._driver(volume).mount, volume)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._undo(refer, fresh)
            raise
        return [self._answer(mount, chosen.get(mount.target)) for mount in planned]

    def _choose(
        self, mount: plan.PlannedMount, held: dict[str, Reference], fresh: dict[str, VolumeRecord], now: int
    ) -> VolumeRecord:
        """The volume of a mount: the one the container already has there, the named one, or a new one."""
        request = mount.request
        known = held.get(mount.target)
        if not mount.volume and known is not None:
            return self._volumes[known.volume]
        name = mount.volume or secrets.token_hex(32)
        existing = fresh.get(name) or self._existing(name, request.driver, request.driver_options)
        if existing is not None:
            return existing
        labels = dict(request.labels) if mount.volume else {ANONYMOUS_LABEL: "", **request.labels}
        fresh[name] = VolumeRecord(name, request.driver or "local", now, labels, dict(request.driver_options))
        return fresh[name]

    async def _undo(self, refer: list[Reference], fresh: dict[str, VolumeRecord]) -> None:
        await self._change(release=refer)
        for volume in fresh.values():
            if not self.users(volume.name):
                await self._destroy(volume)

    def _answer(self, mount: plan.PlannedMount, volume: VolumeRecord | None) -> contract.MountPoint:
        if volume is None:
            return plan.mount_point(mount, source=plan.bind_source(mount.request) if mount.request.type == "bind" else "")
        return plan.mount_point(mount, source=self.mountpoint(volume), name=volume.name, driver=volume.driver)

    async def detach(self, container: str, *, remove_anonymous: bool) -> None:
        """Drop a container's references. Idempotent."""
        held = list(self._references.get(container, {}).values())
        async with self._locks.hold([f"/{container}", *(reference.volume for reference in held)]):
            held = list(self._references.get(container, {}).values())
            if not held:
                return
            volumes = {reference.volume: self._volumes[reference.volume] for reference in held}
            # the references go with the last anonymous volume, or first: a kill in between leaves what the next detach finds
            unused = [volume for volume in volumes.values() if self.users(volume.name) == [container]]
            doomed = [volume for volume in unused if remove_anonymous and volume.anonymous]
            keep = [reference for reference in held if reference.volume not in {volume.name for volume in doomed}]
            if keep:
                await self._change(release=keep)
            for volume in unused:
                if volume not in doomed:
                    await self._blocking(self._driver(volume).unmount, volume)
            for volume in doomed:
                await self._destroy(volume, [reference for reference in held if reference.volume == volume.name])

    async def retain(self, living: set[str], before_ns: int) -> list[str]:
        """Drop the references of all other containers, if they're older. Their volumes stay: whether a container was to take its
        anonymous ones along nobody knows any more."""
        released = [
            container
            for container, held in self._references.items()
            if container not in living and all(reference.since_ns < before_ns for reference in held.values())
        ]
        for container in released:
            await self.detach(container, remove_anonymous=False)
        return released

    # -- inside -------------------------------------------------------------------------------------------------------------------

    def _driver(self, volume: VolumeRecord) -> Driver:
        return find(self._drivers, volume.driver)

    def _how(self, mount: plan.PlannedMount, volume: VolumeRecord) -> dict[str, str]:
        """What a mount event says of how it's mounted, as Docker's does."""
        point = self._answer(mount, volume)
        return {"propagation": point.propagation, "read/write": "false" if point.read_only else "true"}

    def _tell(self, event: type[Event], name: str, driver: str, reference: Reference | None = None, **more: str) -> None:
        attributes = {"driver": driver, **more}
        if reference is not None:
            attributes |= {"container": reference.container_id, "destination": reference.target}
        self._publish(event(id=name, time_ns=time.time_ns(), attributes=attributes))

    async def _blocking(self, function: Callable[..., T], *args: Any) -> T:
        """In a thread, to its end even if the caller is cancelled: what it was at is known then. Errors: resource_exhausted."""
        try:
            return await trio.to_thread.run_sync(function, *args)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted("no space left where volumes are kept", hint="remove volumes or images") from error
            raise

    async def _change(
        self,
        *,
        add: list[VolumeRecord] | None = None,
        refer: list[Reference] | None = None,
        release: list[Reference] | None = None,
        remove: list[str] | None = None,
        how: dict[str, dict[str, str]] | None = None,
    ) -> None:
        """Change the database, then the memory, and tell it, as one step. ``how``: by target, more to say of a mount."""
        add, refer, release, remove = add or [], refer or [], release or [], remove or []
        async with self._writing:
            with trio.CancelScope(shield=True):
                await self._blocking(lambda: self._store.change(add=add, refer=refer, release=release, remove=remove))
            for reference in release:
                held = self._references.get(reference.container_id, {})
                held.pop(reference.target, None)
                if not held:
                    self._references.pop(reference.container_id, None)
                self._tell(contract.VolumeUnmounted, reference.volume, self._volumes[reference.volume].driver, reference)
            for name in remove:
                gone = self._volumes.pop(name, None)
                if gone is not None:
                    self._tell(contract.VolumeDestroyed, name, gone.driver)
            for volume in add:
                self._volumes[volume.name] = volume
                self._tell(contract.VolumeCreated, volume.name, volume.driver)
            for reference in refer:
                self._references.setdefault(reference.container_id, {})[reference.target] = reference
                driver = self._volumes[reference.volume].driver
                self._tell(contract.VolumeMounted, reference.volume, driver, reference, **(how or {}).get(reference.target, {}))


def _check_binds(planned: list[plan.PlannedMount]) -> None:
    """Whether the sources of binds exist; those that may are made, after all others were found. Blocking."""
    missing: list[str] = []
    for mount in planned:
        if mount.request.type != "bind":
            continue
        source = plan.bind_source(mount.request)
        if not os.path.exists(source):
            if not mount.request.create_source:
                raise NotFound(f'bind source path does not exist: "{source}"')
            missing.append(source)
    for source in missing:
        try:
            os.makedirs(source, 0o755, exist_ok=True)
        except OSError as error:
            raise FailedPrecondition(f'cannot create the bind source "{source}": {error.strerror}') from error


def _open_sources(root_fd: int, wanted: list[tuple[VolumeRecord, str]]) -> list[tuple[VolumeRecord, int]]:
    """The image's directories at the targets, where there are any. Blocking."""
    sources: list[tuple[VolumeRecord, int]] = []
    try:
        for volume, target in wanted:
            fd = open_source(root_fd, target)
            if fd is not None:
                sources.append((volume, fd))
    except BaseException:
        for _, fd in sources:
            os.close(fd)
        raise
    return sources


def _has_label(labels: dict[str, str], wanted: str) -> bool:
    key, equals, value = wanted.partition("=")
    return key in labels and (not equals or labels[key] == value)


def _boolean(value: str) -> bool:
    if value.lower() in ("true", "1", "t"):
        return True
    if value.lower() in ("false", "0", "f"):
        return False
    raise InvalidArgument(f'invalid filter "dangling={value}"', hint="true or false")

"""What the use cases share: the containers in memory, the store, the zygote, the runtimes, and the few steps all of them take.

Memory is the truth while the service runs; the store is written before anything is reported as done. What ``list`` and ``inspect``
answer (``containers``, ``Live.record``, ``Live.executions``) changes together with the publishing of the event that tells of it, with
no await in between: so an answer and the events after it fit together. A container's operations that
change what is attached to it (start, remove, rename) hold ``Live.lock``; waiting for an exit never does, so stop, kill and wait work
at any time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trio

from pyx_bus import errors
from pyx_bus.contract import containerd as contract
from pyx_bus.service import Context

from . import kernel, model
from .drivers.runtime import Runtime
from .errors import ambiguous, name_taken, no_such_container
from .model import Change, Container, State, next_state
from .probe import Choice
from .shims import Exit, Shim, Zygote
from .store import Store

Progress = Callable[[contract.RunProgress], Awaitable[None]]
SERVICE_TIMEOUT_S = 30.0  # for one step asked of another service: long enough for its restart


async def _nothing(live: Live) -> None:
    return


def _set_event() -> trio.Event:
    event = trio.Event()
    event.set()
    return event


@dataclass(eq=False)
class Execution:
    """A process of an exec that runs. ``attributes``: what its events have beside the exec's own."""

    key: str
    attributes: dict[str, str] = field(default_factory=dict)
    ended: trio.Event = field(default_factory=trio.Event)
    exit: Exit | None = None


@dataclass(eq=False)
class Live:
    """A container in memory: its record, and what can't be kept on disk.

    - ``begins``: the next start's success, for those who wait for it
    - ``spawned``: the current start has come to its end, one way or the other
    - ``exited``: it doesn't run (set again by every start's failure or exit)
    - ``logged``: logd has the run's streams, or never will
    - ``clean``: nothing of the last run is left
    - ``removed``: its row is gone
    - ``hurry``: stop waiting for a slow reader of the last run's output
    - ``restarting``: its exit is the first half of a restart, and not its end
    - ``copying``: held by the one copy in or out that's going on, ``copies`` are those going on or waiting
    - ``committing``: held by the one commit that's going on
    - ``leaving``: it has ended and removes itself
    - ``watch``: of the health checks, while they go on; ``unchecked``: they don't, and no check is left
    - ``launched_ns``: when the runtime was told to start it; its process begins a moment later
    - ``told_health``: the status of its health that is in the journal for sure
    """

    record: Container
    lock: trio.Lock = field(default_factory=trio.Lock)
    shim: Shim | None = None
    begins: trio.Event = field(default_factory=trio.Event)
    spawned: trio.Event = field(default_factory=_set_event)
    exited: trio.Event = field(default_factory=_set_event)
    clean: trio.Event = field(default_factory=_set_event)
    hurry: trio.Event = field(default_factory=trio.Event)
    removed: trio.Event = field(default_factory=trio.Event)
    mounted: bool = False
    launched_ns: int = 0
    restarting: bool = False
    leaving: bool = False
    copying: trio.Lock = field(default_factory=trio.Lock)
    committing: trio.Lock = field(default_factory=trio.Lock)
    copies: dict[trio.CancelScope, trio.Event] = field(default_factory=dict)
    logged: trio.Event = field(default_factory=trio.Event)
    executions: dict[str, Execution] = field(default_factory=dict)
    watch: trio.CancelScope | None = None
    unchecked: trio.Event = field(default_factory=_set_event)
    told_health: str = ""

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def running(self) -> bool:
        return self.record.state in (State.RUNNING, State.PAUSED)

    def exit_status(self) -> contract.ExitStatus:
        record = self.record
        return contract.ExitStatus(
            id=record.id,
            exit_code=record.exit_code,
            exited_at_ns=record.finished_at_ns,
            oom_killed=record.oom_killed,
            error=record.error,
        )


class Engine:
    """The shared state. No use case is in here: see service.py, start.py, end.py, execute.py, recovery.py."""

    def __init__(self, context: Context, store: Store) -> None:
        self.context = context
        self.bus = context.bus
        self.log: Any = context.log
        self.nursery: trio.Nursery = context.nursery
        self.store = store
        self.bundles: Path = context.run / "bundles"
        self.cgroup_parent = f"/{context.prefix}"
        self.zygote = Zygote(f"{self.cgroup_parent}/{kernel.SHIM_CGROUP}")
        self.warm_path = ""
        self.containers: dict[str, Live] = {}
        self.names: dict[str, str] = {}  # reserved ones, too
        self.cleaning: dict[str, Live] = {}  # removed, but something of their last run is still being taken down
        self.clean_ups: set[trio.Event] = set()  # those under way; each is set at its end
        self.creating: set[str] = set()  # IDs given out, whose rows aren't there yet
        self.runtimes: dict[str, Runtime] = {}
        self.choice: Choice | None = None
        self.chosen = trio.Event()
        self.cpus = os.cpu_count() or 1
        self.check_slots = trio.Semaphore(max(2, self.cpus))  # health checks being started: a hundred due at once mustn't crowd us
        self.act_on_health: Callable[[Live], Awaitable[None]] = _nothing  # for one that has turned unhealthy

    # finding ---------------------------------------------------------------------------------------------------------

    def find(self, reference: str) -> Live:
        """The container an ID, name or prefix means. Errors: not_found, invalid_argument (ambiguous)."""
        matches = model.resolve(reference, self.containers, self.names)
        if not matches:
            raise no_such_container(reference)
        if len(matches) > 1:
            raise ambiguous(reference)
        live = self.containers.get(matches[0])
        if live is None:  # its name is reserved, but it isn't there yet
            raise no_such_container(reference)
        return live

    def reserve_name(self, name: str, container_id: str) -> None:
        """Take a name, or say who has it. Errors: already_exists."""
        holder = self.names.get(name)
        if holder is not None:
            raise name_taken(name, holder)
        self.names[name] = container_id

    def free_name(self, name: str, container_id: str) -> None:
        if self.names.get(name) == container_id:
            del self.names[name]

    def bundle(self, container_id: str) -> Path:
        return self.bundles / container_id

    async def runtime(self, name: str) -> Runtime:
        """The runtime of that name, "" for the default. Waits for the choice at the service's first start."""
        await self.chosen.wait()
        wanted = name or (self.choice.name if self.choice else "")
        if wanted in self.runtimes:
            return self.runtimes[wanted]
        if not name:
            reason = self.choice.reason if self.choice else ""
            raise errors.FailedPrecondition(f"no OCI runtime works on this host: {reason}", hint="install runc or crun")
        known = ", ".join(sorted(self.runtimes)) or "none"
        raise errors.InvalidArgument(f'unknown or invalid runtime name: "{name}"', hint=f"known ones: {known}")

    # changing --------------------------------------------------------------------------------------------------------

    def change(self, live: Live, change: Change, **fields: Any) -> None:
        """Take a container through the table, in memory. Errors: failed_precondition."""
        try:
            state = next_state(live.record.state, change)
        except model.TransitionError as error:
            raise errors.FailedPrecondition(f'container "{live.record.name}": {error}') from None
        live.record = msgspec.structs.replace(live.record, state=state, **fields)

    def forget(self, live: Live) -> None:
        """Take a container out of memory: from now on neither its ID nor its name is known."""
        self.containers.pop(live.id, None)
        self.free_name(live.record.name, live.id)

    # telling ---------------------------------------------------------------------------------------------------------

    def publish(
        self, kind: type[contract.ContainerEvent], record: Container, fields: dict[str, Any] | None = None, /, **extra: str
    ) -> None:
        """An event of a container, with Docker's attributes: image, name, every label, and ``extra``."""
        attributes = {**record.labels, "image": record.spec.image, "name": record.name, **extra}
        self.bus.publish(kind(id=record.id, time_ns=time.time_ns(), attributes=attributes, **(fields or {})))

    def background(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Run a task for as long as the service lives. What it raises is logged: one container's bug isn't the others' end."""

        async def guarded() -> None:
            try:
                await function(*arguments)
            except Exception as error:
                self.log.error("background task failed", task=function.__qualname__, error=repr(error), exc_info=error)

        self.nursery.start_soon(guarded, name=function.__qualname__)

    def warm(self) -> None:
        """A start has been asked for: get the kernel's cgroup lock ready meanwhile."""
        self.zygote.warm(self.warm_path)

    def undone(self, what: str, container_id: str, error: BaseException) -> None:
        """A step of a clean-up failed. It is logged and the others go on; ``retain`` makes up for it later."""
        message = error.message if isinstance(error, errors.BusError) else repr(error)
        self.log.warning("clean-up step failed", container=container_id, step=what, error=message)

    @contextlib.contextmanager
    def clean_up(self) -> Iterator[None]:
        """Around something that an orderly end of the service should wait for."""
        over = trio.Event()
        self.clean_ups.add(over)
        try:
            yield
        finally:
            self.clean_ups.discard(over)
            over.set()

    async def finish(self) -> None:
        """Before the orderly end: wait for the clean-ups that are under way. What isn't done in time is a next start's."""
        for over in list(self.clean_ups):
            await over.wait()

    def close(self) -> None:
        """At the orderly end. Containers and their shims go on; cgroups that nobody is in go."""
        for live in list(self.containers.values()):
            if live.shim is not None:
                live.shim.close()
        self.zygote.close()
        ours = [kernel.WARM_CGROUP]
        if not any(live.running for live in self.containers.values()):
            ours.append(kernel.SHIM_CGROUP)
        for name in ours:
            for _ in range(20):  # the last warm-up's process, or the last shim, may still be on its way out
                if kernel.remove_cgroup(f"{self.cgroup_parent}/{name}"):
                    break
                time.sleep(0.005)
        for place in kernel.cgroup_directories(self.cgroup_parent):
            try:
                place.rmdir()
            except OSError:
                pass  # containers are in it
        self.store.close()

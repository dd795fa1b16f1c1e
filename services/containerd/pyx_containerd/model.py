"""What a container is: its record, its states, and the one table that says which state follows which.

Pure. Invariants: a record's state changes only through ``next_state``; ``pid`` is non-zero exactly in running and paused;
``run`` counts the starts and names one run in talks with logd.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NewType

import msgspec

from pyx_bus.contract.containerd import ContainerSpec
from pyx_bus.contract.imaged import HealthCheck, ImageConfig, Mount
from pyx_bus.contract.netd import Sandbox
from pyx_bus.contract.volumed import MountPoint

ContainerID = NewType("ContainerID", str)


class State(enum.StrEnum):
    """Docker's states."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    RESTARTING = "restarting"
    REMOVING = "removing"
    EXITED = "exited"
    DEAD = "dead"


class Change(enum.StrEnum):
    """What can happen to a container."""

    START = "start"
    START_FAILED = "start failed"
    EXIT = "exit"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    RETRY = "restart policy"
    GIVE_UP = "stop while waiting"
    REMOVE = "remove"
    REMOVE_FAILED = "removal failed"


TRANSITIONS: dict[tuple[State, Change], State] = {
    (State.CREATED, Change.START): State.RUNNING,
    (State.CREATED, Change.START_FAILED): State.CREATED,
    (State.CREATED, Change.REMOVE): State.REMOVING,
    (State.RUNNING, Change.EXIT): State.EXITED,
    (State.RUNNING, Change.PAUSE): State.PAUSED,
    (State.RUNNING, Change.RETRY): State.RESTARTING,
    (State.PAUSED, Change.UNPAUSE): State.RUNNING,
    (State.PAUSED, Change.EXIT): State.EXITED,
    (State.RESTARTING, Change.START): State.RUNNING,
    (State.RESTARTING, Change.START_FAILED): State.EXITED,
    (State.RESTARTING, Change.GIVE_UP): State.EXITED,
    (State.RESTARTING, Change.REMOVE): State.REMOVING,
    (State.EXITED, Change.START): State.RUNNING,
    (State.EXITED, Change.START_FAILED): State.EXITED,
    (State.EXITED, Change.REMOVE): State.REMOVING,
    (State.REMOVING, Change.REMOVE): State.REMOVING,
    (State.REMOVING, Change.REMOVE_FAILED): State.DEAD,
    (State.DEAD, Change.REMOVE): State.REMOVING,
}


class TransitionError(Exception):
    """A change the table doesn't have."""


def next_state(state: State, change: Change) -> State:
    """The state after ``change``; ``TransitionError`` if it can't happen in ``state``."""
    try:
        return TRANSITIONS[state, change]
    except KeyError:
        raise TransitionError(f"a container that is {state} has no change {change!r}") from None


def diagram() -> str:
    """The table as a Mermaid state diagram; docs/state-machine.md is made of it and a test compares them."""
    lines = ["stateDiagram-v2", "    [*] --> created: create"]
    lines += [f"    {state} --> {after}: {change}" for (state, change), after in TRANSITIONS.items() if state != after]
    lines.append("    removing --> [*]")
    return "\n".join(lines) + "\n"


class Process(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is run: the spec merged with the image's config. ``user`` is still text, resolved in the root at start."""

    args: list[str]
    env: list[str]
    working_dir: str
    user: str
    stop_signal: int


class HealthStatus(enum.StrEnum):
    """Docker's words for how a container with a health check is."""

    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class CheckResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One check. ``exit_code`` -1: it couldn't be run, or took too long."""

    started_at_ns: int
    ended_at_ns: int
    exit_code: int
    output: str = ""


class Health(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the checks came to. ``log`` has the last five, the oldest first, over restarts of the container."""

    status: HealthStatus
    failing_streak: int = 0
    log: list[CheckResult] = []


class Container(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A container's record, as kept on disk. Frozen: a change makes a new one.

    ``exit_code`` and ``finished_at_ns`` are the last run's; ``oom_kills`` is how many of its processes the OOM killer ended, as told so
    far. ``error`` is why the last start failed. ``attached_volumes`` and ``sandbox`` are what volumed and netd gave; ``sandbox`` only
    while it runs. ``cgroup`` is the path below every hierarchy.
    ``healthcheck`` is the image's with what the spec says otherwise, ``health`` is None if there's nothing to check.
    ``committing``: a commit has paused it, and lets it go on.
    ``provisional``: made by a ``run`` that hasn't been acknowledged yet; if the service dies before its first start, it goes.
    """

    id: str
    name: str
    spec: ContainerSpec
    image: ImageConfig
    process: Process
    created_at_ns: int
    hostname: str
    labels: dict[str, str] = {}
    exposed_ports: list[str] = []
    rootfs_mounts: list[Mount] = []
    writable_path: str = ""
    snapshotter: str = ""
    state: State = State.CREATED
    pid: int = 0
    run: int = 0
    exit_code: int = 0
    signal: int = 0
    oom_killed: bool = False
    oom_kills: int = 0
    error: str = ""
    started_at_ns: int = 0
    finished_at_ns: int = 0
    attached_volumes: list[MountPoint] = []
    sandbox: Sandbox | None = None
    log_path: str = ""
    runtime: str = ""
    cgroup: str = ""
    restart_count: int = 0
    provisional: bool = False
    committing: bool = False
    healthcheck: HealthCheck | None = None
    health: Health | None = None


def resolve(reference: str, ids: Mapping[str, object], names: Mapping[str, str]) -> list[str]:
    """IDs a reference may mean: an ID, a name (with or without its slash), then every ID it is a prefix of."""
    if reference in ids:
        return [reference]
    name = reference.removeprefix("/")
    if name in names:
        return [names[name]]
    if not reference:
        return []
    return [id_ for id_ in ids if id_.startswith(reference)]

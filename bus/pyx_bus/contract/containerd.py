"""containerd: the life of containers.

A container is named by its ID (64 hex digits), an unambiguous prefix of it, or its name; every request's ``container`` takes any.
"""

from __future__ import annotations

from typing import ClassVar

from .base import Empty, Event, Message, Method
from .imaged import Document, HealthCheck, ImageID
from .netd import PortMapping
from .volumed import MountRequest


class Resources(Message, frozen=True, kw_only=True):
    """Limits; 0 means none. ``nano_cpus`` is 1e-9 CPUs, as in Docker's API."""

    memory_bytes: int = 0
    memory_reservation_bytes: int = 0
    memory_swap_bytes: int = 0
    nano_cpus: int = 0
    cpu_shares: int = 0
    cpu_period_us: int = 0
    cpu_quota_us: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    pids_limit: int = 0
    oom_score_adj: int = 0


class Ulimit(Message, frozen=True, kw_only=True):
    name: str
    soft: int
    hard: int


class ContainerSpec(Message, frozen=True, kw_only=True):
    """What ``docker create`` takes. None means "as the image says"; an empty list or text overrides it with nothing.

    ``healthcheck``: what isn't 0 or empty replaces what the image has; a ``test`` of NONE switches it off. ``health_action`` is what
    happens when it turns unhealthy: none (the default), restart or stop.
    """

    image: str
    name: str = ""
    command: list[str] | None = None
    entrypoint: list[str] | None = None
    env: list[str] = []
    user: str = ""
    group_add: list[str] = []
    working_dir: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    hostname: str = ""
    domainname: str = ""
    tty: bool = False
    open_stdin: bool = False
    stdin_once: bool = False
    auto_remove: bool = False
    stop_signal: str = ""
    stop_timeout_s: int | None = None
    read_only_rootfs: bool = False
    privileged: bool = False
    no_new_privileges: bool = False
    cap_add: list[str] = []
    cap_drop: list[str] = []
    devices: list[str] = []
    ulimits: list[Ulimit] = []
    sysctls: dict[str, str] = {}
    shm_size_bytes: int = 0
    resources: Resources = Resources()
    mounts: list[MountRequest] = []
    network: str = "bridge"
    ipv4_address: str = ""
    mac_address: str = ""
    ports: list[PortMapping] = []
    exposed_ports: list[str] = []
    publish_all_ports: bool = False
    dns: list[str] = []
    dns_search: list[str] = []
    dns_options: list[str] = []
    extra_hosts: list[str] = []
    pid_mode: str = ""
    ipc_mode: str = ""
    uts_mode: str = ""
    cgroup_parent: str = ""
    log_driver: str = ""
    log_options: dict[str, str] = {}
    runtime: str = ""
    platform: str = ""
    pull_policy: str = "missing"
    init: bool = False
    healthcheck: HealthCheck | None = None
    health_action: str = ""


class CreateContainer(Message, frozen=True, kw_only=True):
    """Errors: not_found (image with pull policy never, network), already_exists (name), invalid_argument, and imaged's of a pull.

    Pulls the image if ``pull_policy`` (always, missing, never) says so, streaming ``RunProgress``. A failed create leaves nothing.
    """

    spec: ContainerSpec


class CreatedContainer(Message, frozen=True, kw_only=True):
    id: str
    warnings: list[str] = []


class RunProgress(Message, frozen=True, kw_only=True):
    """An item of create, run, start and attach. ``phase``: pull (``id``, ``status``, bytes as in imaged's Progress), created (``id``
    the container's, ``warnings``), started (``id``).

    ``started``, and the single item of attach, carry the container's input as their descriptor if it was asked for and is open:
    stdin's write end, or the pty master (write to it, TIOCSWINSZ on it). An exec's has its ``exec_id``.
    """

    phase: str
    id: str = ""
    exec_id: str = ""
    status: str = ""
    current_bytes: int = 0
    total_bytes: int = 0
    warnings: list[str] = []


class AttachOptions(Message, frozen=True, kw_only=True):
    """``output``: descriptor 0 of the request is a pipe's write end that gets the container's output, framed as in
    ``pyx_bus.contract.logd``. ``stdin``: give me its input. ``rows``/``columns``: initial size of the terminal."""

    output: bool = False
    stdout: bool = True
    stderr: bool = True
    stdin: bool = False
    rows: int = 0
    columns: int = 0


class RunContainer(Message, frozen=True, kw_only=True):
    """Create and start in one call. With ``detach`` the result comes when it's started, else when it has exited.

    If the caller goes away the container goes on. Errors: as create and start.
    """

    spec: ContainerSpec
    attach: AttachOptions = AttachOptions()
    detach: bool = False


class ExitStatus(Message, frozen=True, kw_only=True):
    """``exit_code`` is the process's, 128 + signal if a signal ended it. ``exited_at_ns`` 0: it hasn't exited (a detached run)."""

    id: str = ""
    exit_code: int = 0
    exited_at_ns: int = 0
    oom_killed: bool = False
    error: str = ""


class StartContainer(Message, frozen=True, kw_only=True):
    """Start a created or exited container; a running one is left as it is. With ``wait`` the result comes when it has exited.

    Errors: not_found, failed_precondition (being removed, paused); a command that can't be executed is failed_precondition with
    details ``exit_code`` 126 or 127, any other failure of the runtime internal with ``exit_code`` 125/128 as Docker's.
    """

    container: str
    attach: AttachOptions = AttachOptions()
    wait: bool = False


class ContainerRef(Message, frozen=True, kw_only=True):
    """Errors: not_found, invalid_argument (ambiguous prefix)."""

    container: str


class StopContainer(Message, frozen=True, kw_only=True):
    """Ask with ``signal`` (its stop signal if empty), then SIGKILL after ``timeout_s`` (None: its own, else 10; -1: never).

    Stopping a stopped container does nothing. Returns when it has exited.
    """

    container: str
    signal: str = ""
    timeout_s: int | None = None


class KillContainer(Message, frozen=True, kw_only=True):
    """Send a signal (name with or without SIG, or number) to its init. Errors: failed_precondition (not running), invalid_argument."""

    container: str
    signal: str = "KILL"


class WaitContainer(Message, frozen=True, kw_only=True):
    """``condition``: not-running (now or when it stops), next-exit, removed."""

    container: str
    condition: str = "not-running"


class RemoveContainer(Message, frozen=True, kw_only=True):
    """Errors: not_found, conflict (running, unless ``force``). ``volumes``: its anonymous volumes too."""

    container: str
    force: bool = False
    volumes: bool = False


class RenameContainer(Message, frozen=True, kw_only=True):
    """Errors: not_found, already_exists (the name is taken), invalid_argument (not a name)."""

    container: str
    name: str


class ListContainers(Message, frozen=True, kw_only=True):
    """``filters`` as Docker's: id, name, label, status, ancestor, exited, volume, network, publish, expose, before, since,
    health (starting, healthy, unhealthy, none)."""

    all: bool = False
    limit: int = 0
    size: bool = False
    filters: dict[str, list[str]] = {}


class ContainerSummary(Message, frozen=True, kw_only=True):
    """A row of ``ps``. ``status`` is Docker's text ("Up 3 minutes (healthy)"), made at the time of the reply. ``health`` is starting,
    healthy, unhealthy, or empty for one without a health check."""

    id: str
    name: str
    image: str
    image_id: str
    command: str
    created_ns: int
    state: str
    status: str
    ports: list[PortMapping] = []
    exposed_ports: list[str] = []
    labels: dict[str, str] = {}
    mounts: list[str] = []
    networks: list[str] = []
    size_rw_bytes: int = -1
    size_root_bytes: int = -1
    health: str = ""


class ContainerList(Message, frozen=True, kw_only=True):
    containers: list[ContainerSummary] = []


class ExecContainer(Message, frozen=True, kw_only=True):
    """Run another process in a running container. Streams one ``RunProgress`` (started), then the exit status (at once if ``detach``).

    Descriptors of the request without ``tty``: the process's own stdin, stdout, stderr, in that order, as ``stdin``, ``stdout``,
    ``stderr`` say which are given (the others are /dev/null). With ``tty``: none; the started item carries the pty master.
    Errors: not_found, failed_precondition (not running, paused; details ``exit_code`` 126/127 if it can't be executed).
    """

    container: str
    args: list[str]
    env: list[str] = []
    user: str = ""
    working_dir: str = ""
    tty: bool = False
    detach: bool = False
    privileged: bool = False
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    rows: int = 0
    columns: int = 0


class AttachContainer(Message, frozen=True, kw_only=True):
    """Attach to a running container: streams one ``RunProgress`` (started) with its input, the result is its exit status.

    Errors: not_found, failed_precondition (not running).
    """

    container: str
    attach: AttachOptions


class DetachClient(Message, frozen=True, kw_only=True):
    """Say that somebody who was attached (to ``exec_id``, if given) leaves on purpose, by the detach keys: it becomes an event.

    Whoever only goes away isn't heard of, as with Docker. Errors: not_found (container, exec), failed_precondition (not running).
    """

    container: str
    exec_id: str = ""


class ResizeContainer(Message, frozen=True, kw_only=True):
    """Give a running container's terminal another size. Idempotent but for its event.

    Errors: not_found, failed_precondition (not running, no terminal), invalid_argument (a size that isn't 1 to 65535).
    """

    container: str
    rows: int
    columns: int


class UpdateContainer(Message, frozen=True, kw_only=True):
    """Change a container's limits, running or not: those of ``resources`` that aren't 0 or empty; -1 lifts a limit on swap, the CPU quota
    or processes. ``oom_score_adj`` can't be changed.

    Either all are changed or none. Errors: not_found, invalid_argument (as of create; with what is set already: a memory limit above that
    of memory and swap, CPUs beside a quota or period), failed_precondition (being removed), internal (the kernel refuses).
    """

    container: str
    resources: Resources


class StatPath(Message, frozen=True, kw_only=True):
    """What's at a path of a container, running or not. A link at its end is told, not followed, unless "/" or "/." follow.

    Paths begin at the container's root, with or without a slash. Links lead nowhere outside of it. What's seen is the container's root
    with its volumes and binds, but not what was mounted inside meanwhile (tmpfs, /proc), as with Docker.
    Errors: not_found (container, path), failed_precondition (it was started or removed meanwhile, being removed).
    """

    container: str
    path: str


class PathStat(Message, frozen=True, kw_only=True):
    """``mode`` is st_mode of inode(7), with the type; ``link_target`` of a link."""

    name: str
    mode: int
    size_bytes: int = 0
    mtime_ns: int = 0
    link_target: str = ""


class CopyFrom(Message, frozen=True, kw_only=True):
    """Write what's at ``path`` as a tar to descriptor 0 of the request (a pipe's write end or a file), then close it. A directory comes
    with what's below, its entries beginning with its name; with "." if the path ends in "/.". Returns when all is written.

    Errors: as of stat, unavailable (the reader went away). One copy or export of a container goes on at a time.
    """

    container: str
    path: str


class CopyTo(Message, frozen=True, kw_only=True):
    """Unpack the tar (plain, gzip, bzip2, xz) that descriptor 0 of the request gives into the directory ``path``.

    What's there is replaced, but never a directory by something else or the other way round. Files become root's, unless ``keep_owner``.
    Errors: as of stat, invalid_argument (no directory, no tar, such a replacement), failed_precondition (read-only), resource_exhausted.
    What was unpacked before an error stays.
    """

    container: str
    path: str
    keep_owner: bool = False


class CopiedTo(Message, frozen=True, kw_only=True):
    """``size_bytes`` of the files unpacked."""

    size_bytes: int = 0


class ExportContainer(Message, frozen=True, kw_only=True):
    """Write a container's root file system, without volumes and binds, as a tar to descriptor 0 of the request, then close it.

    Errors: as of copy_from.
    """

    container: str


class CommitContainer(Message, frozen=True, kw_only=True):
    """Make an image of what a container, running or not, changed over its own image, without volumes and binds; named ``reference`` if
    given. Its config is the container's, with ``changes`` applied (Dockerfile instructions, see imaged's import).

    ``pause``: a running container stands still while it's read. One commit of a container goes on at a time. A commit that fails or is
    cancelled leaves no image, and a container that goes on.
    Errors: not_found, failed_precondition (being removed), and those of imaged's commit.
    """

    container: str
    reference: str = ""
    author: str = ""
    message: str = ""
    changes: list[str] = []
    pause: bool = True


class DiffContainer(Message, frozen=True, kw_only=True):
    """Write what a container changed over its image to descriptor 0 of the request (a pipe's write end or a file), then close it: for
    each change its kind (A, C, D), a space, the path and a zero byte, as imaged's diff says. Names only, never contents.

    Errors: not_found, failed_precondition (being removed), unavailable (the reader went away, or takes nothing for a minute).
    """

    container: str


class TopContainer(Message, frozen=True, kw_only=True):
    """The processes of a running container, as the host's ps shows them with ``ps_args`` (none: -ef, as Docker).

    Errors: not_found, failed_precondition (not running, no ps on the host), invalid_argument (ps refuses the options, or they leave no
    PID column), permission_denied (a monitor gave options: some of ps's show environments).
    """

    container: str
    ps_args: list[str] = []


class ProcessTable(Message, frozen=True, kw_only=True):
    """ps's columns and, in its order, the container's lines; each has a field for each title."""

    titles: list[str] = []
    processes: list[list[str]] = []


class SystemInfo(Message, frozen=True, kw_only=True):
    """``runtimes``: name → path; ``runtime_reason`` says why ``default_runtime`` was chosen."""

    containers: int = 0
    containers_running: int = 0
    containers_paused: int = 0
    containers_stopped: int = 0
    runtimes: dict[str, str] = {}
    default_runtime: str = ""
    runtime_version: str = ""
    runtime_reason: str = ""
    cgroup_version: str = ""
    cgroup_driver: str = ""
    kernel_version: str = ""
    operating_system: str = ""
    architecture: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    hostname: str = ""
    root_dir: str = ""
    warnings: list[str] = []


CREATE = Method("containerd.create", CreateContainer, CreatedContainer, item=RunProgress)
RUN = Method("containerd.run", RunContainer, ExitStatus, item=RunProgress)
START = Method("containerd.start", StartContainer, ExitStatus, item=RunProgress)
STOP = Method("containerd.stop", StopContainer, Empty, idempotent=True)
RESTART = Method("containerd.restart", StopContainer, Empty)
KILL = Method("containerd.kill", KillContainer, Empty)
PAUSE = Method("containerd.pause", ContainerRef, Empty)
UNPAUSE = Method("containerd.unpause", ContainerRef, Empty)
WAIT = Method("containerd.wait", WaitContainer, ExitStatus, idempotent=True, read_only=True)
REMOVE = Method("containerd.remove", RemoveContainer, Empty)
RENAME = Method("containerd.rename", RenameContainer, Empty)
LIST = Method("containerd.list", ListContainers, ContainerList, idempotent=True, read_only=True)
INSPECT = Method("containerd.inspect", ContainerRef, Document, idempotent=True, read_only=True)
EXEC = Method("containerd.exec", ExecContainer, ExitStatus, item=RunProgress)
ATTACH = Method("containerd.attach", AttachContainer, ExitStatus, item=RunProgress)
DETACH = Method("containerd.detach", DetachClient, Empty)
RESIZE = Method("containerd.resize", ResizeContainer, Empty, idempotent=True)
UPDATE = Method("containerd.update", UpdateContainer, Empty)
STAT = Method("containerd.stat", StatPath, PathStat, idempotent=True)
COPY_FROM = Method("containerd.copy_from", CopyFrom, Empty)
COPY_TO = Method("containerd.copy_to", CopyTo, CopiedTo)
EXPORT = Method("containerd.export", ExportContainer, Empty)
COMMIT = Method("containerd.commit", CommitContainer, ImageID)
DIFF = Method("containerd.diff", DiffContainer, Empty)
TOP = Method("containerd.top", TopContainer, ProcessTable, idempotent=True, read_only=True)
INFO = Method("containerd.info", Empty, SystemInfo, idempotent=True, read_only=True)


class ContainerEvent(Event, frozen=True, kw_only=True):
    """``id`` is the container's; attributes as Docker's: image, name, every label. Never its environment.

    What ``list`` and ``inspect`` answer changes with the event that tells of it, at the same moment. After a kill of the service an
    event may come once more (create, start, pause, unpause, destroy) if it wasn't sure that it had been told.
    """


class ContainerCreated(ContainerEvent, frozen=True, kw_only=True):
    topic: ClassVar[str] = "container.create"


class ContainerStarted(ContainerEvent, frozen=True, kw_only=True):
    topic: ClassVar[str] = "container.start"


class ContainerDied(ContainerEvent, frozen=True, kw_only=True):
    """Attributes also: exitCode, execDuration (whole seconds), as Docker's; ``signal`` if one ended it.

    What it held (ports, volumes) may be given back a moment later; whoever waits for its exit is answered only then.
    """

    topic: ClassVar[str] = "container.die"

    exit_code: int = 0
    signal: int = 0
    oom_killed: bool = False
    run_time_ns: int = 0


class ContainerOutOfMemory(ContainerEvent, frozen=True, kw_only=True):
    """The kernel's OOM killer has ended a process of it, which needn't be its first: it may go on. ``kills``: how many since the last
    such event."""

    topic: ClassVar[str] = "container.oom"

    kills: int = 1


class ContainerKilled(ContainerEvent, frozen=True, kw_only=True):
    """A signal was sent, whatever the container does with it. Attributes also: signal (its number)."""

    topic: ClassVar[str] = "container.kill"


class ContainerStopped(ContainerEvent, frozen=True, kw_only=True):
    """A stop that was asked for is done; after its die."""

    topic: ClassVar[str] = "container.stop"


class ContainerRestarted(ContainerEvent, frozen=True, kw_only=True):
    """A restart that was asked for is done; after its start."""

    topic: ClassVar[str] = "container.restart"


class ContainerPaused(ContainerEvent, frozen=True, kw_only=True):
    topic: ClassVar[str] = "container.pause"


class ContainerUnpaused(ContainerEvent, frozen=True, kw_only=True):
    topic: ClassVar[str] = "container.unpause"


class ContainerRenamed(ContainerEvent, frozen=True, kw_only=True):
    """Attributes also: oldName, with its slash as Docker's ("/web")."""

    topic: ClassVar[str] = "container.rename"


class ContainerResized(ContainerEvent, frozen=True, kw_only=True):
    """Attributes also: height, width, of the terminal in characters."""

    topic: ClassVar[str] = "container.resize"


class ContainerAttached(ContainerEvent, frozen=True, kw_only=True):
    topic: ClassVar[str] = "container.attach"


class ContainerDetached(ContainerEvent, frozen=True, kw_only=True):
    """Somebody attached left by the detach keys."""

    topic: ClassVar[str] = "container.detach"


class ContainerUpdated(ContainerEvent, frozen=True, kw_only=True):
    """``resources`` are its limits from now on, all of them."""

    topic: ClassVar[str] = "container.update"

    resources: Resources = Resources()


class ContainerCopied(ContainerEvent, frozen=True, kw_only=True):
    """A copy is done. Attributes also: path (in the container), direction ("from" it or "to" it)."""

    topic: ClassVar[str] = "container.copy"


class ContainerExported(ContainerEvent, frozen=True, kw_only=True):
    """An export is done."""

    topic: ClassVar[str] = "container.export"


class ContainerCommitted(ContainerEvent, frozen=True, kw_only=True):
    """An image was made of it. Attributes also: comment, imageID, imageRef (its name, or empty), as Docker's."""

    topic: ClassVar[str] = "container.commit"


class ContainerTopped(ContainerEvent, frozen=True, kw_only=True):
    """Somebody asked for its processes."""

    topic: ClassVar[str] = "container.top"


class ContainerHealthChanged(ContainerEvent, frozen=True, kw_only=True):
    """Its health has another status: starting (with each start), healthy or unhealthy. Nothing is told of a check that changes nothing;
    that one which has ended isn't healthy goes without saying.

    Attributes also: health_status, the same. ``failing_streak``: how many checks have failed one after the other.
    """

    topic: ClassVar[str] = "container.health_status"

    status: str
    failing_streak: int = 0


class ContainerDestroyed(ContainerEvent, frozen=True, kw_only=True):
    """It's gone, name, ports, image and volumes are free. Without attributes for what a kill of the service left half-made."""

    topic: ClassVar[str] = "container.destroy"


class ExecEvent(ContainerEvent, frozen=True, kw_only=True):
    """Attributes also: execID; and healthcheck ("true") if it is a health check and nobody's exec: a filter on the label
    ``healthcheck`` tells them apart (``label!`` leaves them out)."""

    exec_id: str = ""


class ExecCreated(ExecEvent, frozen=True, kw_only=True):
    """Attributes also: command (arguments joined by spaces; Docker's action is "exec_create: <command>")."""

    topic: ClassVar[str] = "container.exec.create"


class ExecStarted(ExecEvent, frozen=True, kw_only=True):
    """Attributes also: command."""

    topic: ClassVar[str] = "container.exec.start"


class ExecDetached(ExecEvent, frozen=True, kw_only=True):
    topic: ClassVar[str] = "container.exec.detach"


class ExecDied(ExecEvent, frozen=True, kw_only=True):
    """Attributes also: exitCode. Follows each exec.create: of one that couldn't be started with 126 and 127, without an exec.start."""

    topic: ClassVar[str] = "container.exec.die"

    exit_code: int = 0


METHODS = (
    CREATE, RUN, START, STOP, RESTART, KILL, PAUSE, UNPAUSE, WAIT, REMOVE, RENAME, LIST, INSPECT, EXEC, ATTACH, DETACH, RESIZE,
    UPDATE, STAT, COPY_FROM, COPY_TO, EXPORT, COMMIT, DIFF, TOP, INFO,
)  # fmt: skip
EVENTS = (
    ContainerCreated,
    ContainerStarted,
    ContainerDied,
    ContainerOutOfMemory,
    ContainerKilled,
    ContainerStopped,
    ContainerRestarted,
    ContainerPaused,
    ContainerUnpaused,
    ContainerRenamed,
    ContainerResized,
    ContainerAttached,
    ContainerDetached,
    ContainerUpdated,
    ContainerCopied,
    ContainerExported,
    ContainerCommitted,
    ContainerTopped,
    ContainerHealthChanged,
    ContainerDestroyed,
    ExecCreated,
    ExecStarted,
    ExecDetached,
    ExecDied,
)

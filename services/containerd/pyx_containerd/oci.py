"""The OCI runtime configuration of a container (runtime-spec 1.0, config.md and config-linux.md). Pure.

Defaults are Docker's: capabilities, masked and read-only paths, mounts, device rules. File names inside the bundle are absolute,
since the runtime resolves mount sources against its own directory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pyx_bus.contract.containerd import ContainerSpec, Resources
from pyx_bus.contract.volumed import MountPoint

from .model import Container
from .plan import capabilities, merge_env
from .users import Identity

DEFAULT_SHM_BYTES = 64 << 20
MASKED_PATHS = [
    "/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
    "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
]  # fmt: skip
READONLY_PATHS = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_DEFAULT_DEVICES = [  # may be used: null, zero, full, random, urandom, tty, console, ptmx, pts/*; nodes may be made
    ("c", None, None, "m"), ("b", None, None, "m"), ("c", 1, 3, "rwm"), ("c", 1, 5, "rwm"), ("c", 1, 7, "rwm"), ("c", 1, 8, "rwm"),
    ("c", 1, 9, "rwm"), ("c", 5, 0, "rwm"), ("c", 5, 1, "rwm"), ("c", 5, 2, "rwm"), ("c", 136, None, "rwm"),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Device:
    """A device node to make: as on the host, at ``path`` in the container."""

    path: str
    type: str
    major: int
    minor: int
    mode: int
    uid: int = 0
    gid: int = 0
    access: str = "rwm"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the host gives: paths, namespaces to join ("" = a new one, None = the host's), devices, the size of a terminal."""

    rootfs: str
    hostname_file: str = ""
    hosts_file: str = ""
    resolv_file: str = ""
    netns: str | None = ""
    pid_namespace: str | None = ""
    ipc_namespace: str | None = ""
    uts_namespace: str | None = ""
    cgroup_namespace: bool = False
    swap_accounting: bool = True
    capability_bound: int = -1
    shared_memory: str = ""
    devices: list[Device] = field(default_factory=list)
    init_binary: str = ""
    rows: int = 0
    columns: int = 0


def config(container: Container, identity: Identity, around: Surroundings) -> dict[str, object]:
    """The whole config.json."""
    spec = container.spec
    document: dict[str, object] = {
        "ociVersion": "1.0.2",
        "process": process(container, identity, around),
        "root": {"path": around.rootfs, "readonly": spec.read_only_rootfs},
        "mounts": _mounts(container, around),
        "linux": _linux(container, around),
    }
    if around.uts_namespace == "":
        document["hostname"] = container.hostname
    if spec.annotations:
        document["annotations"] = spec.annotations
    return document


def process(container: Container, identity: Identity, around: Surroundings) -> dict[str, object]:
    spec = container.spec
    allowed = capabilities(spec.cap_add, spec.cap_drop, privileged=spec.privileged, bound=around.capability_bound)
    args = list(container.process.args)
    if around.init_binary:
        args = ["/sbin/docker-init", "--", *args]
    return _process(
        args=args,
        env=container.process.env,
        working_dir=container.process.working_dir,
        identity=identity,
        allowed=allowed,
        tty=spec.tty,
        no_new_privileges=spec.no_new_privileges,
        oom_score_adj=spec.resources.oom_score_adj,
        rlimits=_rlimits(spec),
        size=(around.rows, around.columns),
    )


def exec_process(
    container: Container,
    identity: Identity,
    *,
    args: list[str],
    env: list[str],
    working_dir: str,
    tty: bool,
    privileged: bool,
    size: tuple[int, int],
    capability_bound: int = -1,
) -> dict[str, object]:
    """The process of an exec: the container's environment and limits with the request's own on top."""
    spec = container.spec
    terminal = ["TERM=xterm"] if tty else []
    return _process(
        args=args,
        env=merge_env(terminal, container.process.env, env),
        working_dir=working_dir or container.process.working_dir,
        identity=identity,
        allowed=capabilities(
            spec.cap_add, spec.cap_drop, privileged=spec.privileged or privileged, bound=capability_bound
        ),
        tty=tty,
        no_new_privileges=spec.no_new_privileges,
        oom_score_adj=spec.resources.oom_score_adj,
        rlimits=_rlimits(spec),
        size=size,
    )


def _process(
    *,
    args: list[str],
    env: list[str],
    working_dir: str,
    identity: Identity,
    allowed: list[str],
    tty: bool,
    no_new_privileges: bool,
    oom_score_adj: int,
    rlimits: list[dict[str, object]],
    size: tuple[int, int],
) -> dict[str, object]:
    # An unprivileged user gets no effective capabilities: only what a set-user-ID program may gain (the bounding set) remains.
    effective = allowed if identity.uid == 0 else []
    document: dict[str, object] = {
        "terminal": tty,
        "user": {"uid": identity.uid, "gid": identity.gid, "additionalGids": identity.groups, "umask": 0o22},
        "args": args,
        "env": merge_env([f"HOME={identity.home}"], env),
        "cwd": working_dir,
        "capabilities": {"bounding": allowed, "effective": effective, "permitted": effective},
        "noNewPrivileges": no_new_privileges,
        "oomScoreAdj": oom_score_adj,
    }
    if rlimits:
        document["rlimits"] = rlimits
    if tty and size != (0, 0):
        document["consoleSize"] = {"height": size[0], "width": size[1]}
    return document


def _rlimits(spec: ContainerSpec) -> list[dict[str, object]]:
    unlimited = (1 << 64) - 1
    return [
        {
            "type": f"RLIMIT_{limit.name.upper()}",
            "soft": unlimited if limit.soft < 0 else limit.soft,
            "hard": unlimited if limit.hard < 0 else limit.hard,
        }
        for limit in spec.ulimits
    ]


def _mounts(container: Container, around: Surroundings) -> list[dict[str, object]]:
    spec = container.spec
    access = "rw" if spec.privileged else "ro"
    mounts: list[dict[str, object]] = [
        _mount("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
        _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        _mount("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", access]),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", [access, "nosuid", "noexec", "nodev"]),
    ]
    mounts.append(_mount("/dev/mqueue", "mqueue", "mqueue", ["nosuid", "noexec", "nodev"]))  # shows the IPC namespace it's in
    if around.ipc_namespace is None:
        mounts.append(_mount("/dev/shm", "bind", "/dev/shm", ["rbind", "nosuid", "noexec", "nodev"]))
    elif around.shared_memory:  # on the host's side, so that a container which joins this one's IPC namespace can have it, too
        mounts.append(_mount("/dev/shm", "bind", around.shared_memory, ["rbind", "nosuid", "noexec", "nodev"]))
    elif around.ipc_namespace == "" and spec.ipc_mode != "none":
        size = spec.shm_size_bytes or DEFAULT_SHM_BYTES
        mounts.append(_mount("/dev/shm", "tmpfs", "shm", ["nosuid", "noexec", "nodev", "mode=1777", f"size={size}"]))
    volumes = container.attached_volumes
    taken = {volume.target for volume in volumes}
    for source, target in (
        (around.resolv_file, "/etc/resolv.conf"),
        (around.hostname_file, "/etc/hostname"),
        (around.hosts_file, "/etc/hosts"),
    ):
        if source and target not in taken:
            mounts.append(_mount(target, "bind", source, ["rbind", "rprivate"]))
    if around.init_binary:
        mounts.append(_mount("/sbin/docker-init", "bind", around.init_binary, ["bind", "ro"]))
    mounts = [mount for mount in mounts if mount["destination"] not in taken]
    # a mount on /a must come before the one on /a/b
    mounts.extend(_volume(volume) for volume in sorted(volumes, key=lambda volume: volume.target.count("/")))
    return mounts


def _mount(target: str, type_: str, source: str, options: list[str]) -> dict[str, object]:
    return {"destination": target, "type": type_, "source": source, "options": options}


def _volume(volume: MountPoint) -> dict[str, object]:
    return _mount(volume.target, volume.type, volume.source, list(volume.options))


def _linux(container: Container, around: Surroundings) -> dict[str, object]:
    spec = container.spec
    document: dict[str, object] = {
        "cgroupsPath": container.cgroup,
        "namespaces": _namespaces(around),
        "resources": _resources(spec, around),
    }
    if around.devices:
        document["devices"] = [
            {
                "path": device.path,
                "type": device.type,
                "major": device.major,
                "minor": device.minor,
                "fileMode": device.mode & 0o7777,
                "uid": device.uid,
                "gid": device.gid,
            }
            for device in around.devices
        ]
    sysctls = dict(spec.sysctls)
    if around.netns is not None and not spec.network.startswith("container:"):
        # any process may bind low ports and ping in its own network: Docker's default since 20.10
        sysctls.setdefault("net.ipv4.ip_unprivileged_port_start", "0")
        sysctls.setdefault("net.ipv4.ping_group_range", "0 2147483647")
    if sysctls:
        document["sysctl"] = sysctls
    if not spec.privileged:
        document["maskedPaths"] = MASKED_PATHS
        document["readonlyPaths"] = READONLY_PATHS
    propagation = {volume.propagation for volume in container.attached_volumes}
    if propagation & {"shared", "rshared"}:
        document["rootfsPropagation"] = "shared"
    elif propagation & {"slave", "rslave"}:
        document["rootfsPropagation"] = "slave"
    return document


def _namespaces(around: Surroundings) -> list[dict[str, str]]:
    namespaces = [{"type": "mount"}]
    for type_, path in (
        ("network", around.netns),
        ("pid", around.pid_namespace),
        ("ipc", around.ipc_namespace),
        ("uts", around.uts_namespace),
    ):
        if path is not None:
            namespaces.append({"type": type_, "path": path} if path else {"type": type_})
    if around.cgroup_namespace:
        namespaces.append({"type": "cgroup"})
    return namespaces


def _resources(spec: ContainerSpec, around: Surroundings) -> dict[str, object]:
    rules: list[dict[str, object]]
    if spec.privileged:
        rules = [{"allow": True, "access": "rwm"}]
    else:
        rules = [{"allow": False, "access": "rwm"}]
        entries = [*_DEFAULT_DEVICES, *((device.type, device.major, device.minor, device.access) for device in around.devices)]
        for type_, major, minor, access in entries:
            rule: dict[str, object] = {"allow": True, "type": type_, "access": access}
            if major is not None:
                rule["major"] = major
            if minor is not None:
                rule["minor"] = minor
            rules.append(rule)
    return {"devices": rules, **limits(spec.resources, swap_accounting=around.swap_accounting)}


def limits(limits: Resources, *, swap_accounting: bool) -> dict[str, object]:
    """What of ``linux.resources`` comes from the limits asked for."""
    document: dict[str, object] = {}
    memory: dict[str, object] = {}
    if limits.memory_bytes:
        memory["limit"] = limits.memory_bytes
        if swap_accounting:  # Docker's default: as much swap again as memory
            memory["swap"] = limits.memory_swap_bytes or 2 * limits.memory_bytes
    if limits.memory_reservation_bytes:
        memory["reservation"] = limits.memory_reservation_bytes
    if memory:
        document["memory"] = memory
    cpu: dict[str, object] = {}
    if limits.nano_cpus:
        cpu["period"] = 100_000
        cpu["quota"] = max(1000, limits.nano_cpus * 100_000 // 10**9)
    if limits.cpu_period_us:
        cpu["period"] = limits.cpu_period_us
    if limits.cpu_quota_us:
        cpu["quota"] = limits.cpu_quota_us
    if limits.cpu_shares:
        cpu["shares"] = limits.cpu_shares
    if limits.cpuset_cpus:
        cpu["cpus"] = limits.cpuset_cpus
    if limits.cpuset_mems:
        cpu["mems"] = limits.cpuset_mems
    if cpu:
        document["cpu"] = cpu
    if limits.pids_limit > 0:
        document["pids"] = {"limit": limits.pids_limit}
    return document

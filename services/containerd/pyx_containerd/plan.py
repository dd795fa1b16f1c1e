"""What a request comes to: the spec checked and merged with the image's config. Pure; errors are ``InvalidArgument``."""

from __future__ import annotations

import re

import msgspec

from pyx_bus.contract.containerd import ContainerSpec, Resources
from pyx_bus.contract.imaged import ImageConfig
from pyx_bus.contract.netd import PortMapping
from pyx_bus.contract.volumed import MountRequest
from pyx_bus.errors import InvalidArgument

from . import health
from .model import Process

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MIN_MEMORY_BYTES = 6 << 20  # below it, the runtime's own start doesn't fit: Docker's limit
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_PORT = re.compile(r"[0-9]{1,5}")
_HOSTNAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_.-]*[a-zA-Z0-9])?")

_SIGNAL_NAMES = (
    "HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN TTOU URG XCPU XFSZ "
    "VTALRM PROF WINCH IO PWR SYS"
)
SIGNALS = {name: number for number, name in enumerate(_SIGNAL_NAMES.split(), 1)}
SIGNALS |= {"IOT": 6, "CLD": 17, "POLL": 29}
SIGNALS |= {f"RTMIN+{n}": 34 + n for n in range(1, 16)} | {f"RTMAX-{n}": 64 - n for n in range(1, 15)}
SIGNALS |= {"RTMIN": 34, "RTMAX": 64}

_CAPABILITIES_WORDS = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST
    NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE
    SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG
    WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
CAPABILITIES = _CAPABILITIES_WORDS.split()
_DEFAULT_CAPABILITIES_WORDS = """
    CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE
"""
DEFAULT_CAPABILITIES = _DEFAULT_CAPABILITIES_WORDS.split()
_ULIMITS_WORDS = """
    as core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack
"""
ULIMITS = _ULIMITS_WORDS.split()


def parse_signal(text: str) -> int:
    """A signal's number from its number or its name, with or without SIG."""
    if text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= 64:
        return int(text[:4])
    number = SIGNALS.get(text.upper().removeprefix("SIG"), 0)
    if not number:
        raise InvalidArgument(f'invalid signal: "{text}"')
    return number


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f'invalid container name "{name}": only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, and at least two characters'
        )


def check(spec: ContainerSpec, cpus: int) -> None:
    """Everything about a spec that can be judged without the image. ``cpus``: how many the host has."""
    if not spec.image:
        raise InvalidArgument("no image given")
    if spec.name:
        check_name(spec.name)
    if spec.working_dir and not spec.working_dir.startswith("/"):
        raise InvalidArgument(f'the working directory "{spec.working_dir}" is invalid: it must be an absolute path')
    if spec.hostname and (len(spec.hostname) > 63 or not _HOSTNAME.fullmatch(spec.hostname)):
        raise InvalidArgument(f'invalid hostname: "{spec.hostname}"')
    if spec.stop_signal:
        parse_signal(spec.stop_signal)
    for entry in spec.env:
        if not entry or entry.startswith("=") or "\0" in entry:
            raise InvalidArgument(f'invalid environment variable: "{entry}"')
    for limit in spec.ulimits:
        if limit.name not in ULIMITS:
            raise InvalidArgument(f'invalid ulimit type: "{limit.name}"')
        if limit.hard != -1 and (limit.soft > limit.hard or limit.soft == -1):
            raise InvalidArgument(f'ulimit "{limit.name}": the soft limit {limit.soft} is above the hard limit {limit.hard}')
    for name in [*spec.cap_add, *spec.cap_drop]:
        capability(name)
    for device in spec.devices:
        parse_device(device)
    if spec.pull_policy not in ("always", "missing", "never", ""):
        raise InvalidArgument(f'invalid pull policy: "{spec.pull_policy}" (always, missing or never)')
    if spec.log_driver and not re.fullmatch(r"[a-z0-9][a-z0-9._/:-]*", spec.log_driver):
        raise InvalidArgument(f'invalid log driver: "{spec.log_driver}"')
    for key, value in spec.sysctls.items():
        if not re.fullmatch(r"[A-Za-z0-9_.\-/]+", key) or "\n" in value:
            raise InvalidArgument(f'invalid sysctl: "{key}={value}"')
    if spec.network.partition(":")[0] in ("host", "container") and spec.ports:
        raise InvalidArgument(f'ports can\'t be published with network "{spec.network}"')
    health.check_action(spec.health_action)
    _check_modes(spec)
    check_resources(spec.resources, cpus)


def _check_modes(spec: ContainerSpec) -> None:
    for what, mode, words in (
        ("pid", spec.pid_mode, ("", "private", "host")),
        ("ipc", spec.ipc_mode, ("", "private", "host", "none", "shareable")),
        ("uts", spec.uts_mode, ("", "private", "host")),
    ):
        if mode not in words and not (what != "uts" and mode.startswith("container:") and len(mode) > 10):
            raise InvalidArgument(f'invalid {what} mode: "{mode}"')
    if spec.network == "host" and spec.hostname and spec.uts_mode == "host":
        raise InvalidArgument("the hostname can't be set together with the host's UTS namespace")


def check_resources(resources: Resources, cpus: int) -> None:
    if resources.memory_bytes and resources.memory_bytes < MIN_MEMORY_BYTES:
        raise InvalidArgument(f"the memory limit of {resources.memory_bytes} bytes is too small: at least 6 MiB are needed")
    if resources.memory_swap_bytes > 0 and resources.memory_swap_bytes < resources.memory_bytes:
        raise InvalidArgument("the limit of memory and swap together is below the memory limit")
    if resources.memory_swap_bytes > 0 and not resources.memory_bytes:
        raise InvalidArgument("a limit of memory and swap needs a memory limit, too")
    if 0 < resources.memory_bytes < resources.memory_reservation_bytes:
        raise InvalidArgument("the memory reservation is above the memory limit")
    if resources.nano_cpus and (resources.cpu_quota_us or resources.cpu_period_us):
        raise InvalidArgument("CPUs and a CPU quota or period exclude one another")
    if resources.nano_cpus < 0 or resources.nano_cpus > cpus * 10**9:
        raise InvalidArgument(f"the number of CPUs must be between 0.01 and {cpus}.00: this host has {cpus}")
    if not -1000 <= resources.oom_score_adj <= 1000:
        raise InvalidArgument(f"invalid OOM score adjustment: {resources.oom_score_adj} (-1000 to 1000)")
    for text in (resources.cpuset_cpus, resources.cpuset_mems):
        if text and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
            raise InvalidArgument(f'invalid set of CPUs or memory nodes: "{text}"')


def updated_resources(now: Resources, wanted: Resources, cpus: int) -> Resources:
    """The limits after an update: what isn't 0 or empty in ``wanted`` in place of what there is (Docker's rules)."""
    if wanted.oom_score_adj:
        raise InvalidArgument("the OOM score adjustment of a container can't be changed")
    if wanted.nano_cpus and (now.cpu_period_us or now.cpu_quota_us):
        raise InvalidArgument("CPUs can't be set: a CPU period or quota has been set already")
    if (wanted.cpu_period_us or wanted.cpu_quota_us) and now.nano_cpus:
        raise InvalidArgument("a CPU period or quota can't be set: the number of CPUs has been set already")
    changed = {name: value for name in Resources.__struct_fields__ if (value := getattr(wanted, name))}
    if now.memory_bytes and "memory_bytes" in changed and not wanted.memory_swap_bytes and now.memory_swap_bytes >= 0:
        # Without a word about swap its limit stays what it was, also where that came of the default.
        both = now.memory_swap_bytes or 2 * now.memory_bytes
        if wanted.memory_bytes > both:
            raise InvalidArgument(
                f"the memory limit would be above the limit of memory and swap together, {both} bytes",
                hint="update that at the same time (--memory-swap)",
            )
        changed["memory_swap_bytes"] = both
    result = msgspec.structs.replace(now, **changed)
    check_resources(result, cpus)
    return result


def capability(name: str) -> str:
    """The kernel's name of a capability, or "ALL"."""
    short = name.upper().removeprefix("CAP_")
    if short == "ALL":
        return short
    if short not in CAPABILITIES:
        raise InvalidArgument(f'invalid capability: "{name}"')
    return "CAP_" + short


def capabilities(add: list[str], drop: list[str], *, privileged: bool, bound: int = -1) -> list[str]:
    """What a container's root may: Docker's default set, without ``drop``, with ``add``; ALL means every one.

    ``bound`` is the mask of those there are to give: a host that is itself a container hasn't all of them.
    """
    every = ["CAP_" + name for number, name in enumerate(CAPABILITIES) if bound >> number & 1]
    if privileged:
        return every
    added = {capability(name) for name in add}
    dropped = {capability(name) for name in drop}
    if "ALL" in added:
        chosen = set(every)
    elif "ALL" in dropped:
        chosen = set()
    else:
        chosen = {"CAP_" + name for name in DEFAULT_CAPABILITIES}
    chosen = (chosen - dropped) | (added - {"ALL"})
    return [name for name in every if name in chosen]


def parse_device(text: str) -> tuple[str, str, str]:
    """(path on the host, path in the container, access) of ``--device``: PATH[:PATH][:rwm]."""
    parts = text.split(":")
    source = parts[0]
    target, access = source, "rwm"
    if len(parts) == 2 and parts[1] and set(parts[1]) <= set("rwm"):
        access = parts[1]
    elif len(parts) >= 2:
        target = parts[1]
    if len(parts) == 3:
        access = parts[2]
    good = len(parts) <= 3 and source.startswith("/") and target.startswith("/") and access and set(access) <= set("rwm")
    if not good:
        raise InvalidArgument(f'invalid device: "{text}" (path on the host[:path in the container][:rwm])')
    return source, target, access


def merge_env(*layers: list[str]) -> list[str]:
    """Later entries replace earlier ones of the same name in place; a name without "=" removes it."""
    order: dict[str, str | None] = {}
    for layer in layers:
        for entry in layer:
            name, separator, _ = entry.partition("=")
            order[name] = entry if separator else None
    return [entry for entry in order.values() if entry is not None]


def process(spec: ContainerSpec, image: ImageConfig, hostname: str) -> Process:
    """Entrypoint, command, environment, directory, user and stop signal, as ``docker run`` merges them."""
    if spec.entrypoint is not None:
        entrypoint = [word for word in spec.entrypoint if word] if spec.entrypoint == [""] else list(spec.entrypoint)
        args = entrypoint + (spec.command or [])
    else:
        args = list(image.entrypoint) + list(image.cmd if spec.command is None else spec.command)
    if not args:
        raise InvalidArgument("no command specified", hint="the image has none: give one after its name")
    if any("\0" in argument for argument in args):
        raise InvalidArgument("a command's argument contains a NUL byte")
    base = [f"PATH={DEFAULT_PATH}", f"HOSTNAME={hostname}"] + (["TERM=xterm"] if spec.tty else [])
    return Process(
        args=args,
        env=merge_env(base, image.env, spec.env),
        working_dir=spec.working_dir or image.working_dir or "/",
        user=spec.user or image.user,
        stop_signal=parse_signal(spec.stop_signal or image.stop_signal or "TERM"),
    )


def mounts(spec: ContainerSpec, image: ImageConfig) -> list[MountRequest]:
    """The spec's mounts and an anonymous volume for every VOLUME of the image that has none of them on it."""
    targets = {mount.target.rstrip("/") for mount in spec.mounts}
    anonymous = [MountRequest(type="volume", target=path) for path in image.volumes if path.rstrip("/") not in targets]
    return [*spec.mounts, *anonymous]


def exposed_ports(spec: ContainerSpec, image: ImageConfig) -> list[str]:
    """``port/protocol`` of everything exposed by image, spec or publication, sorted by number."""
    found: set[tuple[int, str]] = set()
    for text in [*image.exposed_ports, *spec.exposed_ports]:
        number, _, protocol = text.partition("/")
        first, _, last = number.partition("-")
        # Bounded before it is counted through: an image's author writes what they like here.
        if not _PORT.fullmatch(first) or not _PORT.fullmatch(last or first) or not 0 < int(first) <= int(last or first) < 1 << 16:
            raise InvalidArgument(f'invalid port to expose: "{text}"')
        found.update((value, protocol or "tcp") for value in range(int(first), int(last or first) + 1))
    found.update((port.container_port, port.protocol) for port in spec.ports)
    return [f"{port}/{protocol}" for port, protocol in sorted(found)]


def ports(spec: ContainerSpec, exposed: list[str]) -> list[PortMapping]:
    """What netd shall publish: the spec's ports, and with publish-all every exposed one on a port of netd's choice."""
    published = list(spec.ports)
    if spec.publish_all_ports:
        taken = {(port.container_port, port.protocol) for port in published}
        for text in exposed:
            number, _, protocol = text.partition("/")
            if (int(number), protocol) not in taken:
                published.append(PortMapping(container_port=int(number), protocol=protocol))
    return published

"""What a container's mount requests come to. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pyx_bus.contract.volumed import MountPoint, MountRequest
from pyx_bus.errors import InvalidArgument

from .model import check_name, check_target, clean_path

PROPAGATIONS = ("private", "rprivate", "shared", "rshared", "slave", "rslave")

_TMPFS_OPPOSITES = [{"rw", "ro"}, {"exec", "noexec"}, {"suid", "nosuid"}, {"dev", "nodev"}, {"sync", "async"},
                    {"atime", "noatime"}, {"diratime", "nodiratime"}, {"relatime", "norelatime"}, {"strictatime", "nostrictatime"}]
_TMPFS_VALUED = {"size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol"}
_TMPFS_DEFAULTS = ["noexec", "nosuid", "nodev", "rw"]


@dataclass(frozen=True, slots=True)
class PlannedMount:
    """A checked request. ``volume`` is the volume's name, empty for a new anonymous one; None: not a volume."""

    request: MountRequest
    target: str
    volume: str | None
    options: list[str]


def plan(requests: list[MountRequest]) -> list[PlannedMount]:
    """Checked, in mounting order as asked. Raises invalid_argument."""
    planned: list[PlannedMount] = []
    targets: set[str] = set()
    for request in requests:
        target = check_target(request.target)
        if target in targets:
            raise InvalidArgument(f'duplicate mount point: "{target}"')
        targets.add(target)
        if request.selinux_label not in ("", "z", "Z"):
            raise InvalidArgument(f'invalid SELinux label option: "{request.selinux_label}"', hint="z or Z")
        if request.type == "volume":
            planned.append(_volume(request, target))
        elif request.type == "bind":
            planned.append(_bind(request, target))
        elif request.type == "tmpfs":
            if request.source:
                raise InvalidArgument(f'a tmpfs mount has no source: "{request.source}"')
            planned.append(PlannedMount(request, target, None, tmpfs_options(request)))
        else:
            raise InvalidArgument(f'mount type unknown: "{request.type}"', hint="bind, volume or tmpfs")
    return planned


def _access(request: MountRequest) -> str:
    return "ro" if request.read_only else "rw"


def _volume(request: MountRequest, target: str) -> PlannedMount:
    if request.source:
        check_name(request.source)
    if request.propagation:
        raise InvalidArgument(f'propagation "{request.propagation}" is for bind mounts only')
    return PlannedMount(request, target, request.source, ["rbind", "rprivate", _access(request)])


def _bind(request: MountRequest, target: str) -> PlannedMount:
    if not request.source.startswith("/") or "\0" in request.source:
        raise InvalidArgument(f'invalid bind source: "{request.source}": it must be an absolute path')
    propagation = request.propagation or "rprivate"
    if propagation not in PROPAGATIONS:
        raise InvalidArgument(f'invalid propagation: "{propagation}"', hint="one of " + ", ".join(PROPAGATIONS))
    if request.driver or request.driver_options:
        raise InvalidArgument(f'a bind mount has no volume driver: "{request.source}"')
    return PlannedMount(request, target, None, ["rbind", propagation, _access(request)])


def tmpfs_options(request: MountRequest) -> list[str]:
    """Docker's defaults (noexec, nosuid, nodev), then what was asked for, the later winning over its opposite."""
    options = list(_TMPFS_DEFAULTS)
    if request.read_only:
        _merge(options, "ro")
    if request.tmpfs_size_bytes < 0 or not 0 <= request.tmpfs_mode <= 0o7777:
        raise InvalidArgument(f"invalid tmpfs size {request.tmpfs_size_bytes} or mode {request.tmpfs_mode:o}")
    if request.tmpfs_size_bytes:
        options.append(f"size={request.tmpfs_size_bytes}")
    options.append(f"mode={request.tmpfs_mode:o}")
    for option in request.tmpfs_options:
        _merge(options, option)
    return options


def _merge(options: list[str], option: str) -> None:
    key, equals, value = option.partition("=")
    if equals:
        if key not in _TMPFS_VALUED or not value or "," in value:
            raise InvalidArgument(f'invalid tmpfs option: "{option}"')
        options[:] = [known for known in options if not known.startswith(key + "=")]
    else:
        opposites = next((pair for pair in _TMPFS_OPPOSITES if key in pair), None)
        if opposites is None:
            raise InvalidArgument(f'invalid tmpfs option: "{option}"')
        options[:] = [known for known in options if known not in opposites]
    options.append(option)


def mount_point(planned: PlannedMount, *, source: str, name: str = "", driver: str = "") -> MountPoint:
    """The answer's form of a planned mount whose source is known."""
    request = planned.request
    tmpfs = request.type == "tmpfs"
    return MountPoint(
        type="tmpfs" if tmpfs else "bind",
        source="tmpfs" if tmpfs else source,
        target=planned.target,
        options=planned.options,
        kind=request.type,
        name=name,
        driver=driver,
        read_only="ro" in planned.options,
        propagation=planned.options[1] if request.type == "bind" else "",
    )


def bind_source(request: MountRequest) -> str:
    """The host's path, cleaned."""
    return clean_path(request.source)

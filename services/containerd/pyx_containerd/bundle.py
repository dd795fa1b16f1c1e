"""A container's bundle on disk: ``<run>/bundles/<id>`` with the mounted root, config.json, and the files bound over /etc.

Everything in it is made anew at each start and belongs to one run. All of this is short file work, called inline.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from pathlib import Path

from pyx_bus.contract.containerd import ContainerSpec
from pyx_bus.contract.netd import Sandbox

from . import kernel, users
from .errors import KernelError
from .model import Container
from .oci import Device
from .plan import parse_device

INIT_BINARIES = (
    "/usr/bin/docker-init", "/usr/libexec/docker/docker-init", "/usr/bin/tini-static", "/usr/bin/tini", "/sbin/tini", "/usr/bin/catatonit",
)  # fmt: skip


def make(bundle: Path) -> Path:
    """The empty bundle; its root file system's mount point."""
    rootfs = bundle / "rootfs"
    rootfs.mkdir(mode=0o755, parents=True, exist_ok=True)
    bundle.chmod(0o700)
    return rootfs


def mount_root(container: Container, bundle: Path) -> Path:
    """Mount the snapshot as imaged described it. Errors: ``KernelError``; nothing stays mounted then."""
    rootfs = make(bundle)
    try:
        for mount in container.rootfs_mounts:
            kernel.mount(mount.type, mount.source, str(rootfs), mount.options)
    except KernelError:
        kernel.unmount(str(rootfs))
        raise
    return rootfs


def mount_shared_memory(bundle: Path, size_bytes: int) -> str:
    """A tmpfs for /dev/shm that lives on the host's side; its path."""
    place = bundle / "shm"
    place.mkdir(mode=0o1777, exist_ok=True)
    kernel.mount("tmpfs", "shm", str(place), ["nosuid", "nodev", "noexec", "mode=1777", f"size={size_bytes}"])
    return str(place)


def remove(bundle: Path) -> None:
    """Unmount and delete. Never deletes through a mount: what can't be unmounted is left and raises ``KernelError``."""
    if not bundle.exists():
        return
    kernel.unmount(str(bundle / "rootfs"))
    for point in kernel.mounts_under(str(bundle)):
        kernel.unmount(point)
    try:
        (bundle / "rootfs").rmdir()  # fails on anything but an empty directory: a mount that's still there is safe
    except FileNotFoundError:
        pass
    except OSError as error:
        raise KernelError(error.errno or 0, "rmdir", str(bundle / "rootfs")) from None
    shutil.rmtree(bundle)


def write(bundle: Path, name: str, data: bytes | str) -> str:
    """A file in the bundle, replaced if it was there. Its path. Not synced: it belongs to a run, not to the container."""
    path = bundle / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def write_config(bundle: Path, name: str, document: dict[str, object]) -> None:
    write(bundle, name, json.dumps(document, separators=(",", ":")))


def write_network_files(container: Container, sandbox: Sandbox, bundle: Path) -> tuple[str, str, str]:
    """hostname, hosts and resolv.conf; their paths."""
    hostname_file = write(bundle, "hostname", container.hostname + "\n")
    hosts_file = write(bundle, "hosts", hosts(container, sandbox, _read("/etc/hosts")))
    resolv_file = write(bundle, "resolv.conf", resolv_conf(container.spec, sandbox))
    for path in (hostname_file, hosts_file, resolv_file):
        os.chmod(path, 0o644)
    return hostname_file, hosts_file, resolv_file


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


_HOSTS = """127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""


def hosts(container: Container, sandbox: Sandbox, host_file: str) -> str:
    """/etc/hosts as Docker writes it; in the host's network the host's own, plus the extra ones."""
    spec = container.spec
    text = host_file if spec.network == "host" else _HOSTS
    if text and not text.endswith("\n"):
        text += "\n"
    gateway = next((endpoint.gateway for endpoint in sandbox.endpoints if endpoint.gateway), "127.0.0.1")
    for entry in spec.extra_hosts:
        name, _, address = entry.partition(":") if "=" not in entry else entry.partition("=")
        text += f"{gateway if address == 'host-gateway' else address.strip('[]')}\t{name}\n"
    full = f"{container.hostname}.{spec.domainname} {container.hostname}" if spec.domainname else container.hostname
    for endpoint in sandbox.endpoints:
        if endpoint.ipv4_address:
            text += f"{endpoint.ipv4_address}\t{full}\n"
    return text


def resolv_conf(spec: ContainerSpec, sandbox: Sandbox) -> str:
    lines = [f"nameserver {server}" for server in (spec.dns or sandbox.nameservers)]
    search = [name for name in (spec.dns_search or sandbox.search) if name != "."]
    if search:
        lines.append("search " + " ".join(search))
    options = spec.dns_options or sandbox.resolv_options
    if options:
        lines.append("options " + " ".join(options))
    return "".join(line + "\n" for line in lines)


def identity(root: int, user: str, group_add: list[str]) -> users.Identity:
    """Who ``user`` is in the root ``root`` (a directory descriptor). Errors: InvalidArgument."""
    passwd = kernel.read_in_root(root, "/etc/passwd")
    group = kernel.read_in_root(root, "/etc/group")
    return users.resolve(user, group_add, passwd, group)


def devices(spec: ContainerSpec) -> list[Device]:
    """The devices a spec asks for; with ``privileged`` all of the host's."""
    found: dict[str, Device] = {}
    if spec.privileged:
        for directory, names, files in os.walk("/dev"):
            # what the runtime mounts itself, and other instances' terminals
            names[:] = [name for name in names if os.path.join(directory, name) not in ("/dev/pts", "/dev/shm", "/dev/mqueue")]
            for name in files:
                path = os.path.join(directory, name)
                device = _device(path, path, "rwm")
                if device is not None and path != "/dev/console":
                    found[path] = device
    for text in spec.devices:
        source, target, access = parse_device(text)
        if os.path.isdir(source):
            for directory, _, files in os.walk(source):
                for name in files:
                    path = os.path.join(directory, name)
                    device = _device(path, target + path.removeprefix(source), access)
                    if device is not None:
                        found[device.path] = device
            continue
        device = _device(os.path.realpath(source), target, access)
        if device is None:
            raise KernelError(errno.ENODEV if os.path.exists(source) else errno.ENOENT, "device", source)
        found[target] = device
    return list(found.values())


def _device(source: str, target: str, access: str) -> Device | None:
    try:
        status = os.lstat(source)
    except OSError:
        return None
    kind = {0o020000: "c", 0o060000: "b"}.get(status.st_mode & 0o170000)
    if kind is None:
        return None
    number = status.st_rdev
    return Device(target, kind, os.major(number), os.minor(number), status.st_mode & 0o7777, status.st_uid, status.st_gid, access)


def init_binary() -> str:
    """An init for ``--init`` on this host, "" if there's none."""
    return next((path for path in INIT_BINARIES if os.access(path, os.X_OK)), "")


def host_name() -> str:
    return socket.gethostname()


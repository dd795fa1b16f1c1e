"""The machine's disk, kernel and initial RAM disk: Debian 12 with systemd, made of Debian's packages.

Costs a minute, once: the results are kept under ``PYX_TEST_CACHE`` by a hash of everything that goes in, this file included. Nothing of
pyx is in here (that is ``payload.py``), so a change of pyx doesn't make it anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.images import cache_directory, run_quiet

SUITE = "bookworm"
PACKAGES = [
    "systemd", "systemd-sysv", "dbus", "udev", "python3", "iproute2", "nftables", "crun", "runc", "busybox-static", "kmod", "procps",
    "ca-certificates",
]  # fmt: skip
DISK_BYTES = 2 << 30  # sparse
# The rest of the kernel's modules (sound, graphics, wireless, …) is 250 MB that no virtual machine of ours has hardware for.
MODULES = ["arch", "crypto", "fs", "lib", "net", "drivers/block", "drivers/virtio", "drivers/char", "drivers/net/*.ko"]
INITRD_MODULES = ["virtio_pci", "virtio_blk", "ext4"]

# Type=exec: with a oneshot the system would be "starting" for as long as it runs.
RUNNER_UNIT = """\
[Unit]
Description=Run what the host asks for
After=multi-user.target

[Service]
Type=exec
ExecStart=/usr/local/sbin/run-for-host

[Install]
WantedBy=graphical.target
"""
RUNNER = """\
#!/bin/sh
mkdir -p /host
modprobe 9pnet_virtio
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 host /host
mount -o ro /dev/vdb /opt
sh /host/run >/host/output 2>&1
echo $? >/host/status
sync
systemctl poweroff
"""
INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$module; done
tries=0
while ! [ -b /dev/vda ] && [ $tries -lt 100 ]; do /bin/busybox usleep 100000; tries=$((tries + 1)); done
/bin/busybox mount -t ext4 -o rw /dev/vda /root || exec /bin/busybox poweroff -f
/bin/busybox mount --move /dev /root/dev
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /sbin/init
"""
MASKED = ["getty@tty1.service", "serial-getty@ttyS0.service", "console-getty.service", "apt-daily.timer", "apt-daily-upgrade.timer"]


@dataclass(frozen=True)
class Image:
    """What a machine starts from; the files are shared and never written to."""

    kernel: Path
    initrd: Path
    disk: Path


def image() -> Image:
    """Make it, or take what an earlier call made. Safe to call from several processes: they wait for the one that makes it."""
    package = kernel_package()
    key = hashlib.sha256((package + Path(__file__).read_text()).encode()).hexdigest()[:16]
    target = cache_directory() / f"host-{key}"
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(prefix="making-host-", dir=cache_directory()) as scratch:
                _make(package, Path(scratch))
                (Path(scratch) / "image").rename(target)
            for old in cache_directory().glob("host-*"):
                if old.is_dir() and old != target and not old.name.startswith("host-payload"):
                    shutil.rmtree(old, ignore_errors=True)
    return Image(target / "vmlinuz", target / "initrd", target / "disk.ext4")


def kernel_package() -> str:
    """Debian's current kernel package; not the cloud flavour, which has no 9p."""
    for line in run_quiet("apt-cache", "depends", "linux-image-amd64").splitlines():
        word, _, name = line.strip().partition(": ")
        if word == "Depends":
            return name
    raise RuntimeError("apt knows no linux-image-amd64: is this Debian, and was apt-get update run?")


def _make(package: str, scratch: Path) -> None:
    result = scratch / "image"
    result.mkdir()
    root = scratch / "root"
    root.mkdir()
    _bootstrap(scratch, root)
    kernel = scratch / "kernel"
    # Unpacked, not installed: installing it would run this host's hooks.
    run_quiet("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package, cwd=scratch)
    (deb,) = scratch.glob("linux-image-*.deb")
    run_quiet("dpkg", "-x", deb, kernel)
    (boot,) = (kernel / "boot").glob("vmlinuz-*")
    version = boot.name.removeprefix("vmlinuz-")
    shutil.copyfile(boot, result / "vmlinuz")
    _modules(kernel, root, version)
    _initrd(root, version, scratch / "initrd", result / "initrd")
    _configure(root)
    disk = result / "disk.ext4"
    with open(disk, "wb") as file:
        file.truncate(DISK_BYTES)
    run_quiet("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", root, disk)


def _bootstrap(scratch: Path, root: Path) -> None:
    tar = scratch / "root.tar"
    run_quiet(
        "mmdebstrap", "--variant=minbase", "--mode=root", "--quiet", "--include=" + ",".join(PACKAGES),
        # nothing of where the packages came from stays: that may be a mirror of this site's
        "--customize-hook=rm -rf $1/etc/apt/sources.list $1/etc/apt/sources.list.d $1/etc/apt/apt.conf.d/*proxy*",
        SUITE, tar, *_sources(),
    )  # fmt: skip
    run_quiet("tar", "-C", root, "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xf", tar)
    tar.unlink()


def _sources() -> list[Path]:
    """This host's own sources of the suite; none (mmdebstrap's default then) if it has none."""
    etc = Path("/etc/apt")
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*.list")), *sorted((etc / "sources.list.d").glob("*.sources"))]
    return [path for path in files if path.is_file() and f" {SUITE} " in path.read_text(errors="replace").replace("\n", " ")]


def _modules(kernel: Path, root: Path, version: str) -> None:
    source = kernel / "lib/modules" / version
    target = root / "lib/modules" / version
    for pattern in MODULES:
        for path in sorted((source / "kernel").glob(pattern)):
            place = target / "kernel" / path.relative_to(source / "kernel")
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, place)
            else:
                shutil.copyfile(path, place)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copyfile(source / name, target / name)
    run_quiet("depmod", "-b", root, version)


def _initrd(root: Path, version: str, work: Path, target: Path) -> None:
    for name in ("bin", "modules"):
        (work / name).mkdir(parents=True)
    shutil.copy(root / "bin/busybox", work / "bin/busybox")
    order: list[str] = []
    for module in INITRD_MODULES:
        for line in run_quiet("modprobe", "-d", root, "-S", version, "--show-depends", module).splitlines():
            path = Path(line.split()[1]) if line.startswith("insmod") else None
            if path is not None and path.name not in order:
                shutil.copyfile(path, work / "modules" / path.name)
                order.append(path.name)
    # ext4 asks for the checksum through the crypto layer, by a name no dependency shows
    crc = [line.split()[1] for line in run_quiet("modprobe", "-d", root, "-S", version, "--show-depends", "crc32c").splitlines()
           if line.startswith("insmod")]  # fmt: skip
    for path in map(Path, crc):
        if path.name not in order:
            shutil.copyfile(path, work / "modules" / path.name)
            order.insert(0, path.name)
    (work / "modules/order").write_text("\n".join(order))
    (work / "init").write_text(INIT)
    (work / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(work)) for path in sorted(work.rglob("*")))
    with open(target, "wb") as file:
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=work, input=names.encode(), stdout=file, check=True)


def _configure(root: Path) -> None:
    system = root / "etc/systemd/system"
    (system / "host-runner.service").write_text(RUNNER_UNIT)
    runner = root / "usr/local/sbin/run-for-host"
    runner.write_text(RUNNER)
    runner.chmod(0o755)
    wants = system / "graphical.target.wants"
    wants.mkdir(exist_ok=True)
    os.symlink("/etc/systemd/system/host-runner.service", wants / "host-runner.service")
    for name in MASKED:
        (system / name).unlink(missing_ok=True)
        os.symlink("/dev/null", system / name)
    (root / "etc/hostname").write_text("machine\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost machine\n")
    (root / "etc/fstab").write_text("")


if __name__ == "__main__":
    print(image())

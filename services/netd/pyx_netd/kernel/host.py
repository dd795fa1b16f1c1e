"""What a bridge network needs of the host: the bridge itself, its address, sysctls, the nftables table, and what others occupy.

All of it belongs to a start and takes milliseconds: call it in a thread. Links and routes go through pyroute2.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from pyx_bus.errors import DeadlineExceeded, FailedPrecondition, Internal, Unavailable

_SYSCTL = Path("/proc/sys/net")
_TABLE_LOCAL = 255
_DEFAULT_MTU = 1500
_LOCK_FILE = "/run/pyx-subnets.lock"
_LOCK_TIMEOUT_S = 20.0
_NFT_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the host has besides our bridge: subnets that are routed or addressed, and the MTU towards the outside (bytes)."""

    occupied: tuple[ipaddress.IPv4Network, ...]
    mtu: int


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@contextlib.contextmanager
def subnet_lock() -> Iterator[None]:
    """Only one stack at a time picks a subnet, from looking round until its bridge has it.

    The lock is a file's, in a directory only root writes to, so that nobody else can hold it; it vanishes with a killed holder.
    """
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    fd = os.open(_LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded("another stack has been picking its subnet for too long") from None
                time.sleep(0.005)
        yield
    finally:
        os.close(fd)


def surroundings(bridge: str) -> Surroundings:
    """Addresses and routes of the host, other than those of ``bridge``."""
    occupied: set[ipaddress.IPv4Network] = set()
    mtu = _DEFAULT_MTU
    with IPRoute() as ipr:
        ours = next(iter(ipr.link_lookup(ifname=bridge)), 0)
        for address in ipr.get_addr(family=socket.AF_INET):
            if address["index"] != ours:
                text = f"{address.get_attr('IFA_ADDRESS')}/{address['prefixlen']}"
                occupied.add(ipaddress.IPv4Network(text, strict=False))
        default: tuple[int, int] | None = None  # metric, interface
        for route in ipr.get_routes(family=socket.AF_INET):
            if route.get_attr("RTA_TABLE", route["table"]) == _TABLE_LOCAL:
                continue
            interface = route.get_attr("RTA_OIF") or 0
            if route["dst_len"]:
                if interface != ours or not ours:
                    occupied.add(ipaddress.IPv4Network(f"{route.get_attr('RTA_DST')}/{route['dst_len']}"))
            elif interface:
                metric = route.get_attr("RTA_PRIORITY") or 0
                default = min(default or (metric, interface), (metric, interface))
        if default is not None:
            link = ipr.get_links(default[1])[0]
            mtu = link.get_attr("IFLA_MTU") or _DEFAULT_MTU
    return Surroundings(tuple(occupied), mtu)


def exists(interface: str) -> bool:
    try:
        socket.if_nametoindex(interface)
    except OSError:
        return False
    return True


def ensure_bridge(name: str, gateway: ipaddress.IPv4Interface, mtu: int, members: Sequence[str] = ()) -> int:
    """Make the bridge, or bring one that is there into form; returns its interface index. Idempotent.

    ``members`` are the interfaces that shall be its ports: they aren't any more if somebody deleted the bridge.

    Errors: failed_precondition (the name belongs to something that isn't a bridge), internal.
    """
    try:
        with IPRoute() as ipr:
            index = next(iter(ipr.link_lookup(ifname=name)), 0)
            if index:
                info = ipr.get_links(index)[0].get_attr("IFLA_LINKINFO")
                if info is None or info.get_attr("IFLA_INFO_KIND") != "bridge":
                    raise FailedPrecondition(f'interface "{name}" exists and is not a bridge', hint="rename or remove it")
            else:
                # An address of its own: else it takes its lowest port's, and changes with the containers that come and go.
                mac = ":".join(f"{byte:02x}" for byte in b"\x02\x42" + os.urandom(4))
                ipr.link("add", ifname=name, kind="bridge", address=mac)
                index = ipr.link_lookup(ifname=name)[0]
            present = False
            for address in ipr.get_addr(family=socket.AF_INET, index=index):
                if (address.get_attr("IFA_ADDRESS"), address["prefixlen"]) == (str(gateway.ip), gateway.network.prefixlen):
                    present = True
                else:
                    ipr.addr("del", index=index, address=address.get_attr("IFA_ADDRESS"), prefixlen=address["prefixlen"])
            if not present:
                ipr.addr(
                    "add", index=index, address=str(gateway.ip), prefixlen=gateway.network.prefixlen,
                    broadcast=str(gateway.network.broadcast_address),
                )  # fmt: skip
            ipr.link("set", index=index, mtu=mtu, state="up")
            wanted = frozenset(members)
            for link in ipr.get_links() if wanted else ():
                if link.get_attr("IFLA_IFNAME") in wanted and link.get_attr("IFLA_MASTER") != index:
                    ipr.link("set", index=link["index"], master=index)
    except NetlinkError as error:
        raise Internal(f'can\'t set up bridge "{name}": {error}') from error
    # Docker's way too: on, and never switched off again, since others may have come to rely on it.
    sysctl("ipv4/ip_forward", "1")
    # Packets of the host to 127.0.0.1:<published port> leave by the bridge; the table's guard chain is the other half.
    sysctl(f"ipv4/conf/{name}/route_localnet", "1")
    return int(index)


def remove_bridge(name: str) -> None:
    """Idempotent. The kernel takes 50 ms."""
    with IPRoute() as ipr:
        for index in ipr.link_lookup(ifname=name):
            try:
                ipr.link("del", index=index)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise Internal(f'can\'t remove bridge "{name}": {error}') from error


def sysctl(name: str, value: str) -> None:
    """Set a setting below net/ unless it has that value. Errors: unavailable (read-only /proc/sys)."""
    path = _SYSCTL / name
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except OSError as error:
        raise Unavailable(f'can\'t set "net/{name}" to {value}: {error.strerror}') from error


def bridged_packets_filtered() -> bool:
    """Whether bridged packets pass through netfilter too (br_netfilter); it may be switched at any time. 20 us."""
    try:
        return (_SYSCTL / "bridge/bridge-nf-call-iptables").read_bytes().strip() == b"1"
    except OSError:
        return False


def load_ruleset(text: str) -> None:
    """Have nft(8) carry out commands, in one transaction. Errors: unavailable (no nft, or the kernel refuses)."""
    try:
        done = subprocess.run(
            ["nft", "-f", "-"], input=text, text=True, capture_output=True, timeout=_NFT_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise Unavailable("nft is not installed", hint="install the nftables package") from None
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"nft didn't finish in {_NFT_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        first = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise Unavailable(f"nft refused the ruleset: {first}")


def remove_table(table: str) -> None:
    """Idempotent: adding before deleting makes the deletion never fail."""
    load_ruleset(f"add table ip {table}\ndelete table ip {table}\n")


def read_resolv_conf() -> tuple[str, str]:
    """The host's resolv.conf, and systemd-resolved's list of the real upstreams ("" each if absent)."""
    texts = []
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        try:
            texts.append(Path(path).read_text(errors="replace"))
        except OSError:
            texts.append("")
    return texts[0], texts[1]

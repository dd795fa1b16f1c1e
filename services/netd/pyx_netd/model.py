"""Networks, attachments and published ports as values, and the names derived from them. Pure."""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass, field

INTERFACE_NAME_MAX = 15
"""IFNAMSIZ less the terminating zero."""

CONTAINER_INTERFACE = "eth0"


@dataclass(frozen=True, slots=True)
class Network:
    """A network people can name. ``subnet`` and ``gateway`` are empty where the driver gives no addresses (none, host)."""

    id: str
    name: str
    driver: str
    created_ns: int
    subnet: str = ""
    gateway: str = ""
    bridge: str = ""
    mtu: int = 1500
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Port:
    """A published port, checked: ``protocol`` tcp or udp, ``host_ip`` empty (every address) or an IPv4 address of the host.

    ``host_port`` 0 exists only in a plan: what is stored and answered carries the reserved one.
    """

    protocol: str
    container_port: int
    host_port: int = 0
    host_ip: str = ""

    def __str__(self) -> str:
        return f"{self.host_ip or '0.0.0.0'}:{self.host_port}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class Attachment:
    """A container's namespace and the endpoint in it: exactly what is stored per container.

    ``netns`` is the path of the bind mount that keeps the namespace alive, ``netns_inode`` the namespace's number on nsfs: a path
    whose file has another number isn't ours any more. Addressless (network none): ``address`` and ``mac`` are empty.
    """

    container_id: str
    network_id: str
    endpoint_id: str
    container_name: str
    netns: str
    netns_inode: int
    created_ns: int
    address: str = ""
    mac: str = ""
    host_interface: str = ""
    ports: tuple[Port, ...] = ()


def mac_of(address: str) -> str:
    """Docker's MAC address of an IPv4 address: ``02:42:`` and the address's four bytes.

    The same address always has the same MAC, so that a neighbour's ARP cache stays right when an address goes to another container.
    """
    return ":".join(f"{byte:02x}" for byte in (0x02, 0x42, *ipaddress.IPv4Address(address).packed))


def bridge_name(prefix: str) -> str:
    """The bridge's interface name: ``pyx0`` in the default stack, else the stack's prefix, which is unique on the host."""
    name = "pyx0" if prefix == "pyx" else prefix
    if len(name) > INTERFACE_NAME_MAX:
        name = "pyx" + hashlib.sha256(prefix.encode()).hexdigest()[: INTERFACE_NAME_MAX - 3]
    return name


def table_name(prefix: str) -> str:
    """The nftables table's name; nft's grammar has no ``-`` in an unquoted identifier's first place, and tools dislike it elsewhere."""
    return prefix.replace("-", "_")


def namespace_file(container_id: str) -> str:
    """The file name of a container's namespace: its ID, cut to a length every file system takes."""
    return container_id[:64]

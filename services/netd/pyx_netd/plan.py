"""What a request asks for, checked and brought into one form; what resolv.conf shall say. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pyx_bus.contract.netd import PortMapping
from pyx_bus.errors import Conflict, InvalidArgument

from .model import Network, Port

PORT_MAX = 65535
FALLBACK_NAMESERVERS = ("8.8.8.8", "8.8.4.4")
"""Docker's, for a host whose only resolvers listen on its own loopback, where a container can't reach them."""

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_CONTAINER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def container_id(text: str) -> str:
    """An ID that is safe as a file name. Errors: invalid_argument."""
    if not _CONTAINER_ID.fullmatch(text) or len(text) > 64:
        raise InvalidArgument(f'invalid container ID "{text}"')
    return text


def mac_address(text: str) -> str:
    """A unicast MAC address, lowercase. Errors: invalid_argument."""
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac):
        raise InvalidArgument(f'invalid MAC address "{text}"', hint="write it as 02:42:ac:11:00:02")
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise InvalidArgument(f'MAC address "{text}" is not a unicast address')
    return mac


def ports(mappings: Sequence[PortMapping]) -> tuple[Port, ...]:
    """The ports to publish: checked, repetitions dropped, in the order asked for.

    Errors: invalid_argument (port out of range, protocol, host address), conflict (one host port wanted for two container ports).
    """
    wanted: dict[Port, None] = {}
    for mapping in mappings:
        wanted.setdefault(_port(mapping))
    owners: dict[tuple[str, int], set[str]] = {}
    for port in wanted:
        if port.host_port == 0:
            continue
        addresses = owners.setdefault((port.protocol, port.host_port), set())
        if port.host_ip in addresses or "" in addresses or (addresses and not port.host_ip):
            raise Conflict(f"port {port} is published twice", details={"port": str(port.host_port)})
        addresses.add(port.host_ip)
    return tuple(wanted)


def _port(mapping: PortMapping) -> Port:
    protocol = mapping.protocol.lower()
    if protocol not in ("tcp", "udp"):
        raise InvalidArgument(f'invalid protocol "{mapping.protocol}" of a published port', hint="tcp or udp")
    if not 1 <= mapping.container_port <= PORT_MAX:
        raise InvalidArgument(f'invalid container port "{mapping.container_port}"')
    if not 0 <= mapping.host_port <= PORT_MAX:
        raise InvalidArgument(f'invalid host port "{mapping.host_port}"')
    host_ip = mapping.host_ip.strip("[]")
    if host_ip:
        try:
            address = ipaddress.ip_address(host_ip)
        except ValueError:
            raise InvalidArgument(f'invalid IP address "{mapping.host_ip}" of a published port') from None
        if isinstance(address, ipaddress.IPv6Address):
            raise InvalidArgument(
                f'can\'t publish a port on IPv6 address "{mapping.host_ip}": the network has no IPv6',
                hint="leave the address out, or give an IPv4 address of the host",
            )
        host_ip = "" if address.is_unspecified else str(address)
    return Port(protocol, mapping.container_port, mapping.host_port, host_ip)


@dataclass(frozen=True, slots=True)
class Resolver:
    """What a container's resolv.conf shall say (resolv.conf(5))."""

    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def parse_resolv_conf(text: str) -> Resolver:
    """resolv.conf(5): every nameserver, the last search or domain line, the options of all lines."""
    nameservers: list[str] = []
    search: tuple[str, ...] = ()
    options: list[str] = []
    for line in text.splitlines():
        words = line.split("#")[0].split(";")[0].split()
        if len(words) < 2:
            continue
        keyword, values = words[0], words[1:]
        if keyword == "nameserver":
            nameservers.append(values[0])
        elif keyword in ("search", "domain"):
            search = tuple(value for value in values if value != ".")
        elif keyword == "options":
            options.extend(value for value in values if value not in options)
    return Resolver(tuple(nameservers), search, tuple(options))


def container_resolver(host: Resolver) -> Resolver:
    """The host's settings as a container in its own IPv4 namespace can use them.

    Loopback resolvers are the host's own, and IPv6 ones can't be reached without IPv6; if none is left, public ones take their place.
    """
    reachable = tuple(server for server in host.nameservers if _reachable(server))
    return Resolver(reachable or FALLBACK_NAMESERVERS, host.search, host.options)


def only_loopback(host: Resolver) -> bool:
    """Whether every resolver is a loopback one: a local stub, whose real upstreams are elsewhere."""
    return bool(host.nameservers) and not any(_reachable(server) for server in host.nameservers)


def _reachable(server: str) -> bool:
    try:
        address = ipaddress.ip_address(server.partition("%")[0])
    except ValueError:
        return False
    return isinstance(address, ipaddress.IPv4Address) and not address.is_loopback and not address.is_unspecified


_BUILTIN = frozenset(("bridge", "none", "host"))


def matches(network: Network, filters: Mapping[str, Sequence[str]]) -> bool:
    """Whether Docker's filters select a network: values of one key are alternatives, keys add up. Errors: invalid_argument."""
    for key, values in filters.items():
        if key == "name":
            hit = any(value in network.name for value in values)
        elif key == "id":
            hit = any(network.id.startswith(value) for value in values)
        elif key == "driver":
            hit = network.driver in values
        elif key == "scope":
            hit = "local" in values
        elif key == "type":
            for value in values:
                if value not in ("builtin", "custom"):
                    raise InvalidArgument(f'invalid filter "type={value}"', hint="builtin or custom")
            hit = ("builtin" if network.name in _BUILTIN else "custom") in values
        elif key == "label":
            # Labels add up, unlike the others: each one given has to be there.
            hit = all(_has_label(network.labels, value) for value in values)
        else:
            raise InvalidArgument(f'invalid filter "{key}"', hint="name, id, driver, scope, type or label")
        if values and not hit:
            return False
    return True


def _has_label(labels: Mapping[str, str], wanted: str) -> bool:
    key, equals, value = wanted.partition("=")
    return key in labels and (not equals or labels[key] == value)


def ports_text(ports: Iterable[Port]) -> str:
    """As Docker's ``ps`` writes them: "0.0.0.0:8080->80/tcp, 127.0.0.1:53->53/udp"."""
    return ", ".join(
        f"{port.host_ip or '0.0.0.0'}:{port.host_port}->{port.container_port}/{port.protocol}" for port in ports
    )

"""Docker's JSON of a network (Engine API, NetworkInspect). Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime

from .model import Attachment, Network


def timestamp(time_ns: int) -> str:
    """RFC 3339 in UTC with nanoseconds, as Docker writes it."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


def document(network: Network, attachments: Sequence[Attachment]) -> dict[str, object]:
    """The network and who is attached to it."""
    config: list[dict[str, str]] = []
    if network.subnet:
        config.append({"Subnet": network.subnet, "Gateway": network.gateway})
    options: dict[str, str] = {}
    if network.bridge:
        # Docker's names, which its users' scripts look for.
        options = {
            "com.docker.network.bridge.default_bridge": "true",
            "com.docker.network.bridge.enable_icc": "true",
            "com.docker.network.bridge.enable_ip_masquerade": "true",
            "com.docker.network.bridge.host_binding_ipv4": "0.0.0.0",
            "com.docker.network.bridge.name": network.bridge,
            "com.docker.network.driver.mtu": str(network.mtu),
        }
    return {
        "Name": network.name,
        "Id": network.id,
        "Created": timestamp(network.created_ns),
        "Scope": "local",
        "Driver": network.driver,
        "EnableIPv6": False,
        "IPAM": {"Driver": "default", "Options": None, "Config": config},
        "Internal": False,
        "Attachable": False,
        "Ingress": False,
        "ConfigFrom": {"Network": ""},
        "ConfigOnly": False,
        "Containers": {attachment.container_id: _container(network, attachment) for attachment in attachments},
        "Options": options,
        "Labels": network.labels,
    }


def _container(network: Network, attachment: Attachment) -> dict[str, str]:
    return {
        "Name": attachment.container_name,
        "EndpointID": attachment.endpoint_id,
        "MacAddress": attachment.mac,
        "IPv4Address": f"{attachment.address}/{prefix_length(network)}" if attachment.address else "",
        "IPv6Address": "",
    }


def prefix_length(network: Network) -> int:
    """The length of the subnet's prefix; 0 for a network without one."""
    return ipaddress.IPv4Network(network.subnet).prefixlen if network.subnet else 0

"""netd: networks, network namespaces with an endpoint in them, addresses, published ports."""

from __future__ import annotations

from typing import ClassVar

from .base import Empty, Event, Message, Method, Released, Retain
from .imaged import Document


class PortMapping(Message, frozen=True, kw_only=True):
    """One published port. ``host_port`` 0 asks for a free one of the host's ephemeral range; answers carry the real one.

    ``host_ip`` empty means every address of the host. ``protocol`` is tcp or udp.
    """

    container_port: int
    host_port: int = 0
    host_ip: str = ""
    protocol: str = "tcp"


class AttachContainer(Message, frozen=True, kw_only=True):
    """Make (or find again) a container's network namespace, with an endpoint on ``network``. Idempotent under the container's ID.

    ``network`` is a network's name or ID, or ``none`` (a namespace with lo alone) or ``host`` (no namespace).
    Errors: not_found (no such network), conflict (a host port or the wanted address is taken), invalid_argument,
    resource_exhausted (no free address or port). A failed attach leaves nothing behind. A container that is attached already is
    answered as it is, whatever else the request says. ``container_name`` is what a network's inspect shows; ``hostname`` stands in.
    """

    container_id: str
    container_name: str = ""
    network: str = "bridge"
    ipv4_address: str = ""
    mac_address: str = ""
    hostname: str = ""
    ports: list[PortMapping] = []


class Endpoint(Message, frozen=True, kw_only=True):
    network: str
    network_id: str
    endpoint_id: str
    interface: str = "eth0"
    ipv4_address: str = ""
    prefix_length: int = 0
    gateway: str = ""
    mac_address: str = ""


class Sandbox(Message, frozen=True, kw_only=True):
    """A container's network: ``netns_path`` to join (empty: the host's own), and what resolv.conf shall say."""

    netns_path: str = ""
    endpoints: list[Endpoint] = []
    ports: list[PortMapping] = []
    nameservers: list[str] = []
    search: list[str] = []
    resolv_options: list[str] = []


class DetachContainer(Message, frozen=True, kw_only=True):
    """Take down a container's namespace, endpoints and published ports. Idempotent: an unknown ID is fine."""

    container_id: str


class ListNetworks(Message, frozen=True, kw_only=True):
    """``filters`` as Docker's: name, id, driver, type, label."""

    filters: dict[str, list[str]] = {}


class NetworkSummary(Message, frozen=True, kw_only=True):
    id: str
    name: str
    driver: str
    scope: str = "local"
    created_ns: int = 0
    internal: bool = False
    ipv6: bool = False
    labels: dict[str, str] = {}


class NetworkList(Message, frozen=True, kw_only=True):
    networks: list[NetworkSummary] = []


class NetworkRef(Message, frozen=True, kw_only=True):
    """A network by name, ID or unambiguous ID prefix. Errors: not_found, invalid_argument (ambiguous)."""

    network: str


ATTACH = Method("netd.attach", AttachContainer, Sandbox, idempotent=True)
DETACH = Method("netd.detach", DetachContainer, Empty, idempotent=True)
RETAIN = Method("netd.retain", Retain, Released, idempotent=True)
LIST = Method("netd.list", ListNetworks, NetworkList, idempotent=True, read_only=True)
INSPECT = Method("netd.inspect", NetworkRef, Document, idempotent=True, read_only=True)


class NetworkConnected(Event, frozen=True, kw_only=True):
    """``id`` is the network's; attributes: name, type (driver), container."""

    topic: ClassVar[str] = "network.connect"


class NetworkDisconnected(Event, frozen=True, kw_only=True):
    """Attributes as of a connect."""

    topic: ClassVar[str] = "network.disconnect"


class PortsPublished(Event, frozen=True, kw_only=True):
    """A container's ports can be reached from now on. ``id`` is the network's; attributes: name, type, container, and ports as Docker
    writes them ("0.0.0.0:8080->80/tcp", joined by ", ")."""

    topic: ClassVar[str] = "network.port.publish"

    ports: list[PortMapping] = []


class PortsReleased(Event, frozen=True, kw_only=True):
    """They can't any more, and are free. Attributes as of a publish."""

    topic: ClassVar[str] = "network.port.release"

    ports: list[PortMapping] = []


METHODS = (ATTACH, DETACH, RETAIN, LIST, INSPECT)
EVENTS = (NetworkConnected, NetworkDisconnected, PortsPublished, PortsReleased)

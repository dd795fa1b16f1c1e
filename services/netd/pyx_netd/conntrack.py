"""ctnetlink messages: list connection-tracking entries, delete one. Pure; the socket is in kernel.py.

The kernel remembers a flow's NAT for as long as packets come: a UDP client would go on talking to a container that is gone, or go on
missing one that was published after its first packet. So entries are dropped when ports are published and withdrawn. The kernel can't
delete by these criteria before 6.x, so entries are listed, chosen here, and deleted one by one by their own tuple.
Layouts: linux/netfilter/nfnetlink_conntrack.h; integers inside attributes are in network order.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .model import Port
from .nft import PROTOCOLS

IPCTNL_MSG_CT_NEW, IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE = 0, 1, 2
_SUBSYS_CTNETLINK = 1
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x300
_AF_INET = 2
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_ID, _CTA_ZONE = 1, 2, 12, 18
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_IP_V4_SRC, _CTA_IP_V4_DST = 1, 2
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_KIND_MASK = 0x3FFF
NLMSG_ERROR, NLMSG_DONE = 2, 3


@dataclass(frozen=True, slots=True)
class Flow:
    """A tracked connection: the first packet's destination, who answers it, and the attributes that identify it to the kernel."""

    protocol: int
    destination: str
    destination_port: int
    answered_by: str
    identity: bytes


@dataclass(frozen=True, slots=True)
class Stale:
    """Which flows to forget.

    ``address``: those answered by a container that is gone. ``ports``: those to a published host port that the container behind it
    doesn't answer yet (``address`` empty), because they began before it was published. ``subnet``: those answered from it by none of
    ``living``, which is what a killed netd had no time to forget.
    """

    address: str = ""
    ports: tuple[Port, ...] = ()
    subnet: ipaddress.IPv4Network | None = None
    living: frozenset[str] = frozenset()

    def covers(self, flow: Flow) -> bool:
        if self.address:
            return flow.answered_by == self.address
        if self.subnet is not None:
            return flow.answered_by not in self.living and ipaddress.IPv4Address(flow.answered_by) in self.subnet
        return any(
            PROTOCOLS[port.protocol] == flow.protocol
            and port.host_port == flow.destination_port
            and port.host_ip in ("", flow.destination)
            and flow.answered_by == flow.destination
            for port in self.ports
        )


def _header(kind: int, flags: int, length: int, sequence: int) -> bytes:
    return struct.pack("=IHHII", 20 + length, _SUBSYS_CTNETLINK << 8 | kind, flags | _NLM_F_REQUEST, sequence, 0) + struct.pack(
        "!BBH", _AF_INET, 0, 0
    )


def dump(sequence: int) -> bytes:
    """Ask for every IPv4 entry."""
    return _header(IPCTNL_MSG_CT_GET, _NLM_F_DUMP, 0, sequence)


def delete(sequence: int, flow: Flow) -> bytes:
    """Delete one entry. It may have expired meanwhile: ENOENT is fine."""
    return _header(IPCTNL_MSG_CT_DELETE, _NLM_F_ACK, len(flow.identity), sequence) + flow.identity


def flows(data: bytes) -> tuple[list[Flow], bool]:
    """The entries in one read of a dump, and whether the dump ended with it. Raises OSError if the kernel refused to dump."""
    found: list[Flow] = []
    offset = 0
    while offset + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, offset)
        if length < 16:
            break
        if kind == NLMSG_DONE:
            return found, True
        if kind == NLMSG_ERROR:  # a kernel without ctnetlink: nothing else will come
            code = -struct.unpack_from("=i", data, offset + 16)[0]
            raise OSError(code, "ctnetlink refused to list tracked connections")
        if kind == _SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW:
            flow = _flow(data[offset + 20 : offset + length])
            if flow is not None:
                found.append(flow)
        offset += (length + 3) & ~3
    return found, False


def _attributes(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(type, payload, the attribute as it stands) of each attribute."""
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            return
        end = offset + ((length + 3) & ~3)
        yield kind & _KIND_MASK, data[offset + 4 : offset + length], data[offset:end]
        offset = end


def _flow(body: bytes) -> Flow | None:
    identity = b""
    original = reply = (0, "", "", 0)
    for kind, payload, whole in _attributes(body):
        if kind == _CTA_TUPLE_ORIG:
            original = _tuple(payload)
        elif kind == _CTA_TUPLE_REPLY:
            reply = _tuple(payload)
        if kind in (_CTA_TUPLE_ORIG, _CTA_ID, _CTA_ZONE):
            identity += whole
    if not original[1] or not reply[1]:
        return None
    return Flow(original[0], original[2], original[3], reply[1], identity)


def _tuple(data: bytes) -> tuple[int, str, str, int]:
    """(protocol, source, destination, destination port)."""
    protocol = port = 0
    source = destination = ""
    for kind, payload, _ in _attributes(data):
        for inner, value, _ in _attributes(payload):
            if kind == _CTA_TUPLE_IP and inner == _CTA_IP_V4_SRC:
                source = str(ipaddress.IPv4Address(value[:4]))
            elif kind == _CTA_TUPLE_IP and inner == _CTA_IP_V4_DST:
                destination = str(ipaddress.IPv4Address(value[:4]))
            elif kind == _CTA_TUPLE_PROTO and inner == _CTA_PROTO_NUM:
                protocol = value[0]
            elif kind == _CTA_TUPLE_PROTO and inner == _CTA_PROTO_DST_PORT:
                (port,) = struct.unpack("!H", value[:2])
    return protocol, source, destination, port

"""rtnetlink messages of the start path, as bytes. Pure; the sockets are in kernel.py.

pyroute2 is the netlink library of this project; encoding with it costs 1.5 ms of a container's start, so the handful of messages
needed per container are packed here, and tests decode each one with pyroute2. Layouts: rtnetlink(7), linux/rtnetlink.h,
linux/if_link.h, linux/if_addr.h. All integers are in host order, addresses in network order.
"""

from __future__ import annotations

import ipaddress
import struct

NLMSG_ERROR = 2
RTM_NEWLINK, RTM_GETLINK, RTM_NEWADDR, RTM_NEWROUTE, RTM_NEWNEIGH = 16, 18, 20, 24, 28
NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x1, 0x4, 0x100, 0x200, 0x400
_NESTED = 0x8000
_IFF_UP = 1
_AF_INET, _AF_BRIDGE = 2, 7
_NUD_NOARP, _NTF_MASTER, _NTF_STICKY, _NDA_LLADDR = 0x40, 0x04, 0x40, 2
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 4, 10, 18, 28
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _IFLA_INFO_SLAVE_KIND, _IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
_VETH_INFO_PEER, _IFLA_BRPORT_MODE = 1, 4
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST = 1, 2, 4
_RTA_GATEWAY = 5
_RT_TABLE_MAIN, _RTPROT_BOOT, _RT_SCOPE_UNIVERSE, _RTN_UNICAST = 254, 3, 0, 1
_NLMSGERR_ATTR_MSG = 1
_NLM_F_ACK_TLVS, _NLM_F_CAPPED = 0x200, 0x100

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence number, port ID
_ATTR = struct.Struct("=HH")  # rtattr: length without padding, type
_U32 = struct.Struct("=I")


def attribute(kind: int, data: bytes, *, nested: bool = False) -> bytes:
    """An rtattr, padded to four bytes."""
    length = 4 + len(data)
    return _ATTR.pack(length, kind | _NESTED if nested else kind) + data + bytes(-length % 4)


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return _HEADER.pack(16 + len(body), kind, flags | NLM_F_REQUEST | NLM_F_ACK, sequence, 0) + body


def _ifinfo(index: int = 0, flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("=BxHiII", 0, 0, index, flags, change)


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


def _mac(value: str) -> bytes:
    return bytes.fromhex(value.replace(":", ""))


def veth(sequence: int, *, host: str, peer: str, peer_mac: str, netns_fd: int, master: int, mtu: int) -> bytes:
    """Create a veth pair in one go: ``host`` up and a port of bridge ``master``, ``peer`` inside the namespace under its final name.

    Moving a link between namespaces afterwards would cost an RCU wait of 15-20 ms. The peer is created down: up, veth_open would
    want a host end that doesn't exist yet (ENOTCONN). Its interface index is the kernel's choice: one asked for here is ignored.
    """
    mtu_attribute = attribute(_IFLA_MTU, _U32.pack(mtu))
    peer_info = (
        _ifinfo()
        + attribute(_IFLA_IFNAME, _text(peer))
        + attribute(_IFLA_NET_NS_FD, _U32.pack(netns_fd))
        + attribute(_IFLA_ADDRESS, _mac(peer_mac))
        + mtu_attribute
    )
    link_info = attribute(_IFLA_INFO_KIND, b"veth\0") + attribute(
        _IFLA_INFO_DATA, attribute(_VETH_INFO_PEER, peer_info, nested=True), nested=True
    )
    body = (
        _ifinfo(0, _IFF_UP, _IFF_UP)
        + attribute(_IFLA_IFNAME, _text(host))
        + attribute(_IFLA_MASTER, _U32.pack(master))
        + mtu_attribute
        + attribute(_IFLA_LINKINFO, link_info, nested=True)
    )
    return _message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, sequence, body)


def hairpin(sequence: int, host: str) -> bytes:
    """Let a bridge port send frames back out where they came in.

    Needed where bridged packets pass through netfilter (bridge-nf-call-iptables): there a container's packet to its own published
    port is DNATed inside the bridge and would have to leave by the port it entered.
    """
    slave = attribute(_IFLA_INFO_SLAVE_KIND, b"bridge\0") + attribute(
        _IFLA_INFO_SLAVE_DATA, attribute(_IFLA_BRPORT_MODE, b"\1"), nested=True
    )
    body = _ifinfo() + attribute(_IFLA_IFNAME, _text(host)) + attribute(_IFLA_LINKINFO, slave, nested=True)
    return _message(RTM_NEWLINK, 0, sequence, body)


def get_link(sequence: int, name: str) -> bytes:
    """Ask for an interface by its name; the answer is an RTM_NEWLINK, and an acknowledgement."""
    return _message(RTM_GETLINK, 0, sequence, _ifinfo() + attribute(_IFLA_IFNAME, _text(name)))


def link_index(data: bytes) -> int:
    """The interface index in an answer to ``get_link``; 0 if there is none."""
    if len(data) >= 32 and _HEADER.unpack_from(data)[1] == RTM_NEWLINK:
        return int(struct.unpack_from("=i", data, 20)[0])
    return 0


def forward_to(sequence: int, port_index: int, mac: str) -> bytes:
    """Tell a bridge behind which of its ports a MAC address is, for as long as the port lives.

    An address given again (a restart with a fixed one) has the MAC of its former owner, whose port the kernel may not have taken down
    yet: frames would go there until the new owner says something. Sticky: frames of others can't move it.
    """
    body = struct.pack("=BxxxiHBB", _AF_BRIDGE, port_index, _NUD_NOARP, _NTF_MASTER | _NTF_STICKY, 0) + attribute(
        _NDA_LLADDR, _mac(mac)
    )
    return _message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, sequence, body)


def link_up(sequence: int, index: int) -> bytes:
    """Bring an interface up."""
    return _message(RTM_NEWLINK, 0, sequence, _ifinfo(index, _IFF_UP, _IFF_UP))


def address(sequence: int, index: int, interface: ipaddress.IPv4Interface) -> bytes:
    """Give an interface an address with its subnet's broadcast address."""
    packed = interface.packed
    body = (
        struct.pack("=BBBBi", _AF_INET, interface.network.prefixlen, 0, _RT_SCOPE_UNIVERSE, index)
        + attribute(_IFA_LOCAL, packed)
        + attribute(_IFA_ADDRESS, packed)
        + attribute(_IFA_BROADCAST, interface.network.broadcast_address.packed)
    )
    return _message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, sequence, body)


def default_route(sequence: int, gateway: ipaddress.IPv4Address) -> bytes:
    """The route to everywhere else."""
    body = struct.pack(
        "=BBBBBBBBI", _AF_INET, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_BOOT, _RT_SCOPE_UNIVERSE, _RTN_UNICAST, 0
    ) + attribute(_RTA_GATEWAY, gateway.packed)
    return _message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, sequence, body)


def answers(data: bytes) -> list[tuple[int, int, str]]:
    """The acknowledgements in what a netlink socket returned: (sequence number, errno or 0, the kernel's own words or "")."""
    found = []
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < 16:
            break
        if kind == NLMSG_ERROR:
            (code,) = struct.unpack_from("=i", data, offset + 16)
            found.append((sequence, -code, _extended(data, offset, length, flags) if code else ""))
        offset += (length + 3) & ~3
    return found


def _extended(data: bytes, offset: int, length: int, flags: int) -> str:
    """NLMSGERR_ATTR_MSG behind the copy of the failed request, if the kernel had more to say than an errno."""
    if not flags & _NLM_F_ACK_TLVS:
        return ""
    end = offset + length
    (original,) = _U32.unpack_from(data, offset + 20)
    position = offset + 20 + (16 if flags & _NLM_F_CAPPED else (original + 3) & ~3)
    while position + 4 <= end:
        size, kind = _ATTR.unpack_from(data, position)
        if size < 4:
            break
        if kind & 0x3FFF == _NLMSGERR_ATTR_MSG:
            return data[position + 4 : position + size].split(b"\0")[0].decode("utf-8", "replace")
        position += (size + 3) & ~3
    return ""

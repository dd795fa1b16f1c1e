"""The stack's nftables table: its text for nft(8) and its element changes as nfnetlink bytes. Pure; exec and sockets are in kernel.py.

The table is written once at a start, whole and in one transaction, so that there is no moment with half of it. After that only
elements of the two maps change, by an nfnetlink batch (10 us, against 2.5 ms for an exec of nft). Keys and values of a map are
concatenations, each part padded to four bytes (nf_tables(8) "concatenations"; linux/netfilter/nf_tables.h).

``pub`` has ports published on every address, ``pub_ip`` those on one address; both are reached from prerouting and from output,
for packets to an address of the host, 127.0.0.1 included. That needs route_localnet on the bridge, which would let a container reach
services on the host's loopback: the guard chain drops what arrives from the bridge for 127.0.0.0/8.

The forward chain drops only what goes to our bridge unasked; its policy is accept and it says nothing about other traffic, so tables
of others keep their say. The reverse holds too: where another table's forward chain drops by default (Docker's, a firewall's), our
accept can't overrule it and the administrator has to let the bridge through there.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable

from .model import Port

PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}

Published = tuple[Port, str]
"""A published port and the container address behind it."""


def ruleset(table: str, bridge: str, subnet: str, published: Iterable[Published] = ()) -> str:
    """The text that makes (or replaces) the table, atomically. Adding before deleting makes the deletion never fail."""
    everywhere: list[str] = []
    single: list[str] = []
    for port, address in published:
        target = f"{port.protocol} . {port.host_port} : {address} . {port.container_port}"
        if port.host_ip:
            single.append(f"{port.host_ip} . {target}")
        else:
            everywhere.append(target)
    return f"""\
add table ip {table}
delete table ip {table}
table ip {table} {{
  map pub {{
    type inet_proto . inet_service : ipv4_addr . inet_service
    {_elements(everywhere)}
  }}
  map pub_ip {{
    type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
    {_elements(single)}
  }}
  chain guard {{
    type filter hook prerouting priority raw; policy accept;
    iifname "{bridge}" ip daddr 127.0.0.0/8 drop
  }}
  chain publish {{
    dnat ip to ip daddr . meta l4proto . th dport map @pub_ip
    dnat ip to meta l4proto . th dport map @pub
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    fib daddr type local jump publish
  }}
  chain output {{
    type nat hook output priority -100; policy accept;
    fib daddr type local jump publish
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{bridge}" ip saddr 127.0.0.0/8 masquerade
    oifname "{bridge}" ip saddr {subnet} ct status dnat masquerade
    oifname != "{bridge}" ip saddr {subnet} masquerade
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    oifname != "{bridge}" accept
    iifname "{bridge}" accept
    ct state established,related accept
    ct status dnat accept
    drop
  }}
}}
"""


def _elements(items: list[str]) -> str:
    return f"elements = {{ {', '.join(items)} }}" if items else ""


_NFNL_MSG_BATCH_BEGIN, _NFNL_MSG_BATCH_END = 0x10, 0x11
_NFNL_SUBSYS_NFTABLES = 10
_NFT_MSG_GETTABLE, _NFT_MSG_DELTABLE, _NFT_MSG_NEWSETELEM, _NFT_MSG_DELSETELEM = 1, 2, 12, 14
_NFTA_TABLE_NAME = 1
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_CREATE, _NLM_F_EXCL = 0x1, 0x4, 0x400, 0x200
_NFPROTO_IPV4 = 2
_NFTA_SET_ELEM_LIST_TABLE, _NFTA_SET_ELEM_LIST_SET, _NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
_NFTA_LIST_ELEM, _NFTA_SET_ELEM_KEY, _NFTA_SET_ELEM_DATA, _NFTA_DATA_VALUE = 1, 1, 2, 1
_NESTED = 0x8000
_ELEMENTS_A_MESSAGE = 1000  # of at most 48 bytes each, in an attribute whose length has 16 bits


def _attribute(kind: int, data: bytes, *, nested: bool = False) -> bytes:
    length = 4 + len(data)
    return struct.pack("=HH", length, kind | _NESTED if nested else kind) + data + bytes(-length % 4)


def _message(kind: int, flags: int, sequence: int, family: int, resource: int, body: bytes = b"") -> bytes:
    return (
        struct.pack("=IHHII", 20 + len(body), kind, flags | _NLM_F_REQUEST, sequence, 0)
        + struct.pack("!BBH", family, 0, resource)
        + body
    )


def _key(port: Port) -> bytes:
    key = struct.pack("!B3xH2x", PROTOCOLS[port.protocol], port.host_port)
    return ipaddress.IPv4Address(port.host_ip).packed + key if port.host_ip else key


def _value(port: Port, address: str) -> bytes:
    return ipaddress.IPv4Address(address).packed + struct.pack("!H2x", port.container_port)


def _change(table: str, published: Iterable[Published], kind: int, flags: int) -> list[bytes]:
    """The messages of one transaction: for each map that has something to change as many as it takes, each acknowledged."""
    per_map: dict[str, list[bytes]] = {}
    for port, address in published:
        element = _attribute(_NFTA_SET_ELEM_KEY, _attribute(_NFTA_DATA_VALUE, _key(port)), nested=True)
        if kind == _NFT_MSG_NEWSETELEM:
            element += _attribute(_NFTA_SET_ELEM_DATA, _attribute(_NFTA_DATA_VALUE, _value(port, address)), nested=True)
        per_map.setdefault("pub_ip" if port.host_ip else "pub", []).append(_attribute(_NFTA_LIST_ELEM, element, nested=True))
    portions = [
        (name, elements[start : start + _ELEMENTS_A_MESSAGE])
        for name, elements in per_map.items()
        for start in range(0, len(elements), _ELEMENTS_A_MESSAGE)
    ]
    changes = []
    for sequence, (name, elements) in enumerate(portions, start=1):
        body = (
            _attribute(_NFTA_SET_ELEM_LIST_TABLE, table.encode() + b"\0")
            + _attribute(_NFTA_SET_ELEM_LIST_SET, name.encode() + b"\0")
            + _attribute(_NFTA_SET_ELEM_LIST_ELEMENTS, b"".join(elements), nested=True)
        )
        changes.append(
            _message(_NFNL_SUBSYS_NFTABLES << 8 | kind, flags | _NLM_F_ACK, sequence, _NFPROTO_IPV4, 0, body)
        )
    return changes


def batch(changes: list[bytes]) -> bytes:
    """The changes as one transaction: all of them happen or none."""
    begin = _message(_NFNL_MSG_BATCH_BEGIN, 0, 0, 0, _NFNL_SUBSYS_NFTABLES)
    end = _message(_NFNL_MSG_BATCH_END, 0, len(changes) + 1, 0, _NFNL_SUBSYS_NFTABLES)
    return begin + b"".join(changes) + end


def publish(table: str, published: Iterable[Published]) -> list[bytes]:
    """Messages adding elements. An element that is there with the same value is fine; with another value the kernel says EEXIST."""
    return _change(table, published, _NFT_MSG_NEWSETELEM, _NLM_F_CREATE)


def withdraw(table: str, published: Iterable[Published]) -> list[bytes]:
    """Messages removing elements. A missing one is ENOENT, and then the whole transaction removes nothing."""
    return _change(table, published, _NFT_MSG_DELSETELEM, 0)


def get_table(table: str) -> bytes:
    """Ask for the table; ENOENT if it isn't there."""
    body = _attribute(_NFTA_TABLE_NAME, table.encode() + b"\0")
    return _message(_NFNL_SUBSYS_NFTABLES << 8 | _NFT_MSG_GETTABLE, _NLM_F_ACK, 1, _NFPROTO_IPV4, 0, body)


def tells_of_deleted_table(data: bytes) -> bool:
    """Whether notifications of the kernel (NFNLGRP_NFTABLES) say that some table was deleted."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, offset)
        if kind == _NFNL_SUBSYS_NFTABLES << 8 | _NFT_MSG_DELTABLE:
            return True
        if length < 16:
            break
        offset += (length + 3) & ~3
    return False

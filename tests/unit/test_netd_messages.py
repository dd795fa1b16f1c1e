"""The start path's own netlink messages, decoded by pyroute2: what they say must be what was meant."""

from __future__ import annotations

import errno
import ipaddress
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.nfnetlink.nfctsocket import nfct_msg
from pyroute2.netlink.nfnetlink.nftsocket import nft_set_elem_list_msg, nft_table_msg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from pyx_netd import conntrack, nft, rtnl
from pyx_netd.model import Port


def decoded(kind: type[Any], data: bytes) -> Any:
    message = kind(data)
    message.decode()
    assert message["header"]["length"] == len(data), "the length says where the next message begins"
    return message


def test_veth() -> None:
    data = rtnl.veth(
        7, host="veth0123456789", peer="eth0", peer_mac="02:42:ac:11:00:02", netns_fd=9, master=4, mtu=1450
    )  # fmt: skip
    message = decoded(ifinfmsg, data)
    header = message["header"]
    assert (header["type"], header["sequence_number"]) == (rtnl.RTM_NEWLINK, 7)
    assert header["flags"] == rtnl.NLM_F_REQUEST | rtnl.NLM_F_ACK | rtnl.NLM_F_CREATE | rtnl.NLM_F_EXCL
    assert (message["flags"], message["change"]) == (1, 1), "the host's end is created up"
    assert message.get_attr("IFLA_IFNAME") == "veth0123456789"
    assert message.get_attr("IFLA_MASTER") == 4
    assert message.get_attr("IFLA_MTU") == 1450
    info = message.get_attr("IFLA_LINKINFO")
    assert info.get_attr("IFLA_INFO_KIND") == "veth"
    peer = info.get_attr("IFLA_INFO_DATA").get_attr("VETH_INFO_PEER")
    assert peer["flags"] == 0, "created up, the peer would be refused"
    assert peer.get_attr("IFLA_IFNAME") == "eth0"
    assert peer.get_attr("IFLA_NET_NS_FD") == 9
    assert peer.get_attr("IFLA_ADDRESS") == "02:42:ac:11:00:02"
    assert peer.get_attr("IFLA_MTU") == 1450


def test_hairpin() -> None:
    info = decoded(ifinfmsg, rtnl.hairpin(1, "veth1")).get_attr("IFLA_LINKINFO")
    assert info.get_attr("IFLA_INFO_SLAVE_KIND") == "bridge"
    assert info.get_attr("IFLA_INFO_SLAVE_DATA").get_attr("IFLA_BRPORT_MODE") == 1


def test_link_up_and_get() -> None:
    up = decoded(ifinfmsg, rtnl.link_up(1, 5))
    assert (up["index"], up["flags"], up["change"]) == (5, 1, 1)
    get = decoded(ifinfmsg, rtnl.get_link(1, "eth0"))
    assert (get["header"]["type"], get.get_attr("IFLA_IFNAME")) == (rtnl.RTM_GETLINK, "eth0")
    answer = ifinfmsg()
    answer["index"] = 33
    answer["header"]["type"] = rtnl.RTM_NEWLINK
    answer.encode()
    assert rtnl.link_index(bytes(answer.data)) == 33
    assert rtnl.link_index(b"") == 0


def test_forward_to() -> None:
    message = decoded(ndmsg, rtnl.forward_to(3, 12, "02:42:ac:11:00:02"))
    assert message["header"]["type"] == 28
    assert (message["family"], message["ifindex"], message["state"], message["flags"]) == (7, 12, 0x40, 0x44)
    assert message.get_attr("NDA_LLADDR") == "02:42:ac:11:00:02"


@given(st.integers(1, 30), st.integers(1, 2**32 - 2), st.integers(1, 2**31 - 1))
def test_address(prefix_length: int, number: int, index: int) -> None:
    interface = ipaddress.IPv4Interface((number, prefix_length))
    message = decoded(ifaddrmsg, rtnl.address(3, index, interface))
    assert (message["family"], message["prefixlen"], message["scope"], message["index"]) == (2, prefix_length, 0, index)
    assert message.get_attr("IFA_LOCAL") == message.get_attr("IFA_ADDRESS") == str(interface.ip)
    assert message.get_attr("IFA_BROADCAST") == str(interface.network.broadcast_address)


def test_default_route() -> None:
    message = decoded(rtmsg, rtnl.default_route(3, ipaddress.IPv4Address("172.17.0.1")))
    assert (message["dst_len"], message["table"], message["proto"], message["scope"], message["type"]) == (0, 254, 3, 0, 1)
    assert message.get_attr("RTA_GATEWAY") == "172.17.0.1"
    assert message.get_attr("RTA_DST") is None


def test_answers() -> None:
    request = rtnl.link_up(5, 1)
    fine = struct.pack("=IHHIIi", 36, rtnl.NLMSG_ERROR, 0x100, 4, 0, 0) + request[:16]
    words = rtnl.attribute(1, b"Device does not exist\0")
    failed = struct.pack("=IHHIIi", 36 + len(words), rtnl.NLMSG_ERROR, 0x300, 5, 0, -errno.ENODEV) + request[:16] + words
    whole = struct.pack("=IHHIIi", 20 + len(request) + len(words), rtnl.NLMSG_ERROR, 0x200, 6, 0, -errno.EPERM) + request + words
    assert rtnl.answers(fine + failed + whole) == [
        (4, 0, ""),
        (5, errno.ENODEV, "Device does not exist"),
        (6, errno.EPERM, "Device does not exist"),
    ]


@given(st.binary(max_size=200))
def test_garbage_is_no_answer(data: bytes) -> None:
    try:
        rtnl.answers(data)
        conntrack.flows(data)
        rtnl.link_index(data)
    except (struct.error, IndexError, ValueError):
        pass  # the kernel doesn't send it; what matters is that parsing ends


ports = st.builds(
    Port,
    st.sampled_from(["tcp", "udp"]),
    st.integers(1, 65535),
    st.integers(1, 65535),
    st.sampled_from(["", "127.0.0.1", "192.0.2.1"]),
)


def elements(data: bytes) -> tuple[str, str, list[tuple[bytes, bytes]]]:
    message = decoded(nft_set_elem_list_msg, data)
    assert message["nfgen_family"] == 2
    found = []
    for element in message.get_attr("NFTA_SET_ELEM_LIST_ELEMENTS"):
        key = element.get_attr("NFTA_SET_ELEM_KEY").get_attr("NFTA_DATA_VALUE")
        value = element.get_attr("NFTA_SET_ELEM_DATA")
        found.append((bytes(key), bytes(value.get_attr("NFTA_DATA_VALUE")) if value else b""))
    return message.get_attr("NFTA_SET_ELEM_LIST_TABLE"), message.get_attr("NFTA_SET_ELEM_LIST_SET"), found


@given(st.lists(ports, unique=True, min_size=1, max_size=8))
def test_elements(published: list[Port]) -> None:
    address = "172.17.0.2"
    packed = ipaddress.IPv4Address(address).packed
    for change, with_value in ((nft.publish, True), (nft.withdraw, False)):
        seen = {}
        messages = change("pyx", [(port, address) for port in published])
        for message in messages:
            table, name, found = elements(message)
            assert table == "pyx" and name in ("pub", "pub_ip") and name not in seen
            seen[name] = found
        for name, chosen in (("pub", ""), ("pub_ip", "x")):
            mine = [port for port in published if bool(port.host_ip) == bool(chosen)]
            expected = []
            for port in mine:
                key = bytes([6 if port.protocol == "tcp" else 17, 0, 0, 0]) + port.host_port.to_bytes(2, "big") + b"\0\0"
                if port.host_ip:
                    key = ipaddress.IPv4Address(port.host_ip).packed + key
                value = packed + port.container_port.to_bytes(2, "big") + b"\0\0"
                expected.append((key, value if with_value else b""))
            assert seen.get(name, []) == expected


def test_a_batch_begins_and_ends() -> None:
    changes = nft.publish("pyx", [(Port("tcp", 80, 8080), "172.17.0.2"), (Port("tcp", 80, 1, "127.0.0.1"), "172.17.0.2")])
    data = nft.batch(changes)
    kinds = []
    while data:
        length, kind, flags, sequence, _ = struct.unpack_from("=IHHII", data)
        kinds.append((kind, sequence, bool(flags & 4)))
        data = data[length:]
    assert kinds == [(0x10, 0, False), (0xA0C, 1, True), (0xA0C, 2, True), (0x11, 3, False)]


def test_a_deleted_table_is_heard_of() -> None:
    def notice(kind: int) -> bytes:
        return struct.pack("=IHHII", 20, 0xA00 | kind, 0, 1, 0) + bytes(4)

    assert nft.tells_of_deleted_table(notice(12) + notice(2))
    assert not nft.tells_of_deleted_table(notice(12) + notice(15))
    assert not nft.tells_of_deleted_table(b"")
    request = decoded(nft_table_msg, nft.get_table("pyx_a1"))
    assert (request["header"]["type"], request.get_attr("NFTA_TABLE_NAME")) == (0xA01, "pyx_a1")


def test_ruleset_text_holds_every_element() -> None:
    published = [(Port("tcp", 80, 8080), "172.17.0.2"), (Port("udp", 53, 5353, "127.0.0.1"), "172.17.0.3")]
    text = nft.ruleset("pyx_a1", "pyx-a1", "172.17.0.0/16", published)
    assert "elements = { tcp . 8080 : 172.17.0.2 . 80 }" in text
    assert "elements = { 127.0.0.1 . udp . 5353 : 172.17.0.3 . 53 }" in text
    assert "elements" not in nft.ruleset("pyx", "pyx0", "172.17.0.0/16")


def flow_message(*, source: str, destination: str, port: int, answered_by: str, protocol: int = 17) -> bytes:
    """An entry of a dump, encoded by pyroute2."""

    def side(source: str, destination: str, source_port: int, destination_port: int) -> dict[str, Any]:
        return {
            "attrs": [
                ("CTA_TUPLE_IP", {"attrs": [("CTA_IP_V4_SRC", source), ("CTA_IP_V4_DST", destination)]}),
                (
                    "CTA_TUPLE_PROTO",
                    {
                        "attrs": [
                            ("CTA_PROTO_NUM", protocol),
                            ("CTA_PROTO_SRC_PORT", source_port),
                            ("CTA_PROTO_DST_PORT", destination_port),
                        ]
                    },
                ),
            ]
        }

    message = nfct_msg()
    message["header"]["type"] = 0x100
    message["nfgen_family"] = 2
    message["attrs"] = [
        ("CTA_TUPLE_ORIG", side(source, destination, 4000, port)),
        ("CTA_TUPLE_REPLY", side(answered_by, source, 53, 4000)),
        ("CTA_STATUS", 0x1FE),
        ("CTA_ID", 77),
    ]
    message.encode()
    return bytes(message.data)


def test_flows() -> None:
    data = flow_message(source="192.0.2.2", destination="192.0.2.1", port=5353, answered_by="172.17.0.2")
    done = struct.pack("=IHHIIi", 20, conntrack.NLMSG_DONE, 2, 1, 0, 0)
    (flow,), ended = conntrack.flows(data)
    assert not ended
    assert (flow.protocol, flow.destination, flow.destination_port, flow.answered_by) == (17, "192.0.2.1", 5353, "172.17.0.2")
    assert conntrack.flows(data + done)[1]
    refusal = struct.pack("=IHHIIi", 36, conntrack.NLMSG_ERROR, 0, 1, 0, -95) + bytes(16)
    with pytest.raises(OSError, match="refused"):  # waiting for an end that never comes would hang netd
        conntrack.flows(refusal)
    request = decoded(nfct_msg, conntrack.delete(3, flow))
    assert request["header"]["type"] == 0x102
    original = request.get_attr("CTA_TUPLE_ORIG")
    assert original.get_attr("CTA_TUPLE_IP").get_attr("CTA_IP_V4_SRC") == "192.0.2.2"
    assert request.get_attr("CTA_ID") == 77


@pytest.mark.parametrize(
    ("stale", "covered"),
    [
        (conntrack.Stale(address="172.17.0.2"), {"behind"}),
        (conntrack.Stale(subnet=ipaddress.IPv4Network("172.17.0.0/16")), {"behind"}),
        (conntrack.Stale(subnet=ipaddress.IPv4Network("172.17.0.0/16"), living=frozenset(("172.17.0.2",))), set()),
        (conntrack.Stale(ports=(Port("udp", 53, 5353),)), {"host"}),
        (conntrack.Stale(ports=(Port("udp", 53, 5353, "192.0.2.1"),)), {"host"}),
        (conntrack.Stale(ports=(Port("udp", 53, 5353, "127.0.0.1"),)), set()),
        (conntrack.Stale(ports=(Port("tcp", 53, 5353),)), set()),
        (conntrack.Stale(ports=(Port("udp", 53, 5354),)), set()),
    ],
)
def test_what_is_stale(stale: conntrack.Stale, covered: set[str]) -> None:
    flows = {
        "behind": conntrack.Flow(17, "192.0.2.1", 5353, "172.17.0.2", b""),
        "host": conntrack.Flow(17, "192.0.2.1", 5353, "192.0.2.1", b""),
        "outbound": conntrack.Flow(6, "198.51.100.7", 443, "198.51.100.7", b""),
    }
    assert {name for name, flow in flows.items() if stale.covers(flow)} == covered

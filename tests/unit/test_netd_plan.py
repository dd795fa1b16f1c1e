from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyx_bus.contract.netd import PortMapping
from pyx_bus.errors import Conflict, InvalidArgument
from pyx_netd import documents, model, plan
from pyx_netd.model import Attachment, Network, Port


def mapping(container_port: int, host_port: int = 0, host_ip: str = "", protocol: str = "tcp") -> PortMapping:
    return PortMapping(container_port=container_port, host_port=host_port, host_ip=host_ip, protocol=protocol)


def test_ports_are_brought_into_one_form() -> None:
    assert plan.ports([mapping(80, 8080, "0.0.0.0"), mapping(80, 8080), mapping(53, 53, "127.0.0.1", "UDP")]) == (
        Port("tcp", 80, 8080),
        Port("udp", 53, 53, "127.0.0.1"),
    )
    assert plan.ports([mapping(80), mapping(81)]) == (Port("tcp", 80), Port("tcp", 81)), "free ports never collide"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (mapping(80, 8080), mapping(81, 8080)),
        (mapping(80, 8080), mapping(81, 8080, "127.0.0.1")),
        (mapping(80, 8080, "127.0.0.1"), mapping(81, 8080)),
        (mapping(80, 8080, "127.0.0.1"), mapping(81, 8080, "127.0.0.1")),
    ],
)
def test_one_host_port_for_two(first: PortMapping, second: PortMapping) -> None:
    with pytest.raises(Conflict, match="published twice"):
        plan.ports([first, second])


def test_one_host_port_on_two_addresses_or_protocols_is_fine() -> None:
    wanted = [mapping(80, 8080, "127.0.0.1"), mapping(80, 8080, "127.0.0.2"), mapping(80, 8080, protocol="udp")]
    assert len(plan.ports(wanted)) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        mapping(0), mapping(65536), mapping(80, -1), mapping(80, 65536), mapping(80, protocol="sctp"), mapping(80, protocol=""),
        mapping(80, host_ip="nowhere"), mapping(80, host_ip="[::1]"), mapping(80, host_ip="1.2.3"),
    ],
)  # fmt: skip
def test_ports_that_cannot_be(wrong: PortMapping) -> None:
    with pytest.raises(InvalidArgument):
        plan.ports([wrong])


@pytest.mark.parametrize("wrong", ["", "..", "../x", "a/b", ".hidden", "a b", "x" * 65])
def test_ids_that_are_no_file_names(wrong: str) -> None:
    with pytest.raises(InvalidArgument):
        plan.container_id(wrong)


def test_mac_addresses() -> None:
    assert plan.mac_address("02-42-AC-11-00-02") == "02:42:ac:11:00:02"
    for wrong in ("", "02:42", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "02:42:ac:11:00:0g"):
        with pytest.raises(InvalidArgument):
            plan.mac_address(wrong)
    assert model.mac_of("172.17.0.2") == "02:42:ac:11:00:02"


def test_names_of_a_stack() -> None:
    assert (model.bridge_name("pyx"), model.table_name("pyx")) == ("pyx0", "pyx")
    assert (model.bridge_name("pyx-a1b2c3"), model.table_name("pyx-a1b2c3")) == ("pyx-a1b2c3", "pyx_a1b2c3")
    long = model.bridge_name("pyx-much-too-long-for-the-kernel")
    assert len(long) <= 15 and long != model.bridge_name("pyx-much-too-long-for-the-kernel2")


def test_resolv_conf() -> None:
    text = """
# a comment
nameserver 192.0.2.53   ; trailing
nameserver 127.0.0.53
nameserver fe80::1%eth0
domain old.example
search a.example b.example .
options ndots:2 edns0
options ndots:2 trust-ad
nonsense
nameserver
"""
    resolver = plan.parse_resolv_conf(text)
    assert resolver.nameservers == ("192.0.2.53", "127.0.0.53", "fe80::1%eth0")
    assert resolver.search == ("a.example", "b.example")
    assert resolver.options == ("ndots:2", "edns0", "trust-ad")
    assert plan.container_resolver(resolver).nameservers == ("192.0.2.53",)
    assert not plan.only_loopback(resolver)
    stub = plan.parse_resolv_conf("nameserver 127.0.0.53\nsearch lan\n")
    assert plan.only_loopback(stub)
    assert plan.container_resolver(stub) == plan.Resolver(("8.8.8.8", "8.8.4.4"), ("lan",), ())
    assert plan.container_resolver(plan.parse_resolv_conf("")).nameservers == ("8.8.8.8", "8.8.4.4")


@given(st.text())
def test_any_resolv_conf_gives_a_usable_one(text: str) -> None:
    assert plan.container_resolver(plan.parse_resolv_conf(text)).nameservers


BRIDGE = Network(
    "b" * 64, "bridge", "bridge", 1_700_000_000_123_456_789, "172.17.0.0/16", "172.17.0.1", "pyx0", labels={"team": "a"}
)


@pytest.mark.parametrize(
    ("filters", "hit"),
    [
        ({}, True),
        ({"name": ["rid"]}, True),
        ({"name": ["x", "rid"]}, True),
        ({"name": ["rid"], "driver": ["null"]}, False),
        ({"id": ["bbb"]}, True),
        ({"id": ["a"]}, False),
        ({"type": ["builtin"]}, True),
        ({"type": ["custom"]}, False),
        ({"scope": ["local"]}, True),
        ({"label": ["team"]}, True),
        ({"label": ["team=a", "team=b"]}, False),
        ({"name": []}, True),
    ],
)
def test_filters(filters: dict[str, list[str]], hit: bool) -> None:
    assert plan.matches(BRIDGE, filters) is hit


@pytest.mark.parametrize("filters", [{"dangling": ["true"]}, {"type": ["other"]}])
def test_filters_that_are_none(filters: dict[str, list[str]]) -> None:
    with pytest.raises(InvalidArgument, match="invalid filter"):
        plan.matches(BRIDGE, filters)


def test_the_document_is_dockers() -> None:
    attachment = Attachment("c" * 64, BRIDGE.id, "e" * 64, "web", "/ns", 7, 0, "172.17.0.2", "02:42:ac:11:00:02", "veth1")
    shown = documents.document(BRIDGE, [attachment])
    assert list(shown) == [
        "Name", "Id", "Created", "Scope", "Driver", "EnableIPv6", "IPAM", "Internal", "Attachable", "Ingress", "ConfigFrom",
        "ConfigOnly", "Containers", "Options", "Labels",
    ]  # fmt: skip
    assert shown["Created"] == "2023-11-14T22:13:20.123456789Z"
    assert shown["IPAM"] == {
        "Driver": "default", "Options": None, "Config": [{"Subnet": "172.17.0.0/16", "Gateway": "172.17.0.1"}],
    }  # fmt: skip
    assert shown["Containers"] == {
        "c" * 64: {
            "Name": "web", "EndpointID": "e" * 64, "MacAddress": "02:42:ac:11:00:02", "IPv4Address": "172.17.0.2/16",
            "IPv6Address": "",
        }
    }  # fmt: skip

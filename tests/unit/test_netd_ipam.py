from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyx_bus.errors import Conflict, InvalidArgument, ResourceExhausted
from pyx_netd import ipam

SUBNET = ipaddress.IPv4Network("10.1.2.0/28")
GATEWAY = ipam.gateway_of(SUBNET)


class Pool(RuleBasedStateMachine):
    """Any sequence of takes and releases keeps what the module promises."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ipam.AddressPool(SUBNET, GATEWAY)
        self.taken: set[ipaddress.IPv4Address] = set()
        self.last_released: ipaddress.IPv4Address | None = None

    @property
    def free(self) -> set[ipaddress.IPv4Address]:
        return set(SUBNET.hosts()) - {GATEWAY} - self.taken

    @precondition(lambda self: self.free)
    @rule()
    def take(self) -> None:
        free = self.free
        address = self.pool.take()
        assert address in free
        assert address != self.last_released or len(free) == 1
        self.taken.add(address)

    @precondition(lambda self: not self.free)
    @rule()
    def exhausted(self) -> None:
        with pytest.raises(ResourceExhausted):
            self.pool.take()

    @rule(number=st.integers(0, 15))
    def take_exactly(self, number: int) -> None:
        address = SUBNET[number]
        if address in self.free:
            assert self.pool.take_exactly(str(address)) == address
            self.taken.add(address)
        else:
            with pytest.raises((Conflict, InvalidArgument)):
                self.pool.take_exactly(str(address))

    @rule(number=st.integers(0, 15))
    def release(self, number: int) -> None:
        address = SUBNET[number]
        if address in self.taken:
            self.last_released = address
        self.pool.release(str(address))
        self.taken.discard(address)

    @invariant()
    def counts(self) -> None:
        assert len(self.pool) == len(self.taken)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)


def test_addresses_go_round() -> None:
    pool = ipam.AddressPool(ipaddress.IPv4Network("10.0.0.0/29"), ipaddress.IPv4Address("10.0.0.1"))
    assert [str(pool.take()) for _ in range(3)] == ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
    pool.release("10.0.0.3")
    assert [str(pool.take()) for _ in range(2)] == ["10.0.0.5", "10.0.0.6"]
    assert str(pool.take()) == "10.0.0.3"
    with pytest.raises(ResourceExhausted):
        pool.take()


def test_the_round_goes_on_after_a_restart() -> None:
    subnet = ipaddress.IPv4Network("172.17.0.0/16")
    pool = ipam.AddressPool(subnet, ipam.gateway_of(subnet), (), int(ipaddress.IPv4Address("172.17.0.9")))
    assert str(pool.take()) == "172.17.0.10"
    other = ipam.AddressPool(subnet, ipam.gateway_of(subnet), (), int(ipaddress.IPv4Address("10.0.0.1")))
    assert str(other.take()) == "172.17.0.2", "a cursor of another subnet is forgotten"


@pytest.mark.parametrize("wanted", ["172.17.0.0", "172.17.0.1", "172.17.255.255", "172.18.0.2", "nonsense", "fe80::1", ""])
def test_addresses_nobody_can_have(wanted: str) -> None:
    subnet = ipaddress.IPv4Network("172.17.0.0/16")
    with pytest.raises(InvalidArgument):
        ipam.AddressPool(subnet, ipam.gateway_of(subnet)).take_exactly(wanted)


subnets = st.builds(
    lambda number, length: ipaddress.IPv4Network((number >> (32 - length) << (32 - length), length)),
    st.integers(0, 2**32 - 1),
    st.integers(8, 32),
)


@given(st.lists(subnets, max_size=20))
def test_a_picked_subnet_overlaps_nothing(occupied: list[ipaddress.IPv4Network]) -> None:
    try:
        picked = ipam.pick_subnet(occupied)
    except ResourceExhausted:
        assert all(any(candidate.overlaps(other) for other in occupied) for candidate in ipam.candidates())
    else:
        assert not any(picked.overlaps(other) for other in occupied)


def test_the_first_subnet_is_dockers() -> None:
    assert str(ipam.pick_subnet([])) == "172.17.0.0/16"
    assert len(list(ipam.candidates())) == 31


@pytest.mark.parametrize("text", ["172.17.0.1/16", "172.17.0.0/31", "172.17.0.0/99", "x", "fd00::/64"])
def test_subnets_that_cannot_be(text: str) -> None:
    with pytest.raises(InvalidArgument):
        ipam.parse_subnet(text)

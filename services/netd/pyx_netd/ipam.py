"""Which address next, which subnet for a bridge. Pure: what is taken comes in as arguments.

Addresses go round: the search begins behind the one given last, and passes by the one released last as long as there is another, so
that an address isn't given to somebody else while neighbours, peers and conntrack still remember its former owner.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator

from pyx_bus.errors import Conflict, InvalidArgument, ResourceExhausted

IPv4 = ipaddress.IPv4Address
Subnet = ipaddress.IPv4Network

DEFAULT_POOLS: tuple[tuple[str, int], ...] = (
    *((f"172.{second}.0.0/16", 16) for second in range(17, 32)),
    ("192.168.0.0/16", 20),
)
"""Docker's default-address-pools: a base and the prefix length of the subnets cut from it."""


def gateway_of(subnet: Subnet) -> IPv4:
    """The bridge's own address: the subnet's first usable one."""
    return subnet.network_address + 1


def parse_subnet(text: str) -> Subnet:
    """A subnet out of the configuration. Errors: invalid_argument (malformed, host bits set, fewer than one address to give)."""
    try:
        subnet = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise InvalidArgument(f'invalid subnet "{text}": {error}', hint="write it as 172.20.0.0/16") from None
    if subnet.prefixlen > 30:
        raise InvalidArgument(f'subnet "{text}" is too small: it holds no address besides the gateway')
    return subnet


def candidates(pools: Iterable[tuple[str, int]] = DEFAULT_POOLS) -> Iterator[Subnet]:
    """Every subnet of the pools, in order."""
    for base, prefix_length in pools:
        yield from ipaddress.IPv4Network(base).subnets(new_prefix=prefix_length)


def pick_subnet(occupied: Collection[Subnet], pools: Iterable[tuple[str, int]] = DEFAULT_POOLS) -> Subnet:
    """The first subnet of the pools that overlaps nothing occupied. Errors: resource_exhausted."""
    for subnet in candidates(pools):
        if not any(subnet.overlaps(other) for other in occupied):
            return subnet
    raise ResourceExhausted(
        "every subnet of the default address pools overlaps one of the host's routes",
        hint="set bridge_subnet in the [netd] table of the configuration",
    )


class AddressPool:
    """The addresses of one subnet: which are given out, and where the search goes on.

    The network, broadcast and gateway addresses are never given. ``cursor`` is the address given last (0: none yet).
    """

    def __init__(self, subnet: Subnet, gateway: IPv4, taken: Iterable[IPv4] = (), cursor: int = 0) -> None:
        self.subnet = subnet
        self.gateway = gateway
        self._first = int(subnet.network_address) + 1
        self._last = int(subnet.broadcast_address) - 1
        self._taken = {int(address) for address in taken}
        self.cursor = cursor if self._first <= cursor <= self._last else self._first - 1
        self._released_last = 0

    def __len__(self) -> int:
        return len(self._taken)

    def take(self) -> IPv4:
        """The next free address behind the cursor. Errors: resource_exhausted."""
        gateway = int(self.gateway)
        size = self._last - self._first + 1
        free = size - 1 - len(self._taken)
        for step in range(1, size + 1 if free else 1):  # a full /16 isn't walked
            number = self._first + (self.cursor - self._first + step) % size
            if number == gateway or number in self._taken or (number == self._released_last and free > 1):
                continue
            self._taken.add(number)
            self.cursor = number
            return IPv4(number)
        raise ResourceExhausted(f'no free address left in subnet "{self.subnet}"')

    def take_exactly(self, text: str) -> IPv4:
        """A wanted address. Errors: invalid_argument (malformed, outside, reserved), conflict (taken)."""
        try:
            address = IPv4(text)
        except ValueError:
            raise InvalidArgument(f'invalid IPv4 address "{text}"') from None
        if address not in self.subnet:
            raise InvalidArgument(f'address "{text}" is not in subnet "{self.subnet}"')
        number = int(address)
        if not self._first <= number <= self._last or address == self.gateway:
            raise InvalidArgument(f'address "{text}" is reserved in subnet "{self.subnet}"')
        if number in self._taken:
            raise Conflict(f'address "{text}" is already in use')
        self._taken.add(number)
        return address

    def release(self, address: str) -> None:
        """Give an address back. Idempotent."""
        number = int(IPv4(address))
        if number in self._taken:
            self._taken.discard(number)
            self._released_last = number

"""What a network driver is.

Theory of operation. The service owns names, IDs and the store; a driver owns what a network is made of on the host. At a start the
service gives the driver its network and every attachment that survived; the driver makes the host agree with them. An attachment is
complete when ``attach`` returns, and is committed to the store only then: whatever a killed netd had half-made is found at the next
start by not being in the store, and dropped. For that, anything a driver makes must either die with the container's namespace, live in
this process (port reservations), or be rebuilt whole by ``start`` (the nftables table).

The service never runs two operations for one container at a time; for different containers they do run at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..model import Attachment, Network, Port


@dataclass(frozen=True, slots=True)
class Order:
    """What ``attach`` shall make, checked. ``address`` and ``mac`` empty: the driver's choice. ``netns``: where to keep the namespace."""

    container_id: str
    container_name: str
    endpoint_id: str
    netns: str
    created_ns: int
    address: str = ""
    mac: str = ""
    ports: tuple[Port, ...] = ()


class Driver(Protocol):
    """A network driver."""

    async def start(self, network: Network, attachments: Sequence[Attachment]) -> Network:
        """Make the host ready and restore what the attachments need; returns the network as it now is (a subnet may be picked here).

        Idempotent. A host that can't carry the network now is no error: it's logged, and ``attach`` tries again and tells.
        """
        ...

    async def attach(self, order: Order) -> Attachment:
        """Make a namespace with an endpoint. On any error, and when cancelled, nothing stays."""
        ...

    def detach(self, attachment: Attachment) -> None:
        """Take everything down, so that a new attachment may have the same ports; slow kernel work goes on behind. Idempotent.

        Goes on past a failure; raises the first one at the end.
        """
        ...

    def network(self) -> Network:
        """The network as it is on the host now: making the host ready again may have given it another subnet."""
        ...

    def cursor(self) -> int:
        """The number of the address given last, to be stored with an attachment; 0 where there are no addresses."""
        ...

    async def stop(self, *, idle: bool) -> None:
        """The service ends in order. ``idle``: nothing is attached any more, so what the driver made on the host is to go too."""
        ...

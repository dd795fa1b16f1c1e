"""Network ``none``: a namespace with lo alone. Network ``host``: the host's own, so there is nothing to make."""

from __future__ import annotations

from collections.abc import Sequence

from pyx_bus.errors import InvalidArgument

from ..kernel import namespaces, syscalls
from ..model import Attachment, Network
from ..sandbox import NamespacePool
from .base import Order


class _Plain:
    """What none and host have in common: no addresses, no ports, nothing on the host."""

    _network: Network

    async def start(self, network: Network, attachments: Sequence[Attachment]) -> Network:
        self._network = network
        return network

    def network(self) -> Network:
        return self._network

    def cursor(self) -> int:
        return 0

    async def stop(self, *, idle: bool) -> None:
        pass

    def _refuse_endpoint_settings(self, order: Order) -> None:
        for what, given in (("an IPv4 address", order.address), ("a MAC address", order.mac)):
            if given:
                raise InvalidArgument(f'network "{self._network.name}" can\'t give a container {what}')

    def _attachment(self, order: Order, netns: str, inode: int) -> Attachment:
        return Attachment(
            order.container_id, self._network.id, order.endpoint_id, order.container_name, netns, inode, order.created_ns
        )


class NoneDriver(_Plain):
    """A namespace of its own. Published ports are ignored, as Docker does: nothing could reach them."""

    def __init__(self, pool: NamespacePool) -> None:
        self._pool = pool

    async def attach(self, order: Order) -> Attachment:
        self._refuse_endpoint_settings(order)
        namespace = await self._pool.take()
        try:
            namespace.keep(order.netns)
        except OSError as error:
            raise syscalls.failure("keep the network namespace", error) from error
        finally:
            namespace.close()
        return self._attachment(order, order.netns, namespace.inode)

    def detach(self, attachment: Attachment) -> None:
        if attachment.netns:
            namespaces.drop(attachment.netns)


class HostDriver(_Plain):
    """The host's own namespace. Published ports are ignored, as Docker does: the process listens on the host itself."""

    async def attach(self, order: Order) -> Attachment:
        self._refuse_endpoint_settings(order)
        return self._attachment(order, "", 0)

    def detach(self, attachment: Attachment) -> None:
        pass

"""Network ``bridge``: a Linux bridge, a veth pair per container, outbound NAT and published ports by nftables.

On the host there are one bridge and one table per stack, named after the stack's prefix. A container's start costs one rtnetlink
batch on the host's side, one inside the namespace, and one nfnetlink transaction if ports are published.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import trio
from structlog.typing import FilteringBoundLogger

from pyx_bus.errors import BusError, FailedPrecondition

from .. import conntrack, ipam, nft, plan, rtnl
from ..kernel import host, namespaces, syscalls
from ..kernel.namespaces import Namespace
from ..kernel.netlink import NetfilterSocket, RouteSocket, TableWatch
from ..kernel.ports import Reservations
from ..model import CONTAINER_INTERFACE, Attachment, Network, mac_of
from ..sandbox import NamespacePool
from .base import Order

_FORGET_DELAY_S = 2.0


@dataclass(frozen=True, slots=True)
class _Ready:
    """The host's side as it was made: valid until something on the host removes it."""

    bridge_index: int
    gateway: ipaddress.IPv4Interface


class BridgeDriver:
    """The default network. ``configured_subnet``: what the administrator fixed, else one is picked that overlaps nothing."""

    def __init__(
        self,
        *,
        bridge: str,
        table: str,
        configured_subnet: ipaddress.IPv4Network | None,
        namespaces_pool: NamespacePool,
        nursery: trio.Nursery,
        log: FilteringBoundLogger,
        cursor: int = 0,
    ) -> None:
        self._bridge = bridge
        self._table = table
        self._configured_subnet = configured_subnet
        self._namespaces = namespaces_pool
        self._nursery = nursery
        self._log = log
        self._first_cursor = cursor
        self._route = RouteSocket()
        self._netfilter = NetfilterSocket()
        self._reservations = Reservations()
        self._attached: dict[str, Attachment] = {}
        self._stale: list[conntrack.Stale] = []
        self._hurry = trio.Event()
        self._walked = trio.Event()
        self._watching = trio.CancelScope()
        self._preparing = trio.Lock()
        self._ready: _Ready | None = None
        self._network: Network
        self._addresses: ipam.AddressPool | None = None

    # -- the host's side

    async def start(self, network: Network, attachments: Sequence[Attachment]) -> Network:
        self._network = network
        if attachments:
            subnet = ipaddress.IPv4Network(network.subnet)
            taken = [ipaddress.IPv4Address(attachment.address) for attachment in attachments]
            self._addresses = ipam.AddressPool(subnet, ipam.gateway_of(subnet), taken, self._first_cursor)
        for attachment in attachments:
            self._attached[attachment.container_id] = attachment
            for error in self._reservations.restore(attachment.ports):
                # Somebody took the port while netd was away. The container keeps it as far as DNAT goes, which comes first.
                self._log.warning("can't reserve a published port again", container=attachment.container_id, error=str(error))
        try:
            await self._prepare()
        except BusError as error:
            self._log.error("the bridge network isn't usable", bridge=self._bridge, error=str(error))
        if self._first_cursor and self._addresses is not None:
            # Somebody had an address in this boot. Waited for: those who get one from now on aren't among the living yet.
            living = frozenset((self._network.gateway, *(attachment.address for attachment in attachments)))
            self._stale.append(conntrack.Stale(subnet=self._addresses.subnet, living=living))
            self._hurry.set()
            await self._forget()
        self._nursery.start_soon(self._watch)
        return self._network

    async def _watch(self) -> None:
        """Write the table anew whenever somebody flushes it away, so that running containers keep their ports."""
        with self._watching, contextlib.closing(TableWatch()) as watch:
            while True:
                await trio.lowlevel.wait_readable(watch)
                if not watch.deleted_nowait() or self._ready is None or self._netfilter.has_table(self._table):
                    continue
                self._log.warning("the nftables table was removed by somebody else; writing it anew", table=self._table)
                self._ready = None
                try:
                    await self._prepare()
                except BusError as error:
                    self._log.error("can't write the nftables table anew", table=self._table, error=str(error))

    async def _prepare(self) -> tuple[_Ready, ipam.AddressPool]:
        """Have bridge, address, sysctls and table in place. Idempotent."""
        async with self._preparing:
            if (ready := self._ready) is None:
                in_use = self._addresses is not None and len(self._addresses) > 0
                attached = list(self._attached.values())
                network, made = await trio.to_thread.run_sync(self._prepare_host, in_use, attached)
                self._catch_up(attached)
                self._network, self._ready, ready = network, made, made
            subnet = ipaddress.IPv4Network(self._network.subnet)
            if self._addresses is None or self._addresses.subnet != subnet:
                self._addresses = ipam.AddressPool(subnet, ready.gateway.ip, (), self._first_cursor)
            return ready, self._addresses

    def _catch_up(self, written: Sequence[Attachment]) -> None:
        """Bring a table just written up to date with who came and went while it was being written."""
        before = {item for attachment in written for item in _published(attachment)}
        now = {item for attachment in self._attached.values() for item in _published(attachment)}
        try:
            self._netfilter.commit(nft.publish(self._table, now - before))
            self._withdraw(tuple(before - now))
        except OSError as error:
            raise syscalls.failure("bring the nftables table up to date", error) from error

    def _prepare_host(self, in_use: bool, attached: Sequence[Attachment]) -> tuple[Network, _Ready]:
        with host.subnet_lock():
            around = host.surroundings(self._bridge)
            subnet = self._choose_subnet(around, in_use)
            gateway = ipaddress.IPv4Interface(f"{ipam.gateway_of(subnet)}/{subnet.prefixlen}")
            members = [attachment.host_interface for attachment in attached]
            index = host.ensure_bridge(self._bridge, gateway, around.mtu, members)
        published = [item for attachment in attached for item in _published(attachment)]
        host.load_ruleset(nft.ruleset(self._table, self._bridge, str(subnet), published))
        network = replace(
            self._network, subnet=str(subnet), gateway=str(gateway.ip), bridge=self._bridge, mtu=around.mtu
        )
        return network, _Ready(index, gateway)

    def _choose_subnet(self, around: host.Surroundings, in_use: bool) -> ipaddress.IPv4Network:
        """The subnet in use, the configured one, the one picked before if it's still free, else a free one, in this order."""
        stored = ipaddress.IPv4Network(self._network.subnet) if self._network.subnet else None
        if in_use and stored is not None:
            if self._configured_subnet not in (None, stored):
                self._log.warning("bridge_subnet changes once no container is attached", in_use=str(stored))
            return stored
        if self._configured_subnet is not None:
            for other in around.occupied:
                if self._configured_subnet.overlaps(other):
                    raise FailedPrecondition(
                        f'bridge_subnet "{self._configured_subnet}" overlaps "{other}", which the host already routes'
                    )
            return self._configured_subnet
        resolvers = plan.parse_resolv_conf("\n".join(host.read_resolv_conf())).nameservers
        occupied = [*around.occupied]
        for resolver in resolvers:
            try:
                occupied.append(ipaddress.IPv4Network(resolver))
            except ValueError:
                pass  # IPv6
        if stored is not None and not any(stored.overlaps(other) for other in occupied):
            return stored
        return ipam.pick_subnet(occupied)

    async def stop(self, *, idle: bool) -> None:
        self._watching.cancel()
        try:
            if idle:
                await trio.to_thread.run_sync(self._remove_from_host)
        finally:
            self._reservations.close()
            self._route.close()
            self._netfilter.close()

    def _remove_from_host(self) -> None:
        try:
            host.remove_table(self._table)
        finally:
            host.remove_bridge(self._bridge)

    # -- containers

    def network(self) -> Network:
        return self._network

    def cursor(self) -> int:
        return self._addresses.cursor if self._addresses is not None else 0

    async def attach(self, order: Order) -> Attachment:
        if self._ready is not None and self._addresses is not None:
            ready, addresses = self._ready, self._addresses
        else:
            ready, addresses = await self._prepare()
        address = addresses.take_exactly(order.address) if order.address else addresses.take()
        attachment = Attachment(
            order.container_id, self._network.id, order.endpoint_id, order.container_name, order.netns, 0, order.created_ns,
            address=str(address), mac=order.mac or mac_of(str(address)), host_interface=f"veth{os.urandom(5).hex()}",
        )  # fmt: skip
        try:
            await self._forgotten(attachment.address)
            attachment = replace(attachment, ports=self._reservations.reserve(order.ports))
            namespace = await self._namespaces.take()
            attachment = replace(attachment, netns_inode=namespace.inode)
            try:
                await self._connect(namespace, attachment, ready)
                namespace.keep(attachment.netns)
            except OSError as error:
                raise syscalls.failure("connect the container to the bridge", error) from error
            finally:
                namespace.close()
            self._attached[attachment.container_id] = attachment
            if attachment.ports:
                await self._publish(attachment)
        except BaseException:
            self.detach(attachment)
            raise
        return attachment

    async def _connect(self, namespace: Namespace, attachment: Attachment, ready: _Ready) -> None:
        try:
            await trio.to_thread.run_sync(self._connect_now, namespace, attachment, ready)
        except OSError:
            if host.exists(self._bridge):
                raise
            # Somebody deleted the bridge under us: make it again, once.
            self._log.warning("the bridge is gone; making it again", bridge=self._bridge)
            self._ready = None
            ready, _ = await self._prepare()
            await trio.to_thread.run_sync(self._connect_now, namespace, attachment, ready)

    def _connect_now(self, namespace: Namespace, attachment: Attachment, ready: _Ready) -> None:
        """About 0.6 ms, more while the kernel holds its rtnl lock for others: runs in a thread."""
        messages = [
            rtnl.veth(
                1, host=attachment.host_interface, peer=CONTAINER_INTERFACE, peer_mac=attachment.mac,
                netns_fd=namespace.fd, master=ready.bridge_index, mtu=self._network.mtu,
            )
        ]  # fmt: skip
        if host.bridged_packets_filtered():
            messages.append(rtnl.hairpin(2, attachment.host_interface))
        self._route.run(*messages)
        port_index = self._route.link_index(attachment.host_interface)
        self._route.run(rtnl.forward_to(1, port_index, attachment.mac))
        interface = ipaddress.IPv4Interface(f"{attachment.address}/{ready.gateway.network.prefixlen}")
        index = namespace.route.link_index(CONTAINER_INTERFACE)
        namespace.route.run(
            rtnl.address(1, index, interface), rtnl.link_up(2, index), rtnl.default_route(3, ready.gateway.ip)
        )

    async def _publish(self, attachment: Attachment) -> None:
        try:
            self._netfilter.commit(nft.publish(self._table, _published(attachment)))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EEXIST, errno.EBUSY):
                raise syscalls.failure("publish the ports", error) from error
            # The table or what it should hold isn't what we left there ("nft flush ruleset"): write it anew, with these ports.
            self._log.warning("the nftables table was changed by somebody else; writing it anew", table=self._table)
            self._ready = None
            await self._prepare()
        udp = tuple(port for port in attachment.ports if port.protocol == "udp")
        if udp:
            self._forget_soon(conntrack.Stale(ports=udp))

    def detach(self, attachment: Attachment) -> None:
        """0.3 ms: an nftables transaction, an unmount."""
        failures: list[OSError] = []
        known = self._attached.pop(attachment.container_id, None)
        published = _published(known) if known is not None else ()
        if published:
            try:
                self._withdraw(published)
            except OSError as error:
                failures.append(error)
        self._reservations.release(attachment.ports)
        try:
            namespaces.drop(attachment.netns)
        except OSError as error:
            failures.append(error)
        if self._addresses is not None:
            self._addresses.release(attachment.address)
        if published:
            self._forget_soon(conntrack.Stale(address=attachment.address))
        if failures:
            raise syscalls.failure("take the container's endpoint down", failures[0])

    def _withdraw(self, published: tuple[nft.Published, ...]) -> None:
        try:
            self._netfilter.commit(nft.withdraw(self._table, published))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            # One is missing, so the transaction removed none: each by itself.
            for item in published:
                try:
                    self._netfilter.commit(nft.withdraw(self._table, (item,)))
                except OSError as single:
                    if single.errno != errno.ENOENT:
                        raise

    def _forget_soon(self, stale: conntrack.Stale) -> None:
        """Drop tracked flows behind the answer.

        A walk through the kernel's table takes 9 ms of a CPU however few entries it has, and holds up RCU and so other starts. So one
        serves all containers that ended lately. A UDP port that was just published is in a hurry, and who gets a former address.
        """
        self._stale.append(stale)
        if stale.ports:
            self._hurry.set()
        if len(self._stale) == 1:
            self._nursery.start_soon(self._forget)

    async def _forgotten(self, address: str) -> None:
        """Wait until no flow of an address's former owner is left. At once, unless the whole subnet was given round meanwhile."""
        while any(stale.address == address for stale in self._stale):
            self._hurry.set()
            await self._walked.wait()

    async def _forget(self) -> None:
        while self._stale:
            with trio.move_on_after(_FORGET_DELAY_S):
                await self._hurry.wait()
            self._hurry = trio.Event()
            stale = tuple(self._stale)
            try:
                # A socket of its own: walking a big table must not make the next container's ports wait.
                await trio.to_thread.run_sync(_forget_now, stale)
            except OSError as error:
                # It costs a client the time-out of its flow, nothing else.
                self._log.warning("can't drop tracked connections", error=str(error))
            del self._stale[: len(stale)]
            self._walked.set()
            self._walked = trio.Event()


def _published(attachment: Attachment) -> tuple[nft.Published, ...]:
    return tuple((port, attachment.address) for port in attachment.ports)


def _forget_now(stale: tuple[conntrack.Stale, ...]) -> None:
    with contextlib.closing(NetfilterSocket()) as netfilter:
        netfilter.forget(stale)

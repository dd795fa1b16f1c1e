"""The use cases: attach, detach, retain, list, inspect; the start that makes kernel and store agree again, the orderly end.

Invariants. An attachment is in the store exactly while it's whole. One container's operations run one after another. An orderly end takes
nothing away from containers; only when nothing is attached do the stack's bridge and table go, so that a stack that was shut down
leaves the host as it found it (bar net.ipv4.ip_forward, which stays on as Docker leaves it).
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio
from structlog.typing import FilteringBoundLogger

from pyx_bus.contract.base import Event
from pyx_bus.contract.netd import (
    AttachContainer,
    NetworkConnected,
    NetworkDisconnected,
    PortMapping,
    PortsPublished,
    PortsReleased,
)
from pyx_bus.errors import BusError, InvalidArgument, NotFound

from . import plan
from .drivers.base import Driver, Order
from .kernel import host, namespaces
from .model import Attachment, Network, Port, namespace_file
from .store import AttachmentStore, NetworkStore

DEFAULT_NETWORKS = (("bridge", "bridge"), ("host", "host"), ("none", "null"))
"""Name and driver of the networks that are always there, Docker's."""

_STOP_TIMEOUT_S = 10.0


class Networks:
    """netd's state and what it does with it. ``drivers`` by the name in Network.driver."""

    def __init__(
        self,
        *,
        run: Path,
        networks: NetworkStore,
        attachments: AttachmentStore,
        drivers: Mapping[str, Driver],
        publish: Callable[[Event], None],
        log: FilteringBoundLogger,
    ) -> None:
        self._namespace_directory = run / "ns"
        self._network_store = networks
        self._store = attachments
        self._drivers = drivers
        self._publish = publish
        self._log = log
        self._networks: dict[str, Network] = {}
        self._attachments: dict[str, Attachment] = {}
        self._locks: dict[str, tuple[trio.Lock, int]] = {}

    # -- start and end

    async def start(self) -> None:
        """Make the kernel and the store agree: whatever was half-made is dropped, whatever lives is served again."""
        self._namespace_directory.mkdir(mode=0o711, exist_ok=True)
        for network in self._network_store.load():
            self._networks[network.id] = network
        present = {network.name for network in self._networks.values()}
        for name, driver in DEFAULT_NETWORKS:
            if name not in present:
                self._save(Network(os.urandom(32).hex(), name, driver, time.time_ns()))
        dropped: list[Attachment] = []
        for attachment in self._store.load():
            gone = attachment.netns and not namespaces.alive(attachment.netns, attachment.netns_inode)
            if gone or attachment.network_id not in self._networks:
                self._store.remove(attachment.container_id)
                self._log.info("dropped an attachment whose namespace is gone", container=attachment.container_id)
                dropped.append(attachment)
            else:
                self._attachments[attachment.container_id] = attachment
        keep = {Path(attachment.netns).name for attachment in self._attachments.values() if attachment.netns}
        for name in namespaces.sweep(self._namespace_directory, keep):
            self._log.info("dropped a namespace nobody owns", container=name)
        for network in list(self._networks.values()):
            mine = [attachment for attachment in self._attachments.values() if attachment.network_id == network.id]
            self._save(await self._drivers[network.driver].start(network, mine))
        for attachment in dropped:
            if attachment.network_id in self._networks:
                self._tell_gone(self._networks[attachment.network_id], attachment)

    def _save(self, network: Network) -> None:
        before = self._networks.get(network.id)
        self._networks[network.id] = network
        # Bridge and MTU are found anew at each start; the rest is what's worth a write.
        if before is None or (before.subnet, before.gateway) != (network.subnet, network.gateway) or before.name != network.name:
            self._network_store.save(network)

    async def stop(self) -> None:
        """The orderly end. Goes on past a failure, and logs it. Bounded, so that it may be shielded from cancellation."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _STOP_TIMEOUT_S):
            for network in self._networks.values():
                idle = not any(attachment.network_id == network.id for attachment in self._attachments.values())
                try:
                    await self._drivers[network.driver].stop(idle=idle)
                except (BusError, OSError) as error:
                    self._log.error("can't take a network down", network=network.name, error=str(error))
        self._store.close()
        self._network_store.close()

    # -- networks

    def find(self, reference: str) -> Network:
        """By name, ID, or unambiguous ID prefix. Errors: not_found, invalid_argument (ambiguous)."""
        if reference in ("", "default"):
            reference = "bridge"
        for network in self._networks.values():
            if reference in (network.name, network.id):
                return network
        found = [network for network in self._networks.values() if network.id.startswith(reference)]
        if len(found) > 1:
            raise InvalidArgument(f'network "{reference}" is ambiguous ({len(found)} matches)', hint="give more of its ID")
        if not found:
            raise NotFound(f'no such network: "{reference}"', hint='"pyx network ls" lists them')
        return found[0]

    def select(self, filters: Mapping[str, Sequence[str]]) -> list[Network]:
        """Those that Docker's filters select, by name. Errors: invalid_argument (unknown filter)."""
        chosen = [network for network in self._networks.values() if plan.matches(network, filters)]
        return sorted(chosen, key=lambda network: network.name)

    def attached_to(self, network: Network) -> list[Attachment]:
        return [attachment for attachment in self._attachments.values() if attachment.network_id == network.id]

    # -- containers

    @asynccontextmanager
    async def _container(self, container_id: str) -> AsyncIterator[None]:
        """Wait for other operations on this container, and keep them waiting."""
        lock, users = self._locks.get(container_id, (trio.Lock(), 0))
        self._locks[container_id] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[container_id]
            if users == 1:
                del self._locks[container_id]
            else:
                self._locks[container_id] = (lock, users - 1)

    async def attach(self, request: AttachContainer) -> tuple[Attachment, Network]:
        """Make the container's namespace and endpoint, or find them again. Errors: those of the contract."""
        container_id = plan.container_id(request.container_id)
        async with self._container(container_id):
            known = self._attachments.get(container_id)
            if known is not None:
                if not known.netns or namespaces.alive(known.netns, known.netns_inode):
                    return known, self._networks[known.network_id]
                self._log.warning("a namespace was unmounted by somebody else; making another", container=container_id)
                self._drop(known)
            network = self.find(request.network)
            order = Order(
                container_id=container_id,
                container_name=request.container_name or request.hostname,
                endpoint_id=os.urandom(32).hex(),
                netns=str(self._namespace_directory / namespace_file(container_id)),
                created_ns=time.time_ns(),
                address=request.ipv4_address,
                mac=plan.mac_address(request.mac_address) if request.mac_address else "",
                ports=plan.ports(request.ports),
            )
            driver = self._drivers[network.driver]
            attachment = await driver.attach(order)
            network = driver.network()
            try:
                self._save(network)
                self._store.add(attachment, driver.cursor())
            except BaseException:
                driver.detach(attachment)
                raise
            self._attachments[container_id] = attachment
            self._tell_there(network, attachment)
        return attachment, network

    async def detach(self, container_id: str) -> None:
        """Take a container's network down. An unknown ID is fine."""
        async with self._container(container_id):
            attachment = self._attachments.get(container_id)
            if attachment is not None:
                self._drop(attachment)

    def _drop(self, attachment: Attachment) -> None:
        # The row goes last: killed in between, the next start finds it, sees that its namespace is gone, and finishes.
        try:
            self._drivers[self._networks[attachment.network_id].driver].detach(attachment)
        finally:
            del self._attachments[attachment.container_id]
            self._tell_gone(self._networks[attachment.network_id], attachment)
            self._store.remove(attachment.container_id)

    async def retain(self, container_ids: Sequence[str], before_ns: int) -> list[str]:
        """Release what is held for others than these, if made before ``before_ns``; returns whose it was."""
        keep = set(container_ids)
        released = []
        for attachment in list(self._attachments.values()):
            if attachment.container_id in keep or attachment.created_ns >= before_ns:
                continue
            try:
                await self.detach(attachment.container_id)
            except BusError as error:
                self._log.error("can't release leftovers", container=attachment.container_id, error=str(error))
            released.append(attachment.container_id)
        return released

    # Events are published with the change of what list and inspect answer, no await in between: an answer and the events after it
    # fit together.

    def _tell_there(self, network: Network, attachment: Attachment) -> None:
        attributes = {"name": network.name, "type": network.driver, "container": attachment.container_id}
        self._publish(NetworkConnected(id=network.id, time_ns=time.time_ns(), attributes=attributes))
        if attachment.ports:
            attributes = {**attributes, "ports": plan.ports_text(attachment.ports)}
            ports = [mapping(port) for port in attachment.ports]
            self._publish(PortsPublished(id=network.id, time_ns=time.time_ns(), attributes=attributes, ports=ports))

    def _tell_gone(self, network: Network, attachment: Attachment) -> None:
        attributes = {"name": network.name, "type": network.driver, "container": attachment.container_id}
        if attachment.ports:
            named = {**attributes, "ports": plan.ports_text(attachment.ports)}
            ports = [mapping(port) for port in attachment.ports]
            self._publish(PortsReleased(id=network.id, time_ns=time.time_ns(), attributes=named, ports=ports))
        self._publish(NetworkDisconnected(id=network.id, time_ns=time.time_ns(), attributes=attributes))


def mapping(port: Port) -> PortMapping:
    return PortMapping(
        container_port=port.container_port, host_port=port.host_port, host_ip=port.host_ip, protocol=port.protocol
    )


def resolver_for(network: Network) -> plan.Resolver:
    """What a container's resolv.conf shall say: the host's own for network host, else what of it can be reached from inside."""
    own, upstream = host.read_resolv_conf()
    resolver = plan.parse_resolv_conf(own)
    if network.driver == "host":
        return resolver
    if upstream and plan.only_loopback(resolver):
        # systemd-resolved's stub listens on 127.0.0.53; the servers behind it are what a container can use.
        resolver = replace(resolver, nameservers=plan.parse_resolv_conf(upstream).nameservers)
    return plan.container_resolver(resolver)



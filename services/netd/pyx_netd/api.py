"""The contract's methods on the bus, and how the service is put together. No decisions."""

from __future__ import annotations

import trio

from pyx_bus.contract import netd
from pyx_bus.contract.base import Empty, Released, Retain
from pyx_bus.contract.imaged import Document
from pyx_bus.errors import InvalidArgument
from pyx_bus.service import Call, Context, Service

from . import documents, ipam
from .drivers.base import Driver
from .drivers.bridge import BridgeDriver
from .drivers.null import HostDriver, NoneDriver
from .kernel import host, ports
from .model import CONTAINER_INTERFACE, Attachment, Network, bridge_name, table_name
from .sandbox import NamespacePool
from .service import Networks, mapping, resolver_for
from .store import AttachmentStore, NetworkStore

_POOLED_NAMESPACES = 4
_KNOWN_SETTINGS = frozenset(("bridge_subnet", "pooled_namespaces"))


async def setup(context: Context) -> Service:
    """Bring the service up to where it can serve.

    Settings (table ``[netd]``): ``bridge_subnet``, the bridge network's subnet ("172.20.0.0/16"; default: one that is free, kept);
    ``pooled_namespaces``, how many namespaces are made beforehand (default 4).
    """
    unknown = sorted(set(context.config) - _KNOWN_SETTINGS)
    if unknown:
        raise InvalidArgument(f'unknown setting "{unknown[0]}" in [netd]', hint=", ".join(sorted(_KNOWN_SETTINGS)))
    subnet = context.config.get("bridge_subnet")
    pooled = context.config.get("pooled_namespaces", _POOLED_NAMESPACES)
    if not isinstance(pooled, int) or not 0 <= pooled <= 1000:
        raise InvalidArgument(f'invalid pooled_namespaces "{pooled}": a number from 0 to 1000')
    ports.raise_descriptor_limit()
    pool = NamespacePool(pooled, context.log)
    attachments = AttachmentStore(context.run, host.boot_id())
    drivers: dict[str, Driver] = {
        "bridge": BridgeDriver(
            bridge=bridge_name(context.prefix),
            table=table_name(context.prefix),
            configured_subnet=ipam.parse_subnet(str(subnet)) if subnet else None,
            namespaces_pool=pool,
            nursery=context.nursery,
            log=context.log,
            cursor=attachments.cursor(),
        ),
        "null": NoneDriver(pool),
        "host": HostDriver(),
    }
    networks = Networks(
        run=context.run,
        networks=NetworkStore(context.root),
        attachments=attachments,
        drivers=drivers,
        publish=context.bus.publish,
        log=context.log,
    )
    context.exit_stack.push_async_callback(networks.stop)
    await networks.start()
    context.nursery.start_soon(pool.run)
    return serve(networks)


def serve(networks: Networks) -> Service:
    """The contract's methods, answered by ``networks``."""
    service = Service("netd")

    @service.method(netd.ATTACH)
    async def attach(call: Call, request: netd.AttachContainer) -> netd.Sandbox:
        attachment, network = await networks.attach(request)
        return _sandbox(attachment, network)

    @service.method(netd.DETACH)
    async def detach(call: Call, request: netd.DetachContainer) -> Empty:
        await networks.detach(request.container_id)
        return Empty()

    @service.method(netd.RETAIN)
    async def retain(call: Call, request: Retain) -> Released:
        return Released(container_ids=await networks.retain(request.container_ids, request.before_ns))

    @service.method(netd.LIST)
    async def list_networks(call: Call, request: netd.ListNetworks) -> netd.NetworkList:
        await trio.lowlevel.checkpoint()
        call.snapshot()
        return netd.NetworkList(networks=[_summary(network) for network in networks.select(request.filters)])

    @service.method(netd.INSPECT)
    async def inspect_network(call: Call, request: netd.NetworkRef) -> Document:
        await trio.lowlevel.checkpoint()
        call.snapshot()
        network = networks.find(request.network)
        return Document(document=documents.document(network, networks.attached_to(network)))

    return service


def _summary(network: Network) -> netd.NetworkSummary:
    return netd.NetworkSummary(
        id=network.id, name=network.name, driver=network.driver, created_ns=network.created_ns, labels=network.labels
    )


def _sandbox(attachment: Attachment, network: Network) -> netd.Sandbox:
    resolver = resolver_for(network)
    endpoint = netd.Endpoint(
        network=network.name,
        network_id=network.id,
        endpoint_id=attachment.endpoint_id,
        interface=CONTAINER_INTERFACE if attachment.address else "",
        ipv4_address=attachment.address,
        prefix_length=documents.prefix_length(network) if attachment.address else 0,
        gateway=network.gateway if attachment.address else "",
        mac_address=attachment.mac,
    )
    return netd.Sandbox(
        netns_path=attachment.netns,
        endpoints=[endpoint],
        ports=[mapping(port) for port in attachment.ports],
        nameservers=list(resolver.nameservers),
        search=list(resolver.search),
        resolv_options=list(resolver.options),
    )

"""netd's use cases over a real broker, with a driver that touches no kernel: what is kept, told, undone, and in which order."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from pyx_bus import testing
from pyx_bus.client import Bus, connect
from pyx_bus.contract import netd
from pyx_bus.contract.base import Retain
from pyx_bus.errors import Conflict, InvalidArgument, NotFound
from pyx_bus.service import Context, Service
from pyx_netd import api
from pyx_netd.drivers.base import Order
from pyx_netd.model import Attachment, Network
from pyx_netd.service import Networks
from pyx_netd.store import AttachmentStore, NetworkStore


class Memory:
    """A driver whose namespaces are plain files. ``gate`` holds every attach until it's set."""

    def __init__(self) -> None:
        self.attached: dict[str, Attachment] = {}
        self.started_with: list[str] = []
        self.problem: Exception | None = None
        self.gate = trio.Event()
        self.gate.set()
        self.running = self.most_running = 0
        self.stopped_idle: bool | None = None

    async def start(self, network: Network, attachments: Sequence[Attachment]) -> Network:
        self._network = network
        self.started_with = [attachment.container_id for attachment in attachments]
        self.attached = {attachment.container_id: attachment for attachment in attachments}
        return network

    async def attach(self, order: Order) -> Attachment:
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            await self.gate.wait()
            if self.problem is not None:
                raise self.problem
            assert order.container_id not in self.attached
            Path(order.netns).touch()
            attachment = Attachment(
                order.container_id, self._network.id, order.endpoint_id, order.container_name, order.netns,
                Path(order.netns).stat().st_ino, order.created_ns, ports=order.ports,
            )  # fmt: skip
            self.attached[order.container_id] = attachment
            return attachment
        finally:
            self.running -= 1

    def detach(self, attachment: Attachment) -> None:
        Path(attachment.netns).unlink(missing_ok=True)
        del self.attached[attachment.container_id]

    def network(self) -> Network:
        return self._network

    def cursor(self) -> int:
        return 0

    async def stop(self, *, idle: bool) -> None:
        self.stopped_idle = idle


@asynccontextmanager
async def served(directory: Path, driver: Memory) -> AsyncIterator[Bus]:
    async def setup(context: Context) -> Service:
        networks = Networks(
            run=context.run,
            networks=NetworkStore(context.root),
            attachments=AttachmentStore(context.run, "boot"),
            drivers={"bridge": driver, "null": Memory(), "host": Memory()},
            publish=context.bus.publish,
            log=context.log,
        )
        context.exit_stack.push_async_callback(networks.stop)
        await networks.start()
        return api.serve(networks)

    async with testing.broker(directory) as path, testing.serve(path, "netd", setup), connect(str(path), "test") as bus:
        yield bus


def attach(container_id: str, **fields: Any) -> netd.AttachContainer:
    return netd.AttachContainer(container_id=container_id, **fields)


async def test_attach_and_detach_are_idempotent_and_told(tmp_path: Path) -> None:
    driver = Memory()
    async with served(tmp_path, driver) as bus, bus.events("network.>") as events:
        ports = [netd.PortMapping(container_port=80, host_port=8080), netd.PortMapping(container_port=53, host_port=53, protocol="udp")]
        first = await bus.call(netd.ATTACH, attach("one", hostname="web", ports=ports))
        assert await bus.call(netd.ATTACH, attach("one")) == first
        document = (await bus.call(netd.INSPECT, netd.NetworkRef(network="bridge"))).document
        assert document["Containers"]["one"]["Name"] == "web"  # type: ignore[index]
        await bus.call(netd.DETACH, netd.DetachContainer(container_id="one"))
        await bus.call(netd.DETACH, netd.DetachContainer(container_id="one"))
        assert driver.attached == {}
        seen = []
        with trio.fail_after(5):
            async for event in events:
                seen.append((event.topic, event.payload.attributes))
                if event.topic.startswith("network.port."):
                    assert event.payload.ports == ports
                if len(seen) == 4:
                    break
        attributes = {"name": "bridge", "type": "bridge", "container": "one"}
        named = {**attributes, "ports": "0.0.0.0:8080->80/tcp, 0.0.0.0:53->53/udp"}
        assert seen == [
            ("network.connect", attributes), ("network.port.publish", named), ("network.port.release", named),
            ("network.disconnect", attributes),
        ], "once each"  # fmt: skip
    assert driver.stopped_idle is True


async def test_a_refused_attach_is_not_kept(tmp_path: Path) -> None:
    driver = Memory()
    async with served(tmp_path, driver) as bus:
        driver.problem = Conflict("port is already allocated")
        with pytest.raises(Conflict):
            await bus.call(netd.ATTACH, attach("one"))
        with pytest.raises(NotFound):
            await bus.call(netd.ATTACH, attach("one", network="nowhere"))
        for wrong in (
            attach("../one"),
            attach("one", mac_address="nonsense"),
            attach("one", ports=[netd.PortMapping(container_port=0)]),
        ):
            with pytest.raises(InvalidArgument):
                await bus.call(netd.ATTACH, wrong)
        driver.problem = None
        await bus.call(netd.ATTACH, attach("one"))


async def test_one_container_one_operation_at_a_time(tmp_path: Path) -> None:
    driver = Memory()
    driver.gate = trio.Event()
    async with served(tmp_path, driver) as bus:
        answers: list[netd.Sandbox] = []

        async def ask(container_id: str) -> None:
            answers.append(await bus.call(netd.ATTACH, attach(container_id)))

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for container_id in ("one", "one", "one", "two"):
                    nursery.start_soon(ask, container_id)
                while driver.running < 2:
                    await trio.sleep(0.001)
                driver.gate.set()
        assert driver.most_running == 2, "different containers don't wait for one another"
        assert len({answer.netns_path for answer in answers}) == 2


async def test_a_cancelled_attach_leaves_nothing(tmp_path: Path) -> None:
    driver = Memory()
    driver.gate = trio.Event()
    async with served(tmp_path, driver) as bus:
        with trio.move_on_after(5) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bus.call, netd.ATTACH, attach("one"))
                while not driver.running:
                    await trio.sleep(0.001)
                nursery.cancel_scope.cancel()
        assert not scope.cancelled_caught
        with trio.fail_after(5):
            while driver.running:
                await trio.sleep(0.001)
        driver.gate.set()
        await bus.call(netd.ATTACH, attach("one"))
        assert list(driver.attached) == ["one"]


async def test_a_restart_finds_what_lives(tmp_path: Path) -> None:
    async with served(tmp_path, driver := Memory()) as bus:
        for container_id in ("one", "two"):
            await bus.call(netd.ATTACH, attach(container_id))
        networks = await bus.call(netd.LIST, netd.ListNetworks())
        lost = Path(driver.attached["two"].netns)
    assert driver.stopped_idle is False
    lost.unlink()
    (lost.parent / "half-made").touch()
    async with served(tmp_path, again := Memory()) as bus:
        assert again.started_with == ["one"]
        assert [path.name for path in lost.parent.iterdir()] == ["one"]
        assert await bus.call(netd.LIST, netd.ListNetworks()) == networks
        released = await bus.call(netd.RETAIN, Retain(container_ids=[], before_ns=time.time_ns()))
        assert released.container_ids == ["one"]


async def test_networks_by_name_id_and_prefix(tmp_path: Path) -> None:
    async with served(tmp_path, Memory()) as bus:
        found = (await bus.call(netd.LIST, netd.ListNetworks())).networks
        assert [(network.name, network.driver) for network in found] == [
            ("bridge", "bridge"), ("host", "host"), ("none", "null"),
        ]  # fmt: skip
        for reference in ("bridge", found[0].id, found[0].id[:12], "default"):
            document = (await bus.call(netd.INSPECT, netd.NetworkRef(network=reference))).document
            assert document["Id"] == found[0].id
        with pytest.raises(NotFound, match='no such network: "nowhere"'):
            await bus.call(netd.INSPECT, netd.NetworkRef(network="nowhere"))
        chosen = await bus.call(netd.LIST, netd.ListNetworks(filters={"driver": ["null"]}))
        assert [network.name for network in chosen.networks] == ["none"]
        with pytest.raises(InvalidArgument, match='invalid filter "x"'):
            await bus.call(netd.LIST, netd.ListNetworks(filters={"x": ["y"]}))


@pytest.mark.parametrize(
    "config", [{"bridge_subnet": "172.20.0.1/16"}, {"bridge-subnet": "172.20.0.0/16"}, {"pooled_namespaces": "many"}]
)
async def test_wrong_settings_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    async with testing.broker(tmp_path) as path:
        with pytest.RaisesGroup(InvalidArgument, flatten_subgroups=True):
            async with testing.serve(path, "netd", api.setup, config=config):
                raise AssertionError("it started")

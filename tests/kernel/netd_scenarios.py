"""What netd does to a kernel, scenario by scenario; ``python netd_scenarios.py <name> <directory>`` plays one.

Each runs in network and mount namespaces of its own: test_netd_kernel.py starts them, and lists them by asking this file.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import netd_world as world
import trio
from netd_world import CLIENT, HOST, HOST_2, SERVE_TCP, SERVE_UDP, Server, ask_soon

from pyx_bus import testing
from pyx_bus.client import Bus, connect
from pyx_bus.contract import netd
from pyx_bus.contract.base import Retain
from pyx_bus.errors import BusError, Conflict, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from pyx_netd.api import setup

SCENARIOS: dict[str, Callable[[Path], Awaitable[None]]] = {}


def scenario(play: Callable[[Path], Awaitable[None]]) -> Callable[[Path], Awaitable[None]]:
    SCENARIOS[play.__name__] = play
    return play


@contextmanager
def refused(kind: type[BusError], words: str) -> Any:
    try:
        yield
    except kind as error:
        assert words in error.message, error.message
    else:
        raise AssertionError(f"no {kind.__name__} about {words!r}")


@dataclass
class Stack:
    bus: Bus
    run: Path

    async def attach(self, container_id: str, *ports: netd.PortMapping, **fields: Any) -> netd.Sandbox:
        return await self.bus.call(netd.ATTACH, netd.AttachContainer(container_id=container_id, ports=list(ports), **fields))

    async def detach(self, container_id: str) -> None:
        await self.bus.call(netd.DETACH, netd.DetachContainer(container_id=container_id))

    async def inspect(self, network: str = "bridge") -> dict[str, Any]:
        return (await self.bus.call(netd.INSPECT, netd.NetworkRef(network=network))).document


@asynccontextmanager
async def stack(directory: Path, **config: Any) -> AsyncIterator[Stack]:
    """netd in this process, on a broker of its own."""
    directory.mkdir(exist_ok=True)
    async with testing.broker(directory) as bus, testing.serve(bus, "netd", setup, config=config) as context:
        async with connect(str(bus), "test") as client:
            yield Stack(client, context.run)


def tcp(container_port: int, host_port: int = 0, host_ip: str = "") -> netd.PortMapping:
    return netd.PortMapping(container_port=container_port, host_port=host_port, host_ip=host_ip)


def udp(container_port: int, host_port: int = 0, host_ip: str = "") -> netd.PortMapping:
    return netd.PortMapping(container_port=container_port, host_port=host_port, host_ip=host_ip, protocol="udp")


def address_of(sandbox: netd.Sandbox) -> str:
    return sandbox.endpoints[0].ipv4_address


async def _every_way(directory: Path) -> None:
    outside = world.Outside()
    async with stack(directory) as pyx:
        one = await pyx.attach("one", tcp(SERVE_TCP, 8080), udp(SERVE_UDP, 5353), tcp(SERVE_TCP, 9090, HOST_2))
        two = await pyx.attach("two")
        gateway = one.endpoints[0].gateway
        servers = [Server(one.netns_path, "one"), Server(two.netns_path, "two")]
        assert await ask_soon(outside.netns, HOST, 8080) == f"one saw {CLIENT}"
        assert await ask_soon(outside.netns, HOST, 5353, udp=True) == f"one saw {CLIENT}"
        assert await ask_soon("", "127.0.0.1", 8080) == f"one saw {gateway}"
        assert await ask_soon("", "127.0.0.1", 5353, udp=True) == f"one saw {gateway}"
        assert (await ask_soon("", HOST, 8080)).startswith("one saw")
        assert (await ask_soon("", address_of(one), SERVE_TCP)).startswith("one saw")
        for netns in (one.netns_path, two.netns_path):
            assert (await ask_soon(netns, HOST, 8080)).startswith("one saw"), netns
            assert (await ask_soon(netns, HOST, 5353, udp=True)).startswith("one saw"), netns
            assert (await ask_soon(netns, gateway, 8080)).startswith("one saw"), netns
        assert await ask_soon(two.netns_path, address_of(one), SERVE_TCP) == f"one saw {address_of(two)}"
        assert await ask_soon(outside.netns, HOST_2, 9090) == f"one saw {CLIENT}"
        assert await ask_soon(outside.netns, HOST, 9090, timeout_s=0.3) == "", "published on the other address only"
        assert await ask_soon(outside.netns, address_of(one), SERVE_TCP, timeout_s=0.3) == "", "routed, but not published"
        assert await ask_soon(outside.netns, address_of(two), SERVE_UDP, udp=True, timeout_s=0.3) == ""

        for server in servers:
            server.close()
        await pyx.detach("one")
        await pyx.detach("one")
        assert await ask_soon(outside.netns, HOST, 8080, timeout_s=0.3) == ""
        await world.eventually(lambda: world.flows_answered_by(address_of(one)) == [], "no tracked flow left")
        await pyx.detach("two")
        await world.nothing_left(pyx.run)


@scenario
async def published_ports_are_reached_from_everywhere(directory: Path) -> None:
    switch = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if switch.exists():
        switch.write_text("0")
    await _every_way(directory)


@scenario
async def published_ports_with_bridged_packets_in_netfilter(directory: Path) -> None:
    world.sh("modprobe br_netfilter 2>/dev/null || true")
    switch = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if switch.exists():  # a kernel without br_netfilter can't be in this state: then this is the scenario above, again
        switch.write_text("1")
    await _every_way(directory)


@scenario
async def outbound_traffic_has_the_hosts_address(directory: Path) -> None:
    outside = world.Outside()
    async with stack(directory) as pyx:
        one = await pyx.attach("one")
        server = Server(outside.netns, "client")
        assert await ask_soon(one.netns_path, CLIENT, SERVE_TCP) == f"client saw {HOST}"
        assert await ask_soon(one.netns_path, CLIENT, SERVE_UDP, udp=True) == f"client saw {HOST}"
        server.close()
        await pyx.detach("one")
        await world.nothing_left(pyx.run)


@scenario
async def a_container_cannot_reach_the_hosts_loopback(directory: Path) -> None:
    world.Outside()
    listener = socket.create_server(("127.0.0.1", 7777))
    async with stack(directory) as pyx:
        one = await pyx.attach("one", tcp(SERVE_TCP, 8080, "127.0.0.1"))
        # What a privileged container can do to itself, so that packets for 127.0.0.1 leave it.
        world.sh(
            f"nsenter --net={one.netns_path} sh -c 'echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet;"
            " ip rule add pref 10 lookup 5; ip rule add pref 100 lookup local; ip rule del pref 0;"
            f" ip route add 127.0.0.1/32 via {one.endpoints[0].gateway} src {address_of(one)} table 5'"
        )
        with world.inside(one.netns_path, lambda: socket.socket()) as attacker:
            attacker.settimeout(0.5)
            try:
                attacker.connect(("127.0.0.1", 7777))
            except OSError:
                pass
            else:
                raise AssertionError("a container reached a service on the host's loopback")
        server = Server(one.netns_path, "one")
        assert (await ask_soon("", "127.0.0.1", 8080)).startswith("one saw")
        server.close()
        assert await ask_soon("", HOST, 8080, timeout_s=0.3) == "", "published on 127.0.0.1 only"
        await pyx.detach("one")
        await world.nothing_left(pyx.run)
    listener.close()


@scenario
async def a_taken_port_is_a_conflict_and_leaves_nothing(directory: Path) -> None:
    world.Outside()
    async with stack(directory) as pyx:
        with socket.create_server(("0.0.0.0", 8080)):
            with refused(Conflict, "port is already allocated"):
                await pyx.attach("one", udp(SERVE_UDP, 5353), tcp(SERVE_TCP, 8080))
        await world.nothing_left(pyx.run)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("0.0.0.0", 5353))  # the half-made reservation is gone too
            with refused(Conflict, "0.0.0.0:5353/udp"):
                await pyx.attach("one", udp(SERVE_UDP, 5353))
        one = await pyx.attach("one", tcp(SERVE_TCP, 8080), udp(SERVE_UDP, 5353))
        with refused(Conflict, "port is already allocated"):
            await pyx.attach("two", tcp(SERVE_TCP, 8080))
        with refused(Conflict, "port is already allocated"):
            await pyx.attach("two", tcp(SERVE_TCP, 8080, HOST))
        with refused(InvalidArgument, "is not an address of this host"):
            await pyx.attach("two", tcp(SERVE_TCP, 8080, "198.51.100.1"))
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            port = 8080 if kind == socket.SOCK_STREAM else 5353
            with socket.socket(socket.AF_INET, kind) as other:
                try:
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1 if kind == socket.SOCK_STREAM else 0)
                    other.bind(("0.0.0.0", port))
                except OSError:
                    continue
                raise AssertionError("another process could take a published port")
        # A port whose last connections are in TIME_WAIT is free.
        server = Server(one.netns_path, "one")
        server.close()
        await pyx.detach("one")
        with socket.create_server(("0.0.0.0", 8080)) as listener, socket.create_connection(("127.0.0.1", 8080)) as client:
            accepted, _ = listener.accept()
            accepted.close()
            assert client.recv(1) == b""
        three = await pyx.attach("three", tcp(SERVE_TCP, 8080))
        assert three.ports[0].host_port == 8080
        await pyx.detach("three")
        await world.nothing_left(pyx.run)


@scenario
async def a_free_port_is_found(directory: Path) -> None:
    outside = world.Outside()
    async with stack(directory) as pyx:
        one = await pyx.attach("one", tcp(SERVE_TCP), tcp(443), udp(SERVE_UDP))
        ports = [port.host_port for port in one.ports]
        assert all(ports) and ports[0] != ports[1]
        server = Server(one.netns_path, "one")
        assert await ask_soon(outside.netns, HOST, ports[0]) == f"one saw {CLIENT}"
        assert await ask_soon(outside.netns, HOST, ports[2], udp=True) == f"one saw {CLIENT}"
        server.close()
        await pyx.detach("one")
        await world.nothing_left(pyx.run)


@scenario
async def a_wide_range_of_ports_is_published(directory: Path) -> None:
    """More than one message can hold, in one transaction; and taken down again."""
    outside = world.Outside()
    numbers = range(20_000, 22_500)
    mappings = [make(SERVE_TCP if make is tcp else SERVE_UDP, number) for number in numbers for make in (tcp, udp)]
    async with stack(directory) as pyx:
        one = await pyx.attach("one", *mappings)
        server = Server(one.netns_path, "one")
        for number in (numbers[0], numbers[-1]):
            assert await ask_soon(outside.netns, HOST, number) == f"one saw {CLIENT}"
            assert await ask_soon(outside.netns, HOST, number, udp=True) == f"one saw {CLIENT}"
        server.close()
        await pyx.detach("one")
        await world.nothing_left(pyx.run)


@scenario
async def a_udp_client_follows_its_port(directory: Path) -> None:
    """One client socket that never stops sending: before the port is published, to its container, to the next one."""
    outside = world.Outside()
    async with stack(directory) as pyx:
        client = world.inside(outside.netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        client.bind(("0.0.0.0", 4000))
        client.settimeout(0.1)

        async def answered_by(name: str) -> None:
            def heard() -> bool:
                try:
                    client.sendto(b"?", (HOST, 5353))
                    return client.recv(100).decode().startswith(name)
                except OSError:
                    return False

            deadline = time.monotonic() + 5
            while not await trio.to_thread.run_sync(heard):
                assert time.monotonic() < deadline, f"not answered by {name}"

        with world.inside("", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as nobody:
            nobody.bind((HOST, 5353))
            client.sendto(b"?", (HOST, 5353))
            assert nobody.recvfrom(10)[0] == b"?"
        for name in ("one", "two"):
            sandbox = await pyx.attach(name, udp(SERVE_UDP, 5353))
            server = Server(sandbox.netns_path, name)
            await answered_by(name)
            server.close()
            await pyx.detach(name)
        client.close()
        await world.nothing_left(pyx.run)


@scenario
async def a_small_subnet_goes_round(directory: Path) -> None:
    """One address for container after container: none inherits its forerunner's tracked connections."""
    outside = world.Outside()
    async with stack(directory, bridge_subnet="172.29.8.0/30") as pyx:
        for name in ("one", "two", "three"):
            sandbox = await pyx.attach(name, tcp(SERVE_TCP, 8080))
            assert address_of(sandbox) == "172.29.8.2"
            assert world.flows_answered_by("172.29.8.2") == []
            with refused(ResourceExhausted, "no free address"):
                await pyx.attach("another")
            server = Server(sandbox.netns_path, name)
            assert await ask_soon(outside.netns, HOST, 8080) == f"{name} saw {CLIENT}"
            server.close()
            await pyx.detach(name)
        await world.nothing_left(pyx.run)


@scenario
async def an_address_given_again_is_reached_at_once(directory: Path) -> None:
    """Its former owner's namespace lingers (a process that won't die), with the same MAC on another port of the bridge."""
    outside = world.Outside()
    async with stack(directory) as pyx:
        first = await pyx.attach("one", tcp(SERVE_TCP, 8080), ipv4_address="172.17.0.9")
        lingering = Server(first.netns_path, "former")
        assert await ask_soon(outside.netns, HOST, 8080) == f"former saw {CLIENT}"
        await pyx.detach("one")
        second = await pyx.attach("one", tcp(SERVE_TCP, 8080), ipv4_address="172.17.0.9")
        server = Server(second.netns_path, "latter")
        assert await ask_soon(outside.netns, HOST, 8080) == f"latter saw {CLIENT}"
        lingering.close()
        server.close()
        await pyx.detach("one")
        await world.nothing_left(pyx.run)


@scenario
async def none_and_host_networks(directory: Path) -> None:
    async with stack(directory) as pyx:
        none = await pyx.attach("one", network="none")
        setting = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        assert world.inside(none.netns_path, lambda: setting.read_text().strip()) == "0"
        assert setting.read_text().strip() != "0", "the host's own stays as it was"
        assert world.inside(none.netns_path, socket.if_nameindex) == [(1, "lo")]
        with world.inside(none.netns_path, lambda: socket.create_server(("127.0.0.1", 0))) as listener:
            client = world.inside(none.netns_path, lambda: socket.create_connection(listener.getsockname(), 2))
            client.close()
        shared = await pyx.attach("two", network="host")
        assert shared.netns_path == "" and shared.ports == []
        assert list((await pyx.inspect("host"))["Containers"]) == ["two"]
        assert (await pyx.inspect("none"))["Containers"]["one"]["IPv4Address"] == ""
        with refused(NotFound, 'no such network: "nowhere"'):
            await pyx.attach("three", network="nowhere")
        with refused(InvalidArgument, "IPv4 address"):
            await pyx.attach("three", network="none", ipv4_address="172.17.0.9")
        await pyx.detach("one")
        await pyx.detach("two")
        await world.nothing_left(pyx.run)


@scenario
async def an_endpoint_is_what_was_asked_for(directory: Path) -> None:
    async with stack(directory, bridge_subnet="172.29.8.0/24") as pyx:
        one = await pyx.attach("one", ipv4_address="172.29.8.77", mac_address="02-42-00-00-00-07", container_name="web")
        endpoint = one.endpoints[0]
        assert (endpoint.ipv4_address, endpoint.prefix_length, endpoint.gateway) == ("172.29.8.77", 24, "172.29.8.1")
        shown = world.sh(f"nsenter --net={one.netns_path} ip -4 addr show eth0")
        assert "172.29.8.77/24 brd 172.29.8.255" in shown, shown
        assert "02:42:00:00:00:07" in world.sh(f"nsenter --net={one.netns_path} ip link show eth0")
        assert "default via 172.29.8.1 dev eth0" in world.sh(f"nsenter --net={one.netns_path} ip route")
        assert await pyx.attach("one") == one, "asked again, the answer is the same"
        with refused(Conflict, "already in use"):
            await pyx.attach("two", ipv4_address="172.29.8.77")
        with refused(InvalidArgument, "not in subnet"):
            await pyx.attach("two", ipv4_address="172.29.9.2")
        with refused(InvalidArgument, "invalid container ID"):
            await pyx.attach("../two")
        shown = (await pyx.inspect())["Containers"]["one"]
        assert shown["Name"] == "web" and shown["IPv4Address"] == "172.29.8.77/24"
        two = await pyx.attach("two")
        assert two.endpoints[0].mac_address == "02:42:ac:1d:08:02" and address_of(two) == "172.29.8.2"
        await pyx.detach("two")
        assert address_of(await pyx.attach("two")) == "172.29.8.3", "an address just released isn't given out again"
        # Somebody unmounts a namespace: the next attach makes another.
        world.sh(f"umount {one.netns_path}")
        again = await pyx.attach("one")
        assert address_of(again) != "" and again.endpoints[0].endpoint_id != endpoint.endpoint_id
        await pyx.detach("one")
        await pyx.detach("two")
        await world.nothing_left(pyx.run)


@scenario
async def what_is_not_retained_is_released(directory: Path) -> None:
    async with stack(directory) as pyx:
        for name in ("one", "two"):
            await pyx.attach(name, tcp(SERVE_TCP))
        drawn_ns = time.time_ns()
        await pyx.attach("three", network="none")
        released = await pyx.bus.call(netd.RETAIN, Retain(container_ids=["two"], before_ns=drawn_ns))
        assert released.container_ids == ["one"], "two is kept, three was made after the list"
        released = await pyx.bus.call(netd.RETAIN, Retain(container_ids=[], before_ns=time.time_ns()))
        assert sorted(released.container_ids) == ["three", "two"]
        await world.nothing_left(pyx.run)


@scenario
async def a_copied_mount_table_keeps_nothing(directory: Path) -> None:
    """Whoever makes a mount namespace of its own while a container runs gets a copy of its namespace's mount."""
    async with stack(directory) as pyx:
        await pyx.attach("one")
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; read end"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None and other.stdout.readline() == b"ready\n"
            await pyx.detach("one")
            await world.nothing_left(pyx.run)
            other.communicate(b"end\n")


@scenario
async def many_at_once(directory: Path) -> None:
    names = [f"c{number}" for number in range(24)]
    async with stack(directory) as pyx:
        found: dict[str, netd.Sandbox] = {}

        async def attach(name: str) -> None:
            found[name] = await pyx.attach(name, tcp(SERVE_TCP), udp(SERVE_UDP))

        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(attach, name)
                nursery.start_soon(attach, name)
        assert len({address_of(sandbox) for sandbox in found.values()}) == len(names)
        assert len(world.links("veth")) == len(names), "the same container twice is one endpoint"
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(pyx.detach, name)
        await world.nothing_left(pyx.run)


@scenario
async def what_others_remove_is_made_again(directory: Path) -> None:
    outside = world.Outside()
    async with stack(directory) as pyx:
        one = await pyx.attach("one", tcp(SERVE_TCP, 8080))
        for _ in range(2):
            world.sh("nft flush ruleset")
            await world.eventually(lambda: "172.17.0.2" in world.published_elements(), "the table is back by itself")
        world.sh("nft flush ruleset")
        two = await pyx.attach("two", tcp(SERVE_TCP, 8081))
        servers = [Server(one.netns_path, "one"), Server(two.netns_path, "two")]
        assert await ask_soon(outside.netns, HOST, 8080) == f"one saw {CLIENT}"
        assert await ask_soon(outside.netns, HOST, 8081) == f"two saw {CLIENT}"
        world.sh(f"ip link del {world.links('bridge')[0]}")
        three = await pyx.attach("three", tcp(SERVE_TCP, 8083))
        servers.append(Server(three.netns_path, "three"))
        assert await ask_soon(outside.netns, HOST, 8083) == f"three saw {CLIENT}"
        assert await ask_soon(outside.netns, HOST, 8080) == f"one saw {CLIENT}", "who was on the old bridge is on the new one"
        for server in servers:
            server.close()
        for name in ("one", "two", "three"):
            world.sh("nft flush ruleset")
            await pyx.detach(name)
        # The table may just be in writing, with who was there when it began; who left meanwhile is taken out right after.
        await world.eventually(lambda: "chain" in world.sh("nft list ruleset"), "the table is back once more")
        await world.eventually(lambda: world.published_elements() == "", "without who left")
        await world.nothing_left(pyx.run)


@scenario
async def two_stacks_side_by_side(directory: Path) -> None:
    outside = world.Outside()
    world.sh("ip route add 172.17.0.0/16 dev uplink; ip addr add 172.18.3.4/24 dev uplink")
    async with stack(directory / "a") as a, stack(directory / "b") as b:
        subnets = [(await pyx.inspect())["IPAM"]["Config"][0]["Subnet"] for pyx in (a, b)]
        assert subnets == ["172.19.0.0/16", "172.20.0.0/16"], "neither the host's nor the other's"
        one = await a.attach("one", tcp(SERVE_TCP, 8080))
        with refused(Conflict, "port is already allocated"):
            await b.attach("two", tcp(SERVE_TCP, 8080))
        two = await b.attach("two", tcp(SERVE_TCP, 8081))
        servers = [Server(one.netns_path, "one"), Server(two.netns_path, "two")]
        assert await ask_soon(outside.netns, HOST, 8080) == f"one saw {CLIENT}"
        assert await ask_soon(outside.netns, HOST, 8081) == f"two saw {CLIENT}"
        assert (await ask_soon(two.netns_path, HOST, 8080)).startswith("one saw"), "by the published port"
        assert await ask_soon(two.netns_path, address_of(one), SERVE_TCP, timeout_s=0.3) == "", "but not behind it"
        for server in servers:
            server.close()
        await a.detach("one")
        await b.detach("two")
    assert world.links("bridge") == []
    assert world.sh("nft list tables") == ""


@scenario
async def an_orderly_end_takes_nothing_from_containers(directory: Path) -> None:
    outside = world.Outside()
    async with stack(directory) as pyx:
        one = await pyx.attach("one", tcp(SERVE_TCP, 8080))
        server = Server(one.netns_path, "one")
        subnet = (await pyx.inspect())["IPAM"]
    assert await ask_soon(outside.netns, HOST, 8080) == f"one saw {CLIENT}"
    async with stack(directory) as pyx:
        assert await pyx.attach("one") == one
        assert (await pyx.inspect())["IPAM"] == subnet
        assert await ask_soon(outside.netns, HOST, 8080) == f"one saw {CLIENT}"
        server.close()
        await pyx.detach("one")
        await world.nothing_left(pyx.run)
    assert world.links("bridge") == [] and world.sh("nft list tables") == "", "with no container left, nothing stays"
    async with stack(directory) as pyx:
        assert (await pyx.inspect())["IPAM"] == subnet


class Process:
    """netd as a process of its own, which can be killed."""

    def __init__(self, directory: Path) -> None:
        environment = {
            **os.environ,
            "PYX_ROOT": str(directory / "root"),
            "PYX_RUN": str(directory / "run"),
            "PYX_BUS": str(directory / "bus.sock"),
        }
        # It shall not outlive a scenario that fails.
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "pyx_netd"]
        self._process = subprocess.Popen(command, env=environment)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        self._process.terminate()
        assert self._process.wait(20) == 0


async def _answers(bus: Bus) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            await bus.call(netd.LIST, netd.ListNetworks(), timeout_s=1)
            return
        except (Unavailable, BusError):
            assert time.monotonic() < deadline, "netd isn't there"
            await trio.sleep(0.02)


@scenario
async def killed_and_started_again(directory: Path) -> None:
    outside = world.Outside()
    async with testing.broker(directory) as path, connect(str(path), "test") as bus:
        pyx = Stack(bus, directory / "run" / "netd")
        process = Process(directory)
        await _answers(bus)
        one = await pyx.attach("one", tcp(SERVE_TCP, 8080), udp(SERVE_UDP, 5353))
        gone = await pyx.attach("gone", tcp(SERVE_TCP, 8082))
        server = Server(one.netns_path, "one")
        late = await pyx.attach("late", udp(SERVE_UDP, 5354))
        answering = Server(late.netns_path, "late")
        assert await ask_soon(outside.netns, HOST, 5354, udp=True) == f"late saw {CLIENT}"
        answering.close()
        await pyx.detach("late")
        assert world.flows_answered_by(address_of(late)), "not forgotten yet"
        process.kill()
        assert await ask_soon(outside.netns, HOST, 8080) == f"one saw {CLIENT}", "while netd is dead"
        # What a kill in the middle of things may leave: a namespace without a row, a row without a namespace.
        half = str(pyx.run / "ns" / "half")
        Path(half).touch()
        world.sh(f"unshare --net={half} true; umount {gone.netns_path}")
        world.sh("nft flush ruleset")
        thief = socket.create_server(("127.0.0.1", 8080))

        process = Process(directory)
        await _answers(bus)
        await world.eventually(lambda: world.flows_answered_by(address_of(late)) == [], "forgotten after all", 1.5)
        assert await pyx.attach("one") == one
        assert await ask_soon(outside.netns, HOST, 8080) == f"one saw {CLIENT}", "the table is back"
        assert await ask_soon(outside.netns, HOST, 5353, udp=True) == f"one saw {CLIENT}"
        assert world.namespace_mounts(pyx.run) == ["one"]
        thief.close()
        for port in (tcp(SERVE_TCP, 8080), udp(SERVE_UDP, 5353)):
            with refused(Conflict, "port is already allocated"):
                await pyx.attach("two", port)
        two = await pyx.attach("two", tcp(SERVE_TCP, 8082))
        assert address_of(two) not in (address_of(one), address_of(gone)), "the round goes on where it was"
        server.close()
        await pyx.detach("one")
        await pyx.detach("two")
        await world.nothing_left(pyx.run)
        process.end()
    assert world.links("bridge") == [] and world.sh("nft list tables") == ""


@scenario
async def killed_at_any_moment(directory: Path) -> None:
    """Kill netd while it is attaching and detaching, again and again: nothing may stay, and every container that was answered lives."""
    async with testing.broker(directory) as path, connect(str(path), "test") as bus:
        pyx = Stack(bus, directory / "run" / "netd")
        for attempt in range(4):
            process = Process(directory)
            await _answers(bus)
            answered: list[str] = []

            async def churn(name: str, answered: list[str] = answered) -> None:
                for turn in range(1000):
                    await pyx.attach(f"{name}.{turn}", tcp(SERVE_TCP))
                    if turn % 4:
                        await pyx.detach(f"{name}.{turn}")
                    else:
                        answered.append(f"{name}.{turn}")

            with trio.move_on_after(0.15 + 0.037 * attempt):
                async with trio.open_nursery() as nursery:
                    for number in range(3):
                        nursery.start_soon(churn, f"k{attempt}.{number}")
            process.kill()
            process = Process(directory)
            await _answers(bus)
            kept = set((await pyx.inspect())["Containers"])
            assert answered and kept >= set(answered)
            mounted = set(world.namespace_mounts(pyx.run))
            assert mounted == kept
            await world.eventually(lambda: len(world.links("veth")) == len(kept), "as many veths as containers")  # noqa: B023
            await bus.call(netd.RETAIN, Retain(container_ids=[], before_ns=time.time_ns()))
            await world.nothing_left(pyx.run)
            process.end()
    assert world.links("bridge") == [] and world.sh("nft list tables") == ""


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print("\n".join(SCENARIOS))
    else:
        trio.run(SCENARIOS[sys.argv[1]], Path(sys.argv[2]))

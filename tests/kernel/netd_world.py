"""A small world for netd's kernel tests: a "host" with its own network, a client outside, containers that serve.

Runs inside fresh network and mount namespaces (test_netd_kernel.py sees to it). Sockets belong to the namespace of the thread that
made them, so a server in a container is a socket made there and a thread of ours.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import trio
from pyroute2 import IPRoute

from pyx_netd import conntrack
from pyx_netd.kernel import namespaces
from pyx_netd.kernel.netlink import NetfilterSocket

T = TypeVar("T")
HOST, HOST_2, CLIENT = "192.0.2.1", "192.0.2.9", "192.0.2.2"
SERVE_TCP, SERVE_UDP = 80, 53
_libc = ctypes.CDLL(None, use_errno=True)


def inside(netns: str, do: Callable[[], T]) -> T:
    """Call ``do`` in a network namespace, in a thread that ends there. An empty path is our own namespace."""
    results: list[T] = []
    problems: list[BaseException] = []

    def body() -> None:
        try:
            if netns:
                fd = os.open(netns, os.O_RDONLY)
                try:
                    assert _libc.setns(fd, 0x40000000) == 0, os.strerror(ctypes.get_errno())
                finally:
                    os.close(fd)
            results.append(do())
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]
    return results[0]


def sh(command: str) -> str:
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


class Outside:
    """The host's lo and uplink, and a client machine at its other end."""

    def __init__(self) -> None:
        sh("ip link set lo up")
        self._namespace = namespaces.make(1)[0]
        self.netns = f"/proc/self/fd/{self._namespace.fd}"
        with IPRoute() as ipr:
            ipr.link("add", ifname="uplink", kind="veth", peer={"ifname": "eth0", "net_ns_fd": self._namespace.fd})
            index = ipr.link_lookup(ifname="uplink")[0]
            for address in (HOST, HOST_2):
                ipr.addr("add", index=index, address=address, prefixlen=24)
            ipr.link("set", index=index, state="up")

        def configure() -> None:
            with IPRoute() as ipr:
                index = ipr.link_lookup(ifname="eth0")[0]
                ipr.addr("add", index=index, address=CLIENT, prefixlen=24)
                ipr.link("set", index=index, state="up")
                ipr.route("add", dst="172.16.0.0/12", gateway=HOST)

        inside(self.netns, configure)


class Server:
    """TCP on port 80 and UDP on port 53 in a namespace: each answers ``<name> saw <client's address>``."""

    def __init__(self, netns: str, name: str) -> None:
        self.name = name
        self._tcp = inside(netns, lambda: socket.create_server(("0.0.0.0", SERVE_TCP)))
        self._udp = inside(netns, _udp_socket)
        self._udp.bind(("0.0.0.0", SERVE_UDP))
        self._threads = [threading.Thread(target=serve, daemon=True) for serve in (self._serve_tcp, self._serve_udp)]
        for thread in self._threads:
            thread.start()

    def _answer(self, peer: tuple[str, int]) -> bytes:
        return f"{self.name} saw {peer[0]}".encode()

    def _serve_tcp(self) -> None:
        while True:
            try:
                connection, peer = self._tcp.accept()
            except OSError:
                return
            with connection:
                connection.sendall(self._answer(peer))

    def _serve_udp(self) -> None:
        while True:
            try:
                _, peer = self._udp.recvfrom(100)
                if peer is None:
                    return  # shut down
                self._udp.sendto(self._answer(peer), peer)
            except OSError:
                return

    def close(self) -> None:
        """Stop serving: nothing of ours keeps the namespace alive then."""
        self._tcp.shutdown(socket.SHUT_RDWR)
        try:
            self._udp.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # not connected, but whoever waits in recvfrom is woken all the same
        for thread in self._threads:
            thread.join()
        self._tcp.close()
        self._udp.close()


def _udp_socket() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def ask(netns: str, address: str, port: int, *, udp: bool = False, timeout_s: float = 3.0) -> str:
    """What a server answers to a client in ``netns``; "" if there is no answer."""
    kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
    with inside(netns, lambda: socket.socket(socket.AF_INET, kind)) as client:
        client.settimeout(timeout_s)
        try:
            client.connect((address, port))
            if udp:
                client.send(b"?")
            return client.recv(100).decode()
        except OSError:
            return ""


async def ask_soon(*args: Any, **options: Any) -> str:
    """``ask`` without blocking the loop, in which netd runs."""
    return await trio.to_thread.run_sync(lambda: ask(*args, **options))


async def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Wait for the kernel to have done what it does behind our back."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        await trio.sleep(0.02)


def links(kind: str) -> list[str]:
    with IPRoute() as ipr:
        found = []
        for link in ipr.get_links():
            info = link.get_attr("IFLA_LINKINFO")
            if info is not None and info.get_attr("IFLA_INFO_KIND") == kind:
                found.append(link.get_attr("IFLA_IFNAME"))
        return [name for name in found if name != "uplink"]


def published_elements() -> str:
    """The elements of all maps, as nft lists them."""
    return "".join(line for line in sh("nft list ruleset").splitlines(True) if "elements" in line or " : 172." in line)


def namespace_mounts(run: Path) -> list[str]:
    """The names of the namespaces mounted below a netd's run directory. (Other stacks' mounts were copied with the mount namespace.)"""
    paths = [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - nsfs " in line]
    return [path.name for path in paths if path.is_relative_to(run)]


class _All(conntrack.Stale):
    def covers(self, flow: conntrack.Flow) -> bool:
        tracked.append(flow)
        return False


tracked: list[conntrack.Flow] = []


def flows_answered_by(address: str) -> list[conntrack.Flow]:
    """Tracked connections whose answers come from a container's address."""
    tracked.clear()
    netfilter = NetfilterSocket()
    netfilter.forget([_All()])
    netfilter.close()
    return [flow for flow in tracked if flow.answered_by == address]


async def nothing_left(run: Path) -> None:
    """No trace of a container in the kernel or on disk."""
    await eventually(lambda: links("veth") == [], "no veth left")
    assert namespace_mounts(run) == []
    assert list((run / "ns").iterdir()) == []
    assert published_elements() == ""

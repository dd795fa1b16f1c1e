"""What people see: status texts, ps's filters, inspect, and the runtime's configuration."""

import json

import msgspec
import pytest

from pyx_bus.contract.containerd import ContainerSpec, Resources, Ulimit
from pyx_bus.contract.imaged import ImageConfig, Mount
from pyx_bus.contract.netd import Endpoint, PortMapping, Sandbox
from pyx_bus.contract.volumed import MountPoint
from pyx_bus.errors import InvalidArgument, NotFound
from pyx_containerd import bundle, document, listing, oci
from pyx_containerd.model import Container, Process, State
from pyx_containerd.status import human_duration, status_text
from pyx_containerd.users import Identity

S = 10**9
NOW = 1_700_000_000 * S


def container(number=1, **fields):
    spec = fields.pop("spec", ContainerSpec(image="busybox"))
    defaults = {
        "id": f"{number:064x}",
        "name": f"c{number}",
        "spec": spec,
        "image": ImageConfig(id="sha256:" + "ab" * 32, reference="docker.io/library/busybox:latest"),
        "process": Process(args=["sh", "-c", "x"], env=["PATH=/bin"], working_dir="/", user="", stop_signal=15),
        "created_at_ns": NOW + number,
        "hostname": "host",
        "cgroup": "/pyx/1",
    }
    return Container(**{**defaults, **fields})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "Less than a second"),
        (1, "1 second"),
        (59, "59 seconds"),
        (60, "About a minute"),
        (150, "2 minutes"),
        (59 * 60, "59 minutes"),
        (60 * 60, "About an hour"),
        (3 * 3600, "3 hours"),
        (50 * 3600, "2 days"),
        (15 * 86400, "2 weeks"),
        (70 * 86400, "2 months"),
        (800 * 86400, "2 years"),
    ],
)
def test_durations(seconds, text):
    assert human_duration(seconds * S) == text


def test_status():
    up = container(state=State.RUNNING, started_at_ns=NOW - 180 * S)
    assert status_text(up, NOW) == "Up 3 minutes"
    assert status_text(msgspec.structs.replace(up, state=State.PAUSED), NOW) == "Up 3 minutes (Paused)"
    gone = container(state=State.EXITED, exit_code=137, finished_at_ns=NOW - 7200 * S)
    assert status_text(gone, NOW) == "Exited (137) 2 hours ago"
    assert status_text(container(), NOW) == "Created"
    assert status_text(msgspec.structs.replace(up, started_at_ns=NOW + 5 * S), NOW) == "Up Less than a second"  # the clock went back


RUNNING = container(1, state=State.RUNNING, labels={"a": "b"}, sandbox=Sandbox(ports=[PortMapping(container_port=80, host_port=8080)]))
EXITED = container(2, state=State.EXITED, exit_code=3, exposed_ports=["80/tcp"])
CREATED = container(3, attached_volumes=[MountPoint(type="bind", source="/v", target="/data", name="data")])
ALL = [RUNNING, EXITED, CREATED]


@pytest.mark.parametrize(
    ("filters", "all_", "found"),
    [
        ({}, False, "1"),
        ({}, True, "321"),
        ({"status": ["exited"]}, False, "2"),
        ({"status": ["exited", "created"]}, False, "32"),
        ({"exited": ["3"]}, False, "2"),
        ({"exited": ["0"]}, False, ""),
        ({"name": ["^/?c1$"]}, True, "1"),
        ({"name": ["c"]}, True, "321"),
        ({"label": ["a"]}, True, "1"),
        ({"label": ["a=b"]}, True, "1"),
        ({"label": ["a=b", "x"]}, True, ""),
        ({"id": [RUNNING.id]}, True, "1"),
        ({"ancestor": ["busybox"]}, True, "321"),
        ({"ancestor": ["abab"]}, True, "321"),
        ({"ancestor": ["debian"]}, True, ""),
        ({"volume": ["data"]}, True, "3"),
        ({"volume": ["/data"]}, True, "3"),
        ({"network": ["bridge"]}, True, "321"),
        ({"publish": ["8080"]}, True, "1"),
        ({"publish": ["8000-9000/udp"]}, True, ""),
        ({"expose": ["80"]}, True, "2"),
        ({"since": ["c1"]}, False, "32"),
        ({"before": ["c2"]}, False, "1"),
    ],
)
def test_filters(filters, all_, found):
    rows = listing.select(ALL, filters, all_=all_, limit=0)
    assert "".join(row.name[1:] for row in rows) == found


def test_limit_means_all_states():
    assert [row.name for row in listing.select(ALL, {}, all_=False, limit=2)] == ["c3", "c2"]


@pytest.mark.parametrize("filters", [{"colour": ["red"]}, {"status": ["happy"]}, {"name": ["("]}, {"publish": ["x"]}])
def test_bad_filters(filters):
    with pytest.raises(InvalidArgument):
        listing.select(ALL, filters, all_=True, limit=0)


def test_unknown_reference_in_a_filter():
    with pytest.raises(NotFound):
        listing.select(ALL, {"since": ["nope"]}, all_=True, limit=0)


def test_inspect_has_dockers_fields():
    shown = container(
        state=State.RUNNING,
        pid=42,
        started_at_ns=NOW + 500_000_000,
        rootfs_mounts=[Mount(type="overlay", source="overlay", options=["lowerdir=/l", "upperdir=/u", "workdir=/w"])],
        sandbox=Sandbox(
            netns_path="/run/ns/1",
            endpoints=[
                Endpoint(
                    network="bridge", network_id="n1", endpoint_id="e1", ipv4_address="172.17.0.2", prefix_length=16,
                    gateway="172.17.0.1", mac_address="02:42:ac:11:00:02",
                )
            ],
            ports=[PortMapping(container_port=80, host_port=8080)],
        ),
        exposed_ports=["80/tcp", "81/tcp"],
    )  # fmt: skip
    text = document.inspect(shown, bundle="/run/b", exec_ids=[])
    json.dumps(text)
    assert text["Name"] == "/c1"
    assert text["Path"] == "sh"
    assert text["Args"] == ["-c", "x"]
    assert text["State"]["Running"] is True
    assert text["State"]["StartedAt"] == "2023-11-14T22:13:20.5Z"
    assert text["State"]["FinishedAt"] == "0001-01-01T00:00:00Z"
    network = text["NetworkSettings"]
    assert network["IPAddress"] == network["Networks"]["bridge"]["IPAddress"] == "172.17.0.2"
    assert network["Ports"] == {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}], "81/tcp": None}
    assert text["GraphDriver"]["Data"] == {"LowerDir": "/l", "UpperDir": "/u", "WorkDir": "/w"}


def test_runtime_configuration():
    wanted = container(
        spec=ContainerSpec(
            image="x",
            read_only_rootfs=True,
            ulimits=[Ulimit(name="nofile", soft=10, hard=-1)],
            resources=Resources(memory_bytes=64 << 20, nano_cpus=1_500_000_000, pids_limit=20, cpu_shares=512),
        ),
        attached_volumes=[
            MountPoint(type="bind", source="/s", target="/a/b", options=["rbind"]),
            MountPoint(type="bind", source="/t", target="/a", options=["rbind"]),
            MountPoint(type="tmpfs", source="tmpfs", target="/dev/shm", options=["size=1m"]),
        ],
    )
    config = oci.config(wanted, Identity(0, 0), oci.Surroundings(rootfs="/r", netns="/ns/x", hosts_file="/h"))
    assert config["root"] == {"path": "/r", "readonly": True}
    targets = [mount["destination"] for mount in config["mounts"]]
    assert len(set(targets)) == len(targets)
    assert targets.index("/a") < targets.index("/a/b")
    assert "/etc/hosts" in targets
    resources = config["linux"]["resources"]
    assert resources["memory"] == {"limit": 64 << 20, "swap": 128 << 20}
    assert resources["cpu"] == {"period": 100000, "quota": 150000, "shares": 512}
    assert resources["pids"] == {"limit": 20}
    assert resources["devices"][0] == {"allow": False, "access": "rwm"}
    assert {"type": "network", "path": "/ns/x"} in config["linux"]["namespaces"]
    assert config["process"]["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": (1 << 64) - 1}]
    assert "/proc/kcore" in config["linux"]["maskedPaths"]


def test_an_unprivileged_user_has_no_effective_capabilities():
    process = oci.process(container(), Identity(1000, 1000, home="/home/u"), oci.Surroundings(rootfs="/r"))
    assert process["capabilities"]["effective"] == []
    assert "CAP_CHOWN" in process["capabilities"]["bounding"]
    assert "HOME=/home/u" in process["env"]


def test_privileged_and_host_namespaces():
    config = oci.config(
        container(spec=ContainerSpec(image="x", privileged=True)),
        Identity(0, 0),
        oci.Surroundings(rootfs="/r", netns=None, pid_namespace=None, ipc_namespace=None, uts_namespace=None),
    )
    assert config["linux"]["namespaces"] == [{"type": "mount"}]
    assert "maskedPaths" not in config["linux"]
    assert "hostname" not in config
    assert "sysctl" not in config["linux"]


def test_network_files():
    named = container(spec=ContainerSpec(image="x", domainname="d", extra_hosts=["a:1.2.3.4", "gw:host-gateway"], dns=["9.9.9.9"]))
    sandbox = Sandbox(
        endpoints=[Endpoint(network="b", network_id="n", endpoint_id="e", ipv4_address="10.0.0.2", gateway="10.0.0.1")],
        nameservers=["8.8.8.8"],
        search=["lan"],
        resolv_options=["ndots:1"],
    )
    hosts = bundle.hosts(named, sandbox, "")
    assert "1.2.3.4\ta\n" in hosts
    assert "10.0.0.1\tgw\n" in hosts
    assert "10.0.0.2\thost.d host\n" in hosts
    assert bundle.resolv_conf(named.spec, sandbox) == "nameserver 9.9.9.9\nsearch lan\noptions ndots:1\n"

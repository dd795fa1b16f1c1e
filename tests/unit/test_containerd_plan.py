"""Merging spec and image, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyx_bus.contract.containerd import ContainerSpec, Resources, Ulimit
from pyx_bus.contract.imaged import ImageConfig
from pyx_bus.contract.netd import PortMapping
from pyx_bus.contract.volumed import MountRequest
from pyx_bus.errors import InvalidArgument
from pyx_containerd import names, plan, users


def image(**fields):
    return ImageConfig(id="sha256:0", reference="x", **fields)


def spec(**fields):
    return ContainerSpec(image="x", **fields)


@pytest.mark.parametrize(
    ("given_", "of_image", "args"),
    [
        ({}, {"cmd": ["sh"]}, ["sh"]),
        ({}, {"entrypoint": ["e"], "cmd": ["c"]}, ["e", "c"]),
        ({"command": ["d"]}, {"entrypoint": ["e"], "cmd": ["c"]}, ["e", "d"]),
        ({"entrypoint": ["f"]}, {"entrypoint": ["e"], "cmd": ["c"]}, ["f"]),
        ({"entrypoint": ["f"], "command": ["d"]}, {"entrypoint": ["e"], "cmd": ["c"]}, ["f", "d"]),
        ({"entrypoint": [""], "command": ["d"]}, {"entrypoint": ["e"]}, ["d"]),
        ({"command": []}, {"entrypoint": ["e"], "cmd": ["c"]}, ["e"]),
    ],
)
def test_command_and_entrypoint(given_, of_image, args):
    assert plan.process(spec(**given_), image(**of_image), "h").args == args


def test_no_command():
    with pytest.raises(InvalidArgument, match="no command"):
        plan.process(spec(), image(), "h")


def test_environment():
    merged = plan.process(spec(env=["A=2", "B", "C=3"], tty=True), image(env=["A=1", "B=1", "PATH=/bin"], cmd=["x"]), "host")
    assert merged.env == ["PATH=/bin", "HOSTNAME=host", "TERM=xterm", "A=2", "C=3"]


@given(st.lists(st.from_regex(r"[A-Z]{1,2}(=[a-z]*)?", fullmatch=True)))
def test_merge_env_keeps_the_last_of_each_name(entries):
    merged = plan.merge_env(entries)
    names_ = [entry.partition("=")[0] for entry in merged]
    assert len(names_) == len(set(names_))
    for name in names_:
        assert [entry for entry in entries if entry.partition("=")[0] == name][-1] in merged


@pytest.mark.parametrize(
    ("text", "number"), [("KILL", 9), ("SIGTERM", 15), ("sigusr1", 10), ("9", 9), ("RTMIN+3", 37), ("SIGRTMAX-1", 63), ("WINCH", 28)]
)
def test_signals(text, number):
    assert plan.parse_signal(text) == number


@pytest.mark.parametrize("text", ["", "0", "65", "NOPE", "SIG", "-9"])
def test_bad_signals(text):
    with pytest.raises(InvalidArgument, match="invalid signal"):
        plan.parse_signal(text)


BAD = [
    {"name": "a"},
    {"name": "-web"},
    {"name": "we b"},
    {"name": "../x"},
    {"working_dir": "relative"},
    {"hostname": "-x"},
    {"stop_signal": "NOPE"},
    {"env": ["=x"]},
    {"env": [""]},
    {"ulimits": [Ulimit(name="nope", soft=1, hard=1)]},
    {"ulimits": [Ulimit(name="nofile", soft=2, hard=1)]},
    {"cap_add": ["NOPE"]},
    {"devices": ["null"]},
    {"devices": ["/dev/null:/dev/x:abc"]},
    {"pull_policy": "sometimes"},
    {"log_driver": "../x"},
    {"pid_mode": "guest"},
    {"pid_mode": "container:"},
    {"uts_mode": "container:x"},
    {"network": "host", "ports": [PortMapping(container_port=80)]},
    {"sysctls": {"a b": "1"}},
    {"resources": Resources(memory_bytes=1000)},
    {"resources": Resources(memory_bytes=64 << 20, memory_swap_bytes=32 << 20)},
    {"resources": Resources(nano_cpus=3 * 10**9)},
    {"resources": Resources(nano_cpus=10**9, cpu_quota_us=1000)},
    {"resources": Resources(oom_score_adj=2000)},
    {"resources": Resources(cpuset_cpus="one")},
]


@pytest.mark.parametrize("fields", BAD)
def test_what_is_refused(fields):
    with pytest.raises(InvalidArgument):
        plan.check(spec(**fields), cpus=2)


def test_what_is_not_refused():
    plan.check(
        spec(
            name="web-1.x_y",
            working_dir="/srv",
            hostname="web.example",
            env=["A=b", "C"],
            cap_add=["NET_ADMIN", "cap_sys_time"],
            cap_drop=["all"],
            devices=["/dev/null:/dev/n:r", "/dev/zero:rw"],
            resources=Resources(memory_bytes=64 << 20, memory_swap_bytes=-1, nano_cpus=2 * 10**9, cpuset_cpus="0-1,1"),
        ),
        cpus=2,
    )


def test_capabilities():
    assert plan.capabilities([], [], privileged=False) == sorted(
        ("CAP_" + name for name in plan.DEFAULT_CAPABILITIES), key=lambda name: plan.CAPABILITIES.index(name[4:])
    )
    assert plan.capabilities(["NET_ADMIN"], ["ALL"], privileged=False) == ["CAP_NET_ADMIN"]
    assert "CAP_CHOWN" not in plan.capabilities(["ALL"], ["CHOWN"], privileged=False)
    assert len(plan.capabilities([], ["ALL"], privileged=True)) == len(plan.CAPABILITIES)
    assert plan.capabilities([], [], privileged=True, bound=0b11) == ["CAP_CHOWN", "CAP_DAC_OVERRIDE"]
    assert plan.capabilities(["DAC_READ_SEARCH"], ["ALL"], privileged=False, bound=0b11) == []


def test_volumes_of_the_image_become_anonymous_ones():
    mounts = plan.mounts(spec(mounts=[MountRequest(type="bind", source="/x", target="/data/")]), image(volumes=["/data", "/other"]))
    assert [(mount.source, mount.target) for mount in mounts] == [("/x", "/data/"), ("", "/other")]


def test_ports():
    published = spec(ports=[PortMapping(container_port=80, host_port=8080)], exposed_ports=["7000-7001"], publish_all_ports=True)
    exposed = plan.exposed_ports(published, image(exposed_ports=["53/udp"]))
    assert exposed == ["53/udp", "80/tcp", "7000/tcp", "7001/tcp"]
    assert [(port.container_port, port.host_port) for port in plan.ports(published, exposed)] == [
        (80, 8080),
        (53, 0),
        (7000, 0),
        (7001, 0),
    ]


PASSWD = b"root:x:0:0:root:/root:/bin/sh\n# comment\nbroken\nwww:x:33:34:w:/var/www:/bin/false\n"
GROUP = b"root:x:0:\nwww:x:34:\nadm:x:4:syslog,www\nweb:x:50:www\n"


@pytest.mark.parametrize(
    ("user", "uid", "gid", "groups", "home"),
    [
        ("", 0, 0, [0], "/root"),
        ("www", 33, 34, [34, 4, 50], "/var/www"),
        ("33", 33, 34, [34, 4, 50], "/var/www"),
        ("1234", 1234, 0, [0], "/"),
        ("1234:5678", 1234, 5678, [5678], "/"),
        ("www:adm", 33, 4, [4], "/var/www"),
        (":adm", 0, 4, [4], "/root"),
    ],
)
def test_users(user, uid, gid, groups, home):
    found = users.resolve(user, [], PASSWD, GROUP)
    assert (found.uid, found.gid, found.groups, found.home) == (uid, gid, groups, home)


def test_group_add():
    assert users.resolve("www", ["web", "99"], PASSWD, GROUP).groups == [34, 4, 50, 99]


@pytest.mark.parametrize(("user", "add"), [("nobody", []), ("root:nope", []), ("99999999999", []), ("root", ["nope"])])
def test_unknown_users(user, add):
    with pytest.raises(InvalidArgument, match="unable to find"):
        users.resolve(user, add, PASSWD, GROUP)


def test_names_are_free_and_from_the_words():
    taken = set()
    for number in range(500):
        name = names.random_name(lambda n, number=number: (number * 7919) % n, taken)
        assert name not in taken
        taken.add(name)
    plan.check_name(name)


def test_no_word_twice():
    assert len(set(names.QUALITIES)) == len(names.QUALITIES)
    assert len(set(names.THINGS)) == len(names.THINGS)


@pytest.mark.parametrize("text", ["1-9999999999", "0", "65536", "5-3", "9" * 5000, "²", "1-", "-1", ""])
def test_bad_ports_of_an_image(text):
    """Whoever made the image wrote them: never counted through before they're known to be ports."""
    if text == "1-":
        assert plan.exposed_ports(spec(), ImageConfig(id="", reference="", exposed_ports=[text])) == ["1/tcp"]
        return
    with pytest.raises(InvalidArgument, match="invalid port"):
        plan.exposed_ports(spec(), ImageConfig(id="", reference="", exposed_ports=[text]))


def test_numbers_no_file_should_hold():
    passwd = f"huge:x:{'9' * 5000}:0::/:/bin/sh\nweb:x:7:7::/web:/bin/sh\n".encode()
    assert users.resolve("web", [], passwd, b"").uid == 7
    with pytest.raises(InvalidArgument, match="unable to find user"):
        users.resolve("9" * 5000, [], passwd, b"")

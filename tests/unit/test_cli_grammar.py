"""pflag's rules, the table, the help made from it, and what starting the command line imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pyx_cli import help as help_
from pyx_cli.__main__ import find
from pyx_cli.grammar import Flag, UsageError, check_count, parse
from pyx_cli.table import ALIASES, COMMANDS, GLOBAL, GROUPS

FLAGS = (
    Flag("interactive", "i", "bool", ""),
    Flag("tty", "t", "bool", ""),
    Flag("detach", "d", "bool", ""),
    Flag("rm", "", "bool", ""),
    Flag("publish", "p", "list", ""),
    Flag("name", "", "string", ""),
    Flag("last", "n", "int", ""),
)


@pytest.mark.parametrize(
    ("words", "values", "args"),
    [
        ("-itd a", {"interactive": True, "tty": True, "detach": True}, ["a"]),
        ("-p8080:80 -p 1:2 -p=3:4 --publish=5:6", {"publish": ["8080:80", "1:2", "3:4", "5:6"]}, []),
        ("-itp 1:2", {"interactive": True, "tty": True, "publish": ["1:2"]}, []),
        ("--name=x=y --rm=false", {"name": "x=y", "rm": False}, []),
        ("--name x --rm true", {"name": "x", "rm": True}, ["true"]),
        ("-i=false -t=1", {"interactive": False, "tty": True}, []),
        ("a -i b", {"interactive": True}, ["a", "b"]),
        ("-- -i b", {}, ["-i", "b"]),
        ("- -n -5", {"last": -5}, ["-"]),
        ("--name -- x", {"name": "--"}, ["x"]),
        ("--help", {"help": True}, []),
        ("-ih", {"interactive": True, "help": True}, []),
    ],
)
def test_flags(words: str, values: dict[str, object], args: list[str]) -> None:
    assert parse(FLAGS, words.split()) == (values, args)


def test_the_first_argument_ends_the_flags_of_run() -> None:
    assert parse(FLAGS, ["-i", "image", "-t", "--name"], interspersed=False) == (
        {"interactive": True},
        ["image", "-t", "--name"],
    )
    assert parse(FLAGS, ["image", "--", "-t"], interspersed=False) == ({}, ["image", "--", "-t"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--foo", "unknown flag: --foo"),
        ("--foo=1", "unknown flag: --foo"),
        ("-iz", "unknown shorthand flag: 'z' in -iz"),
        ("--name", "flag needs an argument: --name"),
        ("-ip", "flag needs an argument: 'p' in -ip"),
        ("--rm=maybe", 'invalid argument "maybe" for "--rm" flag: strconv.ParseBool: parsing "maybe": invalid syntax'),
        ("-n x", 'invalid argument "x" for "-n, --last" flag: strconv.ParseInt: parsing "x": invalid syntax'),
        ("---x", "bad flag syntax: ---x"),
    ],
)
def test_what_is_wrong_is_said_as_docker_says_it(words: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(FLAGS, words.split())
    assert (caught.value.text, caught.value.status) == (message, 125)


def test_both_grammars_name_the_same_command() -> None:
    for short, long in (("run", "container run"), ("images", "image ls"), ("rmi", "image rm"), ("ps", "container ls")):
        assert find([*short.split(), "x"])[0] is find([*long.split(), "x"])[0]
    with pytest.raises(UsageError, match="'nope' is not a pyx command"):
        find(["nope"])
    with pytest.raises(UsageError, match="'nope' is not a pyx image command"):
        find(["image", "nope"])


def test_the_table_is_whole() -> None:
    import importlib

    for path, command in COMMANDS.items():
        assert callable(getattr(importlib.import_module(f"pyx_cli.commands.{command.module}"), command.function)), path
        longs = [flag.long for flag in command.flags]
        shorts = [flag.short for flag in command.flags if flag.short]
        assert len(set(longs)) == len(longs) and len(set(shorts)) == len(shorts), path
        assert all(flag.kind in ("bool", "string", "int", "list") for flag in command.flags)
        assert path.split()[0] in GROUPS or " " not in path
        assert f"pyx {path}" in help_.command_help(command, path)
    for target in ALIASES.values():
        assert target in COMMANDS
    for group in GROUPS:
        assert f"pyx {group} COMMAND" in help_.group_help(group)
    assert "Global options:" in help_.main_help()


def test_every_field_of_a_container_has_its_flag() -> None:
    """Set every flag of run once: together they must reach every field of the contract's ContainerSpec."""
    import msgspec

    from pyx_bus.contract.containerd import ContainerSpec, Resources
    from pyx_cli.grammar import Options
    from pyx_cli.spec import container_spec

    words = [
        "--name",
        "n",
        "--entrypoint",
        "e",
        "-e",
        "A=1",
        "-u",
        "1",
        "--group-add",
        "2",
        "-w",
        "/w",
        "-l",
        "a=b",
        "--annotation",
        "c=d",
        "-h",
        "host",
        "--domainname",
        "dom",
        "-t",
        "-i",
        "--rm",
        "--stop-signal",
        "INT",
        "--stop-timeout",
        "3",
        "--read-only",
        "--privileged",
        "--security-opt",
        "no-new-privileges",
        "--cap-add",
        "A",
        "--cap-drop",
        "B",
        "--device",
        "/dev/null",
        "--ulimit",
        "nofile=1:2",
        "--sysctl",
        "a.b=1",
        "--shm-size",
        "1m",
        "-m",
        "1g",
        "--memory-reservation",
        "1m",
        "--memory-swap",
        "2g",
        "--cpus",
        "1.5",
        "--cpu-shares",
        "2",
        "--cpuset-cpus",
        "0",
        "--cpuset-mems",
        "0",
        "--pids-limit",
        "9",
        "--oom-score-adj",
        "5",
        "-v",
        "vol:/v",
        "--network",
        "none",
        "--ip",
        "10.0.0.2",
        "--mac-address",
        "02:00:00:00:00:01",
        "-p",
        "1:2",
        "--expose",
        "5",
        "-P",
        "--dns",
        "1.1.1.1",
        "--dns-search",
        "s",
        "--dns-option",
        "o",
        "--add-host",
        "a:1.2.3.4",
        "--pid",
        "host",
        "--ipc",
        "host",
        "--uts",
        "host",
        "--cgroup-parent",
        "cg",
        "--log-driver",
        "none",
        "--log-opt",
        "a=b",
        "--runtime",
        "runc",
        "--platform",
        "linux/amd64",
        "--pull",
        "never",
        "--init",
        "--health-cmd",
        "true",
        "--health-action",
        "restart",
        "image",
        "cmd",
    ]
    command = COMMANDS["container run"]
    values, args = parse(command.flags, words, command.interspersed)
    spec = container_spec(Options(command, values, args), {}, "/")
    made_elsewhere = {"stdin_once"}
    assert set(ContainerSpec.__struct_fields__) - set(spec) == made_elsewhere
    resources = spec["resources"]
    assert isinstance(resources, dict)
    assert set(Resources.__struct_fields__) - set(resources) == {"cpu_period_us", "cpu_quota_us"}  # exclude --cpus
    decoded = msgspec.convert(spec, ContainerSpec)
    assert (decoded.env, decoded.mounts[0].source, decoded.ports[0].host_port) == (["A=1"], "vol", 1)


def test_the_wrong_number_of_arguments() -> None:
    with pytest.raises(UsageError) as caught:
        check_count(COMMANDS["container run"], 0)
    assert caught.value.text.startswith(
        "\"pyx container run\" requires at least 1 argument.\nSee 'pyx container run --help'."
    )
    with pytest.raises(UsageError, match="accepts no arguments"):
        check_count(COMMANDS["container ls"], 1)
    with pytest.raises(UsageError, match="requires exactly 2 arguments"):
        check_count(COMMANDS["container rename"], 1)


_SLOW = (
    "trio",
    "anyio",
    "msgspec",
    "argparse",
    "dataclasses",
    "json",
    "enum",
    "asyncio",
    "socket",
    "subprocess",
    "structlog",
)


def _modules(tmp_path: object, *words: str) -> set[str]:
    code = (
        "import sys, os; from pyx_cli.__main__ import dispatch; before = set(sys.modules);"
        f"sys.argv[1:] = {list(words)!r}; dispatch(sys.argv[1:]); sys.stderr.write('\\nMODULES ' + ' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYX_BUS": f"{tmp_path}/none.sock"},
    )
    return set(done.stderr.rpartition("MODULES ")[2].split())


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["ps"], ["ps", "--help"]])
def test_starting_imports_nothing_slow(tmp_path: object, words: list[str]) -> None:
    loaded = _modules(tmp_path, *words)
    assert "pyx_cli.table" in loaded
    # What pyx_bus.errors and msgpack bring in themselves isn't the command line's.
    code = "import sys, msgpack, pyx_bus.sync; print(*sys.modules)"
    theirs = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not (loaded - theirs) & set(_SLOW)
    assert not {name for name in loaded if name.startswith("pyx_") and name.split(".")[0] not in ("pyx_cli", "pyx_bus")}


def test_the_global_flags_stand_first() -> None:
    values, words = parse(GLOBAL, ["--debug", "-H", "unix:///x", "run", "--version"], interspersed=False)
    assert values == {"debug": True, "host": "unix:///x"} and words == ["run", "--version"]

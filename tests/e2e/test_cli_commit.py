"""commit and diff of real containers: the lines Docker prints, images that run, and kills in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.conftest import wait_for
from tests.imaged_changes import members

pytestmark = pytest.mark.root

CHANGE = r"""
    echo changed > /etc/passwd; rm /bin/vi; rm -r /var/www; mkdir -p /new/deep; echo one > /new/deep/file; ln -s /etc/shadow /new/link
    rm -r /home; mkdir /home; echo back > /home/again; chmod 700 /opt 2>/dev/null; chmod 1770 /tmp; echo vol > /data/file; touch /shm/x
    ln /new/deep/file /new/hard; mkfifo /new/fifo; chown 33:34 /new/deep/file; touch "/new/$(printf 'a\nD \033[1m')"
    echo ready; exec sleep 1000
"""
DOCKERS = [
    "C /bin", "D /bin/vi", "A /data", "C /etc", "C /etc/passwd", "C /home", "A /home/again", "A /new", "A /new/a\\x0aD \\x1b[1m",
    "A /new/deep", "A /new/deep/file", "A /new/fifo", "A /new/hard", "A /new/link", "A /shm", "C /tmp", "C /var", "D /var/www",
]  # fmt: skip


@pytest.fixture(scope="module")
def changed(stack: Any) -> Iterator[str]:
    options = ["--name", "changed", "-v", "changed-data:/data", "--tmpfs", "/shm", "-e", "MINE=1", "-l", "by=run"]
    stack.pyx("run", "-d", *options, "busybox", "sh", "-c", CHANGE, check=True)
    wait_for(lambda: "ready" in stack.pyx("logs", "changed").stdout, what="the changes")
    yield "changed"
    stack.pyx("rm", "-f", "changed", check=True)
    stack.pyx("volume", "rm", "changed-data", check=True)


@pytest.fixture(params=["running", "stopped"])
def box(request: pytest.FixtureRequest, stack: Any, changed: str) -> str:
    if request.param == "stopped":
        stack.pyx("kill", changed)
        stack.pyx("wait", changed, check=True)
    return changed


@pytest.fixture
def images(stack: Any) -> Iterator[list[str]]:
    """What a test makes; removed afterwards."""
    made: list[str] = []
    yield made
    for image in made:
        stack.pyx("rmi", image, check=True)


def test_diff(stack: Any, box: str) -> None:
    assert stack.pyx("diff", box, check=True).stdout.splitlines() == DOCKERS
    assert stack.pyx("container", "diff", box, check=True).stdout.splitlines() == DOCKERS


def test_commit(stack: Any, box: str, images: list[str]) -> None:
    instructions = ["ENV PATH=$PATH:/new MORE=2", 'CMD ["cat", "/new/deep/file"]', "LABEL more=1"]
    options = [word for line in instructions for word in ("-c", line)]
    done = stack.pyx("commit", "-a", "A. U. Thor", "-m", "why", *options, box, "made:1", check=True)
    images.append("made:1")
    document = json.loads(stack.pyx("inspect", "made:1", check=True).stdout)[0]
    assert done.stdout == document["Id"] + "\n" and (document["Author"], document["Comment"]) == ("A. U. Thor", "why")
    config = document["Config"]
    assert config["Labels"] == {"by": "run", "more": "1"} and config["Cmd"] == ["cat", "/new/deep/file"]
    assert config["Env"][0] == "MINE=1" and "MORE=2" in config["Env"]
    # the layer, as others read it
    layer = Path(document["GraphDriver"]["Data"]["UpperDir"])
    blobs = [path for path in (stack.root / "imaged/blobs/sha256").iterdir() if path.read_bytes()[:2] == b"\x1f\x8b"]
    found = next(list_ for blob in blobs if "new/deep" in (list_ := members(blob)))
    assert {"bin/.wh.vi", "var/.wh.www", "home/.wh..wh..opq", "new/link"} <= found.keys()
    assert (found["new/deep/file"].uid, found["new/deep/file"].gid, found["new/fifo"].isfifo()) == (33, 34, True)
    assert "data/file" not in found and "shm/x" not in found and found["data"].isdir()
    assert found["new/hard"].islnk() and found["tmp"].mode == 0o1770 and (layer / "new/deep/file").read_text() == "one\n"
    # and what runs of it
    assert stack.pyx("run", "--rm", "made:1", check=True).stdout == "one\n"
    script = "cat /etc/passwd /home/*; ls /bin/vi /var /data 2>&1; stat -c %a /tmp; echo $MINE$MORE"
    told = stack.pyx("run", "--rm", "made:1", "sh", "-c", script, check=True).stdout.splitlines()
    assert told[:2] == ["changed", "back"] and "ls: /bin/vi: No such file or directory" in told
    assert "www" not in told and "file" not in told and told[-2:] == ["1770", "12"]
    # a container of it has changed nothing
    stack.pyx("create", "--name", "fresh", "made:1", check=True)
    try:
        assert stack.pyx("diff", "fresh", check=True).stdout == ""
    finally:
        stack.pyx("rm", "fresh", check=True)
    events = stack.pyx("events", "--since", "10m", "--until", "0s", "-f", "event=commit", "--format", "json", check=True).stdout
    told = [json.loads(line) for line in events.splitlines()][-1]["Actor"]["Attributes"]
    assert (told["comment"], told["imageID"], told["imageRef"]) == ("why", document["Id"], "made:1")


def test_refusals(stack: Any, changed: str) -> None:
    for args, message in (
        (["commit", "nosuch"], "no such container"), (["diff", "nosuch"], "no such container"), (["commit"], "argument"),
        (["commit", changed, "BAD"], "invalid reference"), (["commit", "-c", "RUN x", changed], "unknown instruction"),
    ):  # fmt: skip
        done = stack.pyx(*args)
        assert done.returncode and message in done.stderr


def busy(stack: Any) -> bool:
    """A commit is being packed."""
    return any((stack.root / "imaged/ingest").iterdir())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("service", ["imaged", "containerd", "busd"])
def test_an_end_in_the_middle(stack: Any, images: list[str], service: str, how: signal.Signals) -> None:
    """No image, nothing half-made, and the container goes on."""
    script = "dd if=/dev/zero of=/zeros bs=1 count=1 seek=8G; echo ready; while :; do sleep 0.1; done"
    stack.pyx("run", "-d", "--name", "long", "busybox", "sh", "-c", script, check=True)
    try:
        wait_for(lambda: "ready" in stack.pyx("logs", "long").stdout, what="the file")
        before = stack.pyx("images", "-q", check=True).stdout
        with stack.popen("commit", "long", "half", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as commit:
            wait_for(lambda: busy(stack), what="the commit")
            assert stack.state("long") == "paused"
            os.kill(stack.service_pid(service), how)
            assert commit.wait(30) == 1
            assert commit.stderr is not None
            said = commit.stderr.read()
            assert b"went away during the call" in said or b"closed the connection" in said
        wait_for(lambda: stack.pyx("info").returncode == 0 and stack.state("long") == "running", 20, "the container to go on")
        wait_for(lambda: not busy(stack), 20, "a clean-up")
        assert stack.pyx("images", "-q", check=True).stdout == before
        stack.pyx("exec", "long", "rm", "/zeros", check=True)
        stack.pyx("commit", "long", "whole", check=True)
        images.append("whole")
    finally:
        stack.pyx("rm", "-f", "long", check=True)

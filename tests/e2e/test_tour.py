"""The README's first tour, and a whole distribution from a registry: what a newcomer does first works as it's written down."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from tests.e2e.conftest import PYX, wait_for
from tests.images import debian_tar, registry

README = Path(__file__).parents[2] / "README.md"


def commands() -> list[str]:
    """The tour's commands, one a line, comments cut off."""
    block = re.search(r"```console\n(.*?)```", README.read_text(), re.S)
    assert block
    lines = [line[2:] for line in block[1].splitlines() if line.startswith("# ")]
    return [re.sub(r"\s{2,}#.*", "", line) for line in lines]


def test_the_tour_of_the_readme(stack: Any) -> None:
    """Every command as it stands there, but for those that need a person (a terminal, following, events) or end the stack."""
    ran = 0
    for command in commands():
        if any(word in command for word in (" -it ", "logs -f", " events", "system down", "alias ")):
            continue
        if "curl" in command:
            wait_for(lambda command=command: shell(stack, command).stdout, 10, command)
        done = shell(stack, command)
        assert done.returncode == 0, (command, done.stderr)
        ran += 1
        if "echo hello" in command:
            assert done.stdout == "hello\n"
        if "curl" in command:
            assert done.stdout == "<h1>hi</h1>\n"
        if "IPAddress" in command:
            assert re.fullmatch(r"\d+\.\d+\.\d+\.\d+\n", done.stdout)
    assert ran >= 8
    stack.pyx("volume", "rm", "data", check=True)


def shell(stack: Any, command: str) -> subprocess.CompletedProcess[str]:
    environment = {**stack.env, "PATH": f"{PYX.parent}:{os.environ['PATH']}"}
    return subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=60)


def test_a_whole_debian_from_a_registry(stack: Any, tmp_path: Path) -> None:
    """A registry filled by skopeo, a pull by tag and by digest, and a run of what it brought."""
    tar = debian_tar()
    with registry(tmp_path) as address:
        layout = tmp_path / "debian"
        subprocess.run(["umoci", "init", "--layout", layout], check=True, capture_output=True)
        subprocess.run(["umoci", "new", "--image", f"{layout}:12"], check=True, capture_output=True)
        subprocess.run(["umoci", "raw", "add-layer", "--image", f"{layout}:12", tar], check=True, capture_output=True)
        subprocess.run(["umoci", "config", "--image", f"{layout}:12", "--config.cmd", "bash"], check=True, capture_output=True)
        target = f"docker://{address}/debian:12"
        subprocess.run(["skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:12", target], check=True)
        name = f"{address}/debian:12"
        stack.pyx("pull", name, check=True, timeout=120)
        try:
            script = ". /etc/os-release; echo $ID $VERSION_ID; dpkg -l bash | tail -n 1; id -un; ls -l /tmp /etc/shadow | head -n 1"
            done = stack.pyx("run", "--rm", name, "bash", "-c", script, check=True)
            lines = done.stdout.splitlines()
            assert lines[0] == "debian 12"
            assert lines[1].startswith("ii  bash")
            assert lines[2] == "root"
            digest = stack.pyx("inspect", "--format", "{{index .RepoDigests 0}}", name, check=True).stdout.strip()
            assert "@sha256:" in digest
            again = stack.pyx("pull", digest, check=True)
            assert "up to date" in again.stdout + again.stderr
        finally:
            for reference in (name, shlex.quote(digest)):
                stack.pyx("rmi", "-f", reference)
    assert "debian" not in stack.pyx("images", check=True).stdout

"""pyx on a real host: Debian 12 with systemd as PID 1 and cgroup v2 alone, in a virtual machine. ``make test-host``.

One machine is started for all of it; every ``check_*`` of ``guest/checks.py`` is one test here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.host import machine
from tests.host.guest.checks import CHECKS
from tests.images import busybox_tar

GUEST = Path(__file__).parent / "guest"
TIMEOUT_S = 1500


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> machine.Outcome:
    directory = tmp_path_factory.mktemp("host")
    tar = busybox_tar(directory / "busybox.tar")
    return machine.run(directory / "machine", [GUEST / "run", GUEST / "checks.py", tar], timeout_s=TIMEOUT_S)


@pytest.fixture(scope="session")
def results(outcome: machine.Outcome) -> dict[str, str]:
    """name → what was wrong ("" if nothing)."""
    file = outcome.share / "results"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not found:
        pytest.fail(f"the machine didn't run the checks (status {outcome.status}):\n{outcome.console}\n{outcome.output}")
    for one in found:
        print(f"{one['seconds']:6.1f} s  {one['name']}")
    print(f"{outcome.duration_s:6.1f} s  in all")
    return {one["name"]: one["problem"] for one in found}


@pytest.mark.parametrize("name", [name for name, _ in CHECKS])
def test_on_a_real_host(results: dict[str, str], name: str) -> None:
    assert name in results, "the machine ended before this check, or its time was up"
    assert not results[name], results[name]


def test_containers_are_stopped_when_the_host_shuts_down(results: dict[str, str], outcome: machine.Outcome) -> None:
    assert (outcome.share / "stopped").read_text() == "bye\n"
    assert outcome.shutdown_s < 75, "the host waited for something that was still there"

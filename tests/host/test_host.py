"""pyx on a real host: Debian 12 with systemd as PID 1 and cgroup v2 alone, in a virtual machine. ``make test-host``.

Three machines, one after the other, with one disk for /var/lib/pyx: the first does most and is shut down, the second finds what that left
and loses its power, the third finds what is left then. Every check in ``guest/checks.py`` is one test here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.host import machine
from tests.host.guest.checks import PHASES
from tests.images import busybox_tar

GUEST = Path(__file__).parent / "guest"
FILES = [GUEST / "run", GUEST / "checks.py"]
TIMEOUT_S = 1500
LATER_TIMEOUT_S = 400
# Events told before the power goes: some syncs of the journal come between, and some are due.
TOLD = 12


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="session")
def data(directory: Path) -> Path:
    return machine.data_disk(directory / "data.ext4")


@pytest.fixture(scope="session")
def outcome(directory: Path, data: Path) -> machine.Outcome:
    tar = busybox_tar(directory / "busybox.tar")
    return machine.run(directory / "machine", [*FILES, tar], data=data, timeout_s=TIMEOUT_S)


@pytest.fixture(scope="session")
def results(outcome: machine.Outcome) -> dict[str, str]:
    return problems(outcome)


@pytest.fixture(scope="session")
def rebooted(results: dict[str, str], directory: Path, data: Path) -> machine.Outcome:
    """After the first one's end."""

    def enough_told(share: Path) -> bool:
        offsets = share / "offsets"
        return offsets.exists() and len(offsets.read_text().splitlines()) >= TOLD

    where = directory / "rebooted"
    return machine.run(where, FILES, data=data, phase="reboot", timeout_s=LATER_TIMEOUT_S, power_off_when=enough_told)


@pytest.fixture(scope="session")
def results_after_reboot(rebooted: machine.Outcome) -> dict[str, str]:
    return problems(rebooted)


@pytest.fixture(scope="session")
def results_after_outage(rebooted: machine.Outcome, directory: Path, data: Path) -> dict[str, str]:
    offsets = (rebooted.share / "offsets").read_text().split("\n")
    told = directory / "told"
    told.write_text(f"{(rebooted.share / 'identity').read_text().strip()} {max(map(int, offsets[:-1]))}")
    return problems(machine.run(directory / "outage", [*FILES, told], data=data, phase="outage", timeout_s=LATER_TIMEOUT_S))


def problems(outcome: machine.Outcome) -> dict[str, str]:
    """name → what was wrong ("" if nothing)."""
    file = outcome.share / "results"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not found:
        pytest.fail(f"the machine didn't run the checks (status {outcome.status}):\n{outcome.console}\n{outcome.output}")
    for one in found:
        print(f"{one['seconds']:6.1f} s  {one['name']}")
    print(f"{outcome.duration_s:6.1f} s  in all")
    return {one["name"]: one["problem"] for one in found}


@pytest.mark.parametrize("name", [name for name, _ in PHASES[""]])
def test_on_a_real_host(results: dict[str, str], name: str) -> None:
    assert name in results, "the machine ended before this check, or its time was up"
    assert not results[name], results[name]


def test_containers_are_stopped_when_the_host_shuts_down(results: dict[str, str], outcome: machine.Outcome) -> None:
    assert (outcome.share / "stopped").read_text() == "bye\n"
    assert outcome.shutdown_s < 75, "the host waited for something that was still there"


@pytest.mark.parametrize("name", [name for name, _ in PHASES["reboot"][:-1]])
def test_after_a_reboot(results_after_reboot: dict[str, str], name: str) -> None:
    assert name in results_after_reboot, "the machine ended before this check, or its time was up"
    assert not results_after_reboot[name], results_after_reboot[name]


@pytest.mark.parametrize("name", [name for name, _ in PHASES["outage"]])
def test_after_a_power_cut(results_after_outage: dict[str, str], name: str) -> None:
    assert name in results_after_outage, "the machine ended before this check, or its time was up"
    assert not results_after_outage[name], results_after_outage[name]

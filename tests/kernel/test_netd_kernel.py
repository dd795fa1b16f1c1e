"""netd against a real kernel. Each scenario of netd_scenarios.py gets network and mount namespaces of its own, so none touches the
host's links or tables, and all may run at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

_SCENARIOS = Path(__file__).with_name("netd_scenarios.py")
_NAMES = re.findall(r"@scenario\nasync def (\w+)", _SCENARIOS.read_text())


@pytest.mark.root
@pytest.mark.parametrize("name", _NAMES)
def test_scenario(name: str, tmp_path: Path) -> None:
    command = ["unshare", "--net", "--mount", "--propagation", "private", sys.executable, str(_SCENARIOS), name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

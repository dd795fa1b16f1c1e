"""OCI runtimes (runc, crun and those with the same command line): their arguments, and what their failures mean.

Pure. The shim executes the arguments in the bundle directory, so every file is named relative to it.
Exit codes follow Docker: 127 the command isn't there, 126 it can't be executed, 125 anything else.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

LOG_FILE = "runtime.log"
PID_FILE = "init.pid"
UPDATE_FILE = "update.json"
CONSOLE = "{console}"
PLAIN_STATE = frozenset({"runc", "crun"})


@dataclass(frozen=True, slots=True)
class Runtime:
    """One runtime: the name it's configured under, its executable, and the directory of its own state."""

    name: str
    path: str
    root: str

    @property
    def has_plain_state(self) -> bool:
        """Whether what it keeps of a container whose processes have ended is a directory of the container's name and a cgroup, no
        more. Then ``delete`` needn't be executed (15 ms of CPU for each container that ends)."""
        return self.path.rpartition("/")[2] in PLAIN_STATE

    def _base(self, log: str) -> list[str]:
        return [self.path, "--root", self.root, "--log", log, "--log-format", "json"]

    def run(self, container_id: str, *, tty: bool) -> list[str]:
        """Create and start in one execution, detached: it returns when the container's process has been started."""
        console = ["--console-socket", CONSOLE] if tty else []
        return [*self._base(LOG_FILE), "run", "--detach", "--pid-file", PID_FILE, *console, "--bundle", ".", container_id]

    def exec(self, container_id: str, key: str, *, tty: bool) -> list[str]:
        console = ["--console-socket", CONSOLE] if tty else []
        files = ["--pid-file", f"exec-{key}.pid", "--process", f"exec-{key}.json"]
        return [*self._base(f"exec-{key}.log"), "exec", "--detach", *files, *console, container_id]

    def delete(self, container_id: str) -> list[str]:
        return [*self._base("delete.log"), "delete", "--force", container_id]

    def update(self, container_id: str) -> list[str]:
        """Limits as of ``UPDATE_FILE``, a runtime spec's ``linux.resources``; what isn't in it stays."""
        return [*self._base("update.log"), "update", "--resources", UPDATE_FILE, container_id]

    def pause(self, container_id: str) -> list[str]:
        return [*self._base("pause.log"), "pause", container_id]

    def resume(self, container_id: str) -> list[str]:
        return [*self._base("pause.log"), "resume", container_id]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a runtime failed: one line for people and Docker's exit code."""

    reason: str
    exit_code: int


_PREFIXES = re.compile(
    r"^(container_linux\.go:\d+: |runc run failed: |runc create failed: |exec failed: |unable to start container process: |"
    r"starting container process caused:? |error executing \w+: )+"
)
_MISSING = re.compile(
    r'exec: ".*": (executable file not found in \$PATH|stat .*: no such file or directory|no such file or directory)|'
    r"executable file [`'].*[`'] not found|open executable: No such file|exec .*: no such file or directory$",
    re.DOTALL,
)
_DENIED = re.compile(
    r'exec: ".*": (permission denied|is a directory|not a directory|stat .*: (permission denied|not a directory))|'
    r"open executable: Permission denied|executable file [`'].*[`'] (is not|isn't) executable|[Ee]xec format error|"
    r"exec .*: permission denied|the path [`'].*[`'] (exists but it is not executable|is not executable)",
    re.DOTALL,
)


def parse_failure(log: str, exit_code: int = 1) -> Failure:
    """What a runtime's JSON log says about its failure: the last error line decides. ``exit_code`` is the runtime's own."""
    reason = ""
    for line in log.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            if line.strip():
                reason = line.strip()
            continue
        if isinstance(entry, dict) and entry.get("msg") and entry.get("level", "error") in ("error", "fatal", "panic"):
            reason = str(entry["msg"])
    reason = " ".join(_PREFIXES.sub("", reason.strip()).split())
    if not reason:
        return Failure(f"the runtime failed with exit code {exit_code} and said nothing", 125)
    if _MISSING.search(reason):
        return Failure(reason, 127)
    if _DENIED.search(reason):
        return Failure(reason, 126)
    return Failure(reason, 125)

"""What every process of a stack does the same, without an event loop: directories, configuration, readiness, plain log lines."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from . import errors

DEFAULT_ROOT = Path("/var/lib/pyx")
DEFAULT_RUN = Path("/run/pyx")
DEFAULT_CONFIG = Path("/etc/pyx/config.toml")


def run_directory() -> Path:
    """$PYX_RUN, else /run/pyx."""
    return Path(os.environ.get("PYX_RUN") or DEFAULT_RUN)


def root_directory() -> Path:
    """$PYX_ROOT, else /var/lib/pyx."""
    return Path(os.environ.get("PYX_ROOT") or DEFAULT_ROOT)


def bus_path() -> Path:
    """$PYX_BUS, else bus.sock in the run directory."""
    return Path(os.environ.get("PYX_BUS") or run_directory() / "bus.sock")


def stack_prefix(run: Path) -> str:
    """ "pyx" for the stack of the host, pyx-<6 hex> of the run directory's path for any other."""
    if run == DEFAULT_RUN:
        return "pyx"
    return "pyx-" + hashlib.sha256(os.fsencode(run.absolute())).hexdigest()[:6]


def load_config(name: str) -> dict[str, Any]:
    """The table ``[name]`` of $PYX_CONFIG, else /etc/pyx/config.toml. Raises ``InvalidArgument`` if it can't be read."""
    import tomllib  # for those who have a file

    path = Path(os.environ.get("PYX_CONFIG") or DEFAULT_CONFIG)
    if not path.exists() and "PYX_CONFIG" not in os.environ:
        return {}
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        if "PYX_CONFIG" in os.environ:
            raise errors.InvalidArgument(f'configuration file "{path}" does not exist') from None
        return {}
    except (OSError, ValueError) as error:
        raise errors.InvalidArgument(f'cannot read the configuration file "{path}": {error}') from error
    table = data.get(name, {})
    if not isinstance(table, dict):
        raise errors.InvalidArgument(f'"{name}" in "{path}" is not a table')
    return table


def notify_ready() -> None:
    """Tell whoever started us (sd_notify(3): $NOTIFY_SOCKET) that we serve."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(b"READY=1", address)
        except OSError as error:
            logging.getLogger("pyx").warning("cannot notify readiness: %s", error)


class LineFormatter(logging.Formatter):
    """The form of the services' log lines: key=value, or JSON with $PYX_LOG_FORMAT=json."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self.service = service
        self.json = os.environ.get("PYX_LOG_FORMAT") == "json"

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        said = {
            "timestamp": stamp,
            "level": record.levelname.lower(),
            "service": self.service,
            "event": record.getMessage(),
        }
        if self.json:
            return json.dumps(said)
        return " ".join(f"{key}={_quoted(value)}" for key, value in said.items())


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if not value or any(c in value for c in ' ="\n') else value


def log_level() -> int:
    """$PYX_LOG_LEVEL, default info."""
    return logging.getLevelNamesMapping().get(os.environ.get("PYX_LOG_LEVEL", "info").upper(), logging.INFO)


def configure_plain_logging(service: str) -> None:
    """Log lines on stderr by the standard library alone, for a process that must stay small."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(service))
    logging.basicConfig(level=log_level(), handlers=[handler], force=True)

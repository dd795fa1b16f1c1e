"""pyx-busd: the broker's process."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from typing import Any

from .. import errors
from ..process import bus_path, configure_plain_logging, load_config, notify_ready, root_directory
from .journal import Limits
from .roles import Roles
from .server import Broker, make, settle

log = logging.getLogger("pyx.bus")

MAX_DESCRIPTORS = 65_536
_SETTINGS = {
    "journal_segment_bytes": "segment_bytes",
    "journal_max_bytes": "max_bytes",
    "journal_max_age_s": "max_age_s",
    "journal_sync_interval_s": "sync_interval_s",
}


def limits(config: dict[str, Any]) -> Limits:
    """The journal's bounds from the table ``[bus]`` of the configuration. Raises ``InvalidArgument``."""
    known: dict[str, Any] = {}
    for name, value in config.items():
        if name not in _SETTINGS:
            raise errors.InvalidArgument(f'unknown setting "{name}" in [bus]', hint=f"known: {', '.join(_SETTINGS)}")
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise errors.InvalidArgument(f'"{name}" in [bus] must be a number above 0, not {value!r}')
        known[_SETTINGS[name]] = value
    return Limits(**known)


class _Signals:
    """SIGTERM and SIGINT end the loop, SIGHUP has it read the host's groups again. Both wake it (signal(3), set_wakeup_fd)."""

    def __init__(self) -> None:
        self.end = False
        self.reload = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_end)
        signal.signal(signal.SIGHUP, self._on_reload)

    def _on_end(self, *_: object) -> None:
        self.end = True

    def _on_reload(self, *_: object) -> None:
        self.reload = True


def _serve(broker: Broker, signals: _Signals) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    broker.watch(reader)
    while not signals.end:
        broker.step(broker.timeout_s())
        if signals.reload:
            signals.reload = False
            broker.roles = Roles.of_host()
            broker.events.announce("daemon.reload", "bus", {"name": "bus"})
            log.info("groups and users read again")


def main() -> None:
    """Serve the bus until SIGTERM or SIGINT."""
    signals = _Signals()
    configure_plain_logging("bus")
    path = bus_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:  # a descriptor per connection, and those in passing
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MAX_DESCRIPTORS), hard))
    try:
        trace = os.environ.get("PYX_LOG_LEVEL") == "debug"
        broker = make(path, root_directory() / "bus", limits=limits(load_config("bus")), trace=trace)
    except errors.BusError as error:
        sys.exit(f"pyx-busd: {error.message}")
    broker.events.announce("service.up", "bus", {"name": "bus", "pid": str(os.getpid())})
    settle()
    notify_ready()
    log.info("ready path=%s", path)
    try:
        _serve(broker, signals)
    finally:
        path.unlink(missing_ok=True)
        broker.close()


if __name__ == "__main__":
    main()

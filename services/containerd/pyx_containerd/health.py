"""Health: what is checked, when, and what the results make of a container. Pure.

The rules are Docker's (its Dockerfile reference, HEALTHCHECK). A container is *starting* until its first success, *healthy* after a
success, *unhealthy* after ``retries`` failures in a row; while it's starting, failures within the start period don't count. The time
between checks counts from the end of one to the begin of the next.
"""

from __future__ import annotations

import msgspec

from pyx_bus.contract.imaged import HealthCheck
from pyx_bus.errors import InvalidArgument

from .model import CheckResult, Health, HealthStatus

SECOND_NS = 10**9
DEFAULT_INTERVAL_NS = 30 * SECOND_NS
DEFAULT_TIMEOUT_NS = 30 * SECOND_NS
DEFAULT_START_INTERVAL_NS = 5 * SECOND_NS
DEFAULT_RETRIES = 3
MIN_NS = 10**6  # Docker's; what an image asks for below it becomes it
MAX_NS = 2**63 - 1  # Go's Duration, and so the JSON of Docker's API
LOG_ENTRIES = 5
OUTPUT_BYTES = 4096
DEFAULT_SHELL = ("/bin/sh", "-c")
KINDS = ("CMD", "CMD-SHELL")
ACTIONS = ("", "none", "restart", "stop")
_DURATIONS = ("interval_ns", "timeout_ns", "start_period_ns", "start_interval_ns")


def merged(given: HealthCheck | None, image: HealthCheck | None) -> HealthCheck | None:
    """The image's check with what ``given`` says otherwise; None if there's nothing to run and nothing was said.

    Errors: invalid_argument.
    """
    if given is None:
        # Docker runs an image with a kind it doesn't know, and checks nothing
        return image if image is None or image.test[:1] == ["NONE"] or command(image, []) else None
    if given.test and given.test[0] != "NONE" and not command(given, []):
        raise InvalidArgument(f"invalid health check: {given.test} (NONE, CMD and its arguments, or CMD-SHELL and a command)")
    for name in _DURATIONS:
        value = getattr(given, name)
        if value and not MIN_NS <= value <= MAX_NS:
            what = name.removesuffix("_ns").replace("_", " ")
            raise InvalidArgument(f"the {what} of a health check can't be less than 1ms or more than 292 years")
    if not 0 <= given.retries < 1 << 31:
        raise InvalidArgument(f"invalid number of retries of a health check: {given.retries}")
    if image is None:
        return given
    return HealthCheck(**{name: getattr(given, name) or getattr(image, name) for name in HealthCheck.__struct_fields__})


def check_action(action: str) -> None:
    """Errors: invalid_argument."""
    if action not in ACTIONS:
        raise InvalidArgument(f'invalid health action: "{action}" (none, restart or stop)')


def command(check: HealthCheck | None, shell: list[str]) -> list[str]:
    """What to execute, empty if there's nothing to check. ``shell``: the image's for CMD-SHELL."""
    if check is None or len(check.test) < 2 or check.test[0] not in KINDS:
        return []
    return [*(shell or DEFAULT_SHELL), *check.test[1:]] if check.test[0] == "CMD-SHELL" else check.test[1:]


def timeout_ns(check: HealthCheck) -> int:
    return max(MIN_NS, check.timeout_ns or DEFAULT_TIMEOUT_NS)


def starting(health: Health | None) -> Health:
    """At a start of the container."""
    return Health(status=HealthStatus.STARTING, log=health.log if health else [])


def ended(health: Health | None) -> Health | None:
    """At its end. A container that doesn't run is unhealthy, as Docker has it: what waits for the status to be another than
    starting mustn't wait for ever."""
    return msgspec.structs.replace(health, status=HealthStatus.UNHEALTHY) if health else None


def after(check: HealthCheck, health: Health, result: CheckResult, *, age_ns: int) -> Health:
    """The health with one more result. ``age_ns``: how long the container had run when that check began."""
    log = [*health.log, result][-LOG_ENTRIES:]
    if result.exit_code == 0:
        return Health(status=HealthStatus.HEALTHY, log=log)
    if health.status is HealthStatus.STARTING and age_ns < check.start_period_ns:
        return msgspec.structs.replace(health, log=log)
    streak = health.failing_streak + 1
    status = HealthStatus.UNHEALTHY if streak >= (check.retries or DEFAULT_RETRIES) else health.status
    return Health(status=status, failing_streak=streak, log=log)


def delay_ns(check: HealthCheck, health: Health, age_ns: int) -> int:
    """How long to wait from the end of a check (or the container's start) to the next. ``age_ns``: how long it has run then."""
    if health.status is HealthStatus.STARTING and age_ns < check.start_period_ns:
        return max(MIN_NS, check.start_interval_ns or DEFAULT_START_INTERVAL_NS)
    return max(MIN_NS, check.interval_ns or DEFAULT_INTERVAL_NS)


def output(data: bytes) -> str:
    """A check's output as it's kept: the first 4096 bytes, with dots if there was more."""
    return data[:OUTPUT_BYTES].decode(errors="replace") + ("..." if len(data) > OUTPUT_BYTES else "")


def too_long(check: HealthCheck, text: str) -> str:
    """What is kept of a check that exceeded its timeout."""
    said = f"Health check exceeded timeout ({duration(timeout_ns(check))})"
    return f"{said}: {text}" if text else said


def duration(time_ns: int) -> str:
    """Go's text of a duration, which Docker prints: 1m30s, 1.5s, 250ms. To the microsecond."""
    if time_ns < SECOND_NS:
        return f"{time_ns / 10**6:.3f}".rstrip("0").rstrip(".") + "ms"
    whole, fraction = divmod(time_ns, SECOND_NS)
    minutes, seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    rest = f"{seconds}.{fraction // 1000:06d}".rstrip("0").rstrip(".") + "s"
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + rest


def in_brackets(health: Health) -> str:
    """As ``ps`` says it."""
    return "health: starting" if health.status is HealthStatus.STARTING else health.status.value

"""Health: Docker's rules as a table, and the loop that checks, on a clock of its own."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_containerd_views import container

from pyx_bus.contract.containerd import ContainerSpec
from pyx_bus.contract.imaged import HealthCheck
from pyx_bus.errors import InvalidArgument
from pyx_containerd import checks, document, health, listing
from pyx_containerd.engine import Live
from pyx_containerd.model import CheckResult, Health, HealthStatus, State
from pyx_containerd.status import status_text

S = 10**9
STARTING, HEALTHY, UNHEALTHY = HealthStatus.STARTING, HealthStatus.HEALTHY, HealthStatus.UNHEALTHY


def result(exit_code: int, output: str = "") -> CheckResult:
    return CheckResult(started_at_ns=1, ended_at_ns=2, exit_code=exit_code, output=output)


def course(check: HealthCheck, codes: list[int], age_ns: int = 10**18) -> list[tuple[str, int]]:
    """(status, streak) after each result."""
    now, seen = health.starting(None), []
    for code in codes:
        now = health.after(check, now, result(code), age_ns=age_ns)
        seen.append((now.status.value, now.failing_streak))
    return seen


def test_the_course_of_a_container() -> None:
    check = HealthCheck(test=["CMD", "x"], retries=2)
    assert course(check, [0, 1, 0, 1, 2, -1, 0]) == [
        ("healthy", 0), ("healthy", 1), ("healthy", 0), ("healthy", 1), ("unhealthy", 2), ("unhealthy", 3), ("healthy", 0),
    ]  # fmt: skip
    assert course(HealthCheck(test=["CMD", "x"]), [1, 1, 1]) == [("starting", 1), ("starting", 2), ("unhealthy", 3)]


def test_failures_in_the_start_period_do_not_count_until_the_first_success() -> None:
    check = HealthCheck(test=["CMD", "x"], retries=1, start_period_ns=60 * S)
    assert course(check, [1, 1], age_ns=59 * S) == [("starting", 0)] * 2
    assert course(check, [1], age_ns=60 * S) == [("unhealthy", 1)]
    assert course(check, [0, 1], age_ns=1 * S) == [("healthy", 0), ("unhealthy", 1)]


@given(st.lists(st.integers(-1, 3)), st.integers(0, 4), st.booleans())
def test_what_holds_of_any_course(codes: list[int], retries: int, young: bool) -> None:
    check = HealthCheck(test=["CMD", "x"], retries=retries, start_period_ns=S)
    now = health.starting(None)
    for code in codes:
        before = now
        now = health.after(check, now, result(code), age_ns=0 if young else 2 * S)
        assert now.log == [*before.log, result(code)][-5:]
        assert (now.status is HEALTHY) or code != 0
        assert now.status is not STARTING or before.status is STARTING
        assert now.failing_streak in (0, before.failing_streak, before.failing_streak + 1)
        if now.status is UNHEALTHY:
            assert now.failing_streak >= (retries or 3)
    again = health.starting(now)
    assert (again.status, again.failing_streak, again.log) == (STARTING, 0, now.log)
    ended = health.ended(now)
    assert ended is not None and (ended.status, ended.log) == (UNHEALTHY, now.log)


@pytest.mark.parametrize(
    ("check", "status", "age_s", "seconds"),
    [
        (HealthCheck(), STARTING, 0, 30),
        (HealthCheck(interval_ns=2 * S), UNHEALTHY, 0, 2),
        (HealthCheck(start_period_ns=10 * S), STARTING, 9, 5),
        (HealthCheck(start_period_ns=10 * S), STARTING, 10, 30),
        (HealthCheck(start_period_ns=10 * S, start_interval_ns=S), STARTING, 1, 1),
        (HealthCheck(start_period_ns=10 * S, start_interval_ns=S), HEALTHY, 1, 30),
        (HealthCheck(interval_ns=1), HEALTHY, 1, 0.001),
    ],
)
def test_when_the_next_one_is_due(check: HealthCheck, status: HealthStatus, age_s: int, seconds: float) -> None:
    assert health.delay_ns(check, Health(status=status), age_s * S) == seconds * S


def test_flags_over_the_image() -> None:
    image = HealthCheck(test=["CMD", "a"], interval_ns=5 * S, retries=4)
    assert health.merged(None, image) is image
    assert health.merged(None, None) is None
    assert health.merged(HealthCheck(interval_ns=S), image) == HealthCheck(test=["CMD", "a"], interval_ns=S, retries=4)
    assert health.merged(HealthCheck(test=["CMD-SHELL", "b"]), image) == HealthCheck(test=["CMD-SHELL", "b"], interval_ns=5 * S, retries=4)
    none = health.merged(HealthCheck(test=["NONE"]), image)
    assert none is not None and health.command(none, []) == []
    assert health.merged(None, HealthCheck(test=["HTTP", "x"])) is None  # what nobody knows isn't checked
    assert health.merged(None, HealthCheck(test=["NONE"])) == HealthCheck(test=["NONE"])


@pytest.mark.parametrize(
    "bad",
    [
        {"test": ["CMD"]}, {"test": ["x", "y"]}, {"interval_ns": 999_999}, {"timeout_ns": -1}, {"start_period_ns": 1 << 63},
        {"retries": -1},
    ],
)  # fmt: skip
def test_what_a_user_may_not_say(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        health.merged(HealthCheck(**bad), None)  # type: ignore[arg-type]


def test_commands() -> None:
    assert health.command(HealthCheck(test=["CMD", "a", "b"]), ["ash"]) == ["a", "b"]
    assert health.command(HealthCheck(test=["CMD-SHELL", "a b"]), []) == ["/bin/sh", "-c", "a b"]
    assert health.command(HealthCheck(test=["CMD-SHELL", "a b"]), ["ash", "-ec"]) == ["ash", "-ec", "a b"]
    assert health.command(None, []) == health.command(HealthCheck(), []) == []


def test_texts() -> None:
    assert health.output(b"\xffok") == "\ufffdok"
    assert health.output(b"x" * 4096) == "x" * 4096
    assert health.output(b"x" * 4097) == "x" * 4096 + "..."
    durations = {30 * S: "30s", 90 * S: "1m30s", 3600 * S: "1h0m0s", S // 4: "250ms", 3 * S // 2: "1.5s", 10**6: "1ms", 60 * S: "1m0s"}
    assert {ns: health.duration(ns) for ns in durations} == durations


def test_what_people_see() -> None:
    check = HealthCheck(test=["CMD", "x"], interval_ns=S)
    now = Health(status=UNHEALTHY, failing_streak=4, log=[result(-1, "no")])
    box = container(state=State.RUNNING, started_at_ns=1, health=now, healthcheck=check)
    assert status_text(box, 6 * S) == "Up 5 seconds (unhealthy)"
    assert status_text(msgspec.structs.replace(box, health=Health(status=STARTING)), 6 * S) == "Up 5 seconds (health: starting)"
    assert status_text(msgspec.structs.replace(box, state=State.PAUSED), 6 * S) == "Up 5 seconds (Paused)"
    shown = document.inspect(box, bundle="", exec_ids=[])
    assert shown["Config"]["Healthcheck"] == {"Test": ["CMD", "x"], "Interval": S}
    assert shown["State"]["Health"] == {
        "Status": "unhealthy",
        "FailingStreak": 4,
        "Log": [{"Start": "1970-01-01T00:00:00.000000001Z", "End": "1970-01-01T00:00:00.000000002Z", "ExitCode": -1, "Output": "no"}],
    }
    plain = container(2, state=State.RUNNING)

    def chosen(*values: str) -> list[str]:
        return [row.name for row in listing.select([box, plain], {"health": list(values)}, all_=False, limit=0)]

    assert (chosen("unhealthy"), chosen("none"), chosen("healthy"), chosen("none", "unhealthy")) == (["c1"], ["c2"], [], ["c2", "c1"])
    assert listing.summary(box, 1).health == "unhealthy"


class Bench:
    """The loop on its own clock: checks that take as long and end as they're told, and what is saved and published of them."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, check: HealthCheck, outcomes: list[tuple[float, int]]
    ) -> None:
        self.begun: list[float] = []
        self.told: list[str] = []
        self.given_up = 0
        self.nursery = nursery
        bench, remaining = self, iter(outcomes)

        async def one(checker: checks.Checker) -> CheckResult:
            bench.begun.append(round(trio.current_time() - bench.origin, 3))
            took, code = next(remaining, (0, 0))
            try:
                await trio.sleep(took)
            except trio.Cancelled:
                bench.given_up += 1
                raise
            return result(code)

        async def flush() -> None:
            await trio.lowlevel.checkpoint()

        monkeypatch.setattr(checks.Checker, "check", one)
        monkeypatch.setattr(checks, "_save", lambda *_: None)
        self.engine = SimpleNamespace(
            bundle=lambda _: None,
            bus=SimpleNamespace(flush=flush),
            log=SimpleNamespace(info=lambda *_, **__: None),
            publish=lambda _kind, _record, fields, **attributes: self.told.append(attributes["health_status"]),
            background=lambda function, *arguments: nursery.start_soon(function, *arguments),
            act_on_health=None,
        )
        self.origin = trio.current_time()
        self.live = Live(container(state=State.RUNNING, started_at_ns=0, healthcheck=check, spec=ContainerSpec(image="busybox")))
        monkeypatch.setattr(checks.time, "time_ns", lambda: int((trio.current_time() - self.origin) * S))


async def test_the_loop(autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    check = HealthCheck(test=["CMD", "x"], interval_ns=10 * S, retries=2, start_period_ns=9 * S, start_interval_ns=2 * S)
    async with trio.open_nursery() as nursery:
        bench = Bench(monkeypatch, nursery, check, [(1, 1), (1, 1), (1, 0), (3, 1), (0, 1), (0, 0)])
        checks.started(bench.engine, bench.live)  # type: ignore[arg-type]
        checks.begin(bench.engine, bench.live)  # type: ignore[arg-type]  # it's going on already: no second one
        await trio.sleep(50)
        # from the end of each to the next: two seconds while starting, then ten
        assert bench.begun == [2, 5, 8, 19, 32, 42]
        assert bench.told == ["starting", "healthy", "unhealthy", "healthy"]
        nursery.cancel_scope.cancel()


async def test_pausing_gives_up_and_going_on_waits_a_whole_interval(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = HealthCheck(test=["CMD", "x"], interval_ns=10 * S)
    async with trio.open_nursery() as nursery:
        bench = Bench(monkeypatch, nursery, check, [(100, 1)])
        checks.started(bench.engine, bench.live)  # type: ignore[arg-type]
        await trio.sleep(15)
        assert not bench.live.unchecked.is_set()
        checks.stop(bench.live)
        await bench.live.unchecked.wait()
        assert bench.given_up == 1 and bench.live.record.health == Health(status=STARTING)
        bench.live.record = msgspec.structs.replace(bench.live.record, state=State.PAUSED)
        checks.begin(bench.engine, bench.live)  # type: ignore[arg-type]
        await trio.sleep(85)
        bench.live.record = msgspec.structs.replace(bench.live.record, state=State.RUNNING)
        checks.begin(bench.engine, bench.live)  # type: ignore[arg-type]
        await trio.sleep(15)
        assert bench.begun == [10, 110]
        assert bench.told == ["starting", "healthy"]
        nursery.cancel_scope.cancel()

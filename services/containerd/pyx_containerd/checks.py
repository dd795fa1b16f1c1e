"""Running health checks: one task for each container that has one, for as long as it runs and isn't paused.

A check is an exec whose output comes here. At most one of a container goes on at a time, and few of all containers' are being started at
once. What exceeds its timeout is killed with everything it has begun. A check whose container is paused, stopped or ends under it is given
up: it has no result.

The health is in the container's record, and after each check in the bundle's file ``health`` (in memory, like the run it is about): a
restarted service goes on with it. The file ``check`` names the check that is under way; a restarted service ends that one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec
import trio

from pyx_bus import errors
from pyx_bus.contract import containerd as contract

from . import execute, health, kernel
from .engine import Engine, Execution, Live
from .model import CheckResult, Health, HealthStatus, State

HEALTH_FILE, CHECK_FILE = "health", "check"
ATTRIBUTES = {"healthcheck": "true"}
KILLED_WITHIN_S = 10.0  # a killed process that's still there then is stuck in the kernel
END_WITHIN_S = 1.0  # from the end of a process with its container to the container's end's being told
PAUSE_S = 0.01  # between two reads of what is thrown away: a check that only writes mustn't keep this service busy


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """``HEALTH_FILE``. ``told``: ``Live.told_health``; if it's another than the health's, the event is due."""

    run: int
    told: str
    health: Health


class Checker:
    """The checks of one run of a container."""

    def __init__(self, engine: Engine, live: Live, command: list[str], scope: trio.CancelScope) -> None:
        self.engine = engine
        self.live = live
        self.command = command
        self.scope = scope
        self.bundle = engine.bundle(live.id)
        self.last: Execution | None = None
        # the wall clock may be set meanwhile
        self.started_at = trio.current_time() - max(0, time.time_ns() - live.record.started_at_ns) / 10**9

    @property
    def age_ns(self) -> int:
        return int((trio.current_time() - self.started_at) * 10**9)

    async def run(self, first_ns: int | None) -> None:
        """Check until cancelled. ``first_ns``: when to begin, else after the usual time."""
        wait_ns = first_ns
        while True:
            record = self.live.record
            assert record.healthcheck is not None and record.health is not None
            if wait_ns is None:
                wait_ns = health.delay_ns(record.healthcheck, record.health, self.age_ns)
            await trio.sleep(wait_ns / 10**9)
            age_ns = self.age_ns
            result = await self.check()
            take(self.engine, self.live, result, age_ns)
            wait_ns = None

    async def check(self) -> CheckResult:
        """One check. Cancelled, it's killed."""
        started_at_ns = time.time_ns()
        if self.last is not None and not self.last.ended.is_set():
            return _result(started_at_ns, -1, "the last health check can't be killed, so no other is begun")
        record = self.live.record
        assert record.healthcheck is not None
        said = bytearray()
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(writer, True)
        key = execute.new_key()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_read, reader, said)
                try:
                    async with self.engine.check_slots:
                        started_at_ns = time.time_ns()
                        (self.bundle / CHECK_FILE).write_text(key)
                        request = contract.ExecContainer(container=self.live.id, args=self.command, stdout=True, stderr=True)
                        execution, _, pid = await execute.begin(
                            self.engine, self.live, request, [writer, writer], key=key, attributes=ATTRIBUTES
                        )
                except (errors.BusError, OSError) as error:
                    nursery.cancel_scope.cancel()
                    # it quotes the command, which may be long
                    reason = error.message if isinstance(error, errors.BusError) else str(error)
                    return _result(started_at_ns, -1, health.output(reason.encode(errors="replace")))
                finally:
                    os.close(writer)
                self.last = execution
                in_time = await self._wait(execution, pid, health.timeout_ns(record.healthcheck) / 10**9)
                nursery.cancel_scope.cancel()
            _read_rest(reader, said)
        finally:
            os.close(reader)
            if self.last is None or self.last.key != key:  # it wasn't begun
                _forget(self.bundle, key)
        text = health.output(bytes(said))
        if not in_time:
            return _result(started_at_ns, -1, health.too_long(record.healthcheck, text))
        return _result(started_at_ns, execution.exit.code if execution.exit else -1, text)

    async def _wait(self, execution: Execution, pid: int, timeout_s: float) -> bool:
        """Wait for its end. False if it had to be killed."""
        in_time = False
        try:
            with trio.move_on_after(timeout_s):
                await execution.ended.wait()
                in_time = True
            if not in_time:
                self._kill(execution, pid)
                with trio.move_on_after(KILLED_WITHIN_S):
                    await execution.ended.wait()
            elif execution.exit is None or execution.exit.signal == 9:
                await trio.sleep(END_WITHIN_S)  # if it ended with its container, this isn't its result: we're cancelled here
        finally:
            if not execution.ended.is_set():
                self._kill(execution, pid)
                if self.scope.cancel_called:  # else the service ends, and nobody hears of the process's end
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + KILLED_WITHIN_S):
                        await execution.ended.wait()
            if execution.ended.is_set():
                execute.over(self.engine, self.live, execution)
                _forget(self.bundle, execution.key)
        return in_time

    def _kill(self, execution: Execution, pid: int) -> None:
        if not execution.ended.is_set():
            kernel.kill_tree(self.live.record.cgroup, pid)


def _result(started_at_ns: int, exit_code: int, output: str) -> CheckResult:
    return CheckResult(started_at_ns=started_at_ns, ended_at_ns=time.time_ns(), exit_code=exit_code, output=output)


async def _read(fd: int, said: bytearray) -> None:
    """What is said as it is said, so that nobody who says much is kept waiting. Beyond what is kept it's thrown away."""
    while True:
        await trio.lowlevel.wait_readable(fd)
        data = os.read(fd, 65536)
        if not data:
            return
        if len(said) <= health.OUTPUT_BYTES:
            said += data[: health.OUTPUT_BYTES + 1]
        else:
            await trio.sleep(PAUSE_S)


def _read_rest(fd: int, said: bytearray) -> None:
    while len(said) <= health.OUTPUT_BYTES:
        try:
            data = os.read(fd, health.OUTPUT_BYTES + 1)
        except BlockingIOError:  # something it left behind has it open
            return
        if not data:
            return
        said += data


# beginning and ending ---------------------------------------------------------------------------------------------------


def started(engine: Engine, live: Live) -> None:
    """A run has begun."""
    if not _command(live):
        return
    live.record = msgspec.structs.replace(live.record, health=health.starting(live.record.health))
    live.told_health = ""
    _tell(engine, live)
    begin(engine, live)


def begin(engine: Engine, live: Live, first_ns: int | None = None) -> None:
    """Check from now on, if there's something to check and it isn't done already."""
    command = _command(live)
    if not command or live.watch is not None or live.record.state is not State.RUNNING:
        return
    live.watch = scope = trio.CancelScope()
    previous, live.unchecked = live.unchecked, trio.Event()
    engine.background(_watch, engine, live, command, scope, previous, live.unchecked, first_ns)


async def _watch(
    engine: Engine,
    live: Live,
    command: list[str],
    scope: trio.CancelScope,
    previous: trio.Event,
    unchecked: trio.Event,
    first_ns: int | None,
) -> None:
    try:
        with scope:
            await previous.wait()
            await Checker(engine, live, command, scope).run(first_ns)
    finally:
        unchecked.set()
        if live.watch is scope:
            live.watch = None


async def stopped(live: Live) -> None:
    """``stop``, and wait until no check is left."""
    while not live.unchecked.is_set():
        stop(live)
        await live.unchecked.wait()


def stop(live: Live) -> None:
    """Don't check any more; a check under way is given up."""
    if live.watch is not None:
        live.watch.cancel()
        live.watch = None


def _command(live: Live) -> list[str]:
    return health.command(live.record.healthcheck, live.record.image.shell)


# results ----------------------------------------------------------------------------------------------------------------


def take(engine: Engine, live: Live, result: CheckResult, age_ns: int) -> None:
    """A check has been done: remember it, and tell if that changes the status."""
    record = live.record
    if record.state is not State.RUNNING or record.health is None or record.healthcheck is None:
        return
    before = record.health
    now = health.after(record.healthcheck, before, result, age_ns=age_ns)
    live.record = msgspec.structs.replace(record, health=now)
    if now.status is before.status:
        _save(engine, live)
        return
    engine.log.info("health changed", container=live.id, status=now.status.value, failing_streak=now.failing_streak)
    _tell(engine, live)
    _act(engine, live)


def _act(engine: Engine, live: Live) -> None:
    now = live.record.health
    if now is not None and now.status is HealthStatus.UNHEALTHY and live.record.spec.health_action in ("restart", "stop"):
        engine.background(engine.act_on_health, live)


def _tell(engine: Engine, live: Live) -> None:
    now = live.record.health
    assert now is not None
    _save(engine, live)
    fields = {"status": now.status.value, "failing_streak": now.failing_streak}
    engine.publish(contract.ContainerHealthChanged, live.record, fields, health_status=now.status.value)
    engine.background(_told, engine, live, live.record.run, now.status)


async def _told(engine: Engine, live: Live, run: int, status: HealthStatus) -> None:
    await engine.bus.flush()
    record = live.record
    if record.run == run and record.state in (State.RUNNING, State.PAUSED) and record.health and record.health.status is status:
        live.told_health = status
        _save(engine, live)


def _save(engine: Engine, live: Live) -> None:
    assert live.record.health is not None
    saved = Saved(run=live.record.run, told=live.told_health, health=live.record.health)
    place = engine.bundle(live.id)
    try:
        temporary = place / (HEALTH_FILE + ".tmp")
        temporary.write_bytes(msgspec.msgpack.encode(saved))
        temporary.replace(place / HEALTH_FILE)
    except OSError as error:  # it's in memory all the same
        engine.log.warning("the health can't be kept for a restart of the service", container=live.id, error=str(error))


# after a restart of the service -----------------------------------------------------------------------------------------


def load(engine: Engine, live: Live) -> bool:
    """Take up what was kept of the run the record is about. False if there's nothing."""
    try:
        saved = msgspec.msgpack.decode((engine.bundle(live.id) / HEALTH_FILE).read_bytes(), type=Saved)
    except (OSError, msgspec.DecodeError):
        return False
    if saved.run != live.record.run:
        return False
    live.record = msgspec.structs.replace(live.record, health=saved.health)
    live.told_health = saved.told
    return True


def resume(engine: Engine, live: Live, known: bool) -> None:
    """Go on with a container that was found running. ``known``: its health was loaded."""
    live.unchecked = trio.Event()
    engine.background(_resume, engine, live, known, live.unchecked)


async def _resume(engine: Engine, live: Live, known: bool, given_up: trio.Event) -> None:
    try:
        await _give_up(engine, live)
    finally:
        given_up.set()
    if not live.running or not _command(live):
        return
    if not known or live.record.health is None:
        started(engine, live)
        return
    if live.told_health != live.record.health.status:
        _tell(engine, live)
    _act(engine, live)
    begin(engine, live, first_ns=_due_ns(live))


def _due_ns(live: Live) -> int:
    """When the next check is due, of those that went on without us."""
    record = live.record
    assert record.healthcheck is not None and record.health is not None
    since = max([record.started_at_ns, *(result.ended_at_ns for result in record.health.log)])
    usual = health.delay_ns(record.healthcheck, record.health, max(0, since - record.started_at_ns))
    return min(usual, max(0, usual - (time.time_ns() - since)))


def _forget(bundle: Path, key: str) -> None:
    execute.remove_files(bundle, key)
    (bundle / CHECK_FILE).unlink(missing_ok=True)


async def _give_up(engine: Engine, live: Live) -> None:
    """End the check that was under way when the service was killed: nobody reads what it says, or waits for its end."""
    bundle, shim = engine.bundle(live.id), live.shim
    try:
        key = (bundle / CHECK_FILE).read_text()
    except OSError:
        return
    if shim is None or not key:
        return
    state = await shim.state()
    await _children_end(state.shim_pid, f"exec-{key}.json")  # the runtime may still be about to begin it
    await shim.state()  # what it's asked may reach it before the signal that tells of that end; the next question can't
    try:
        pid = int((bundle / f"exec-{key}.pid").read_text())
        await shim.kill(key, 0)
    except (OSError, ValueError):
        pass  # it wasn't begun, or is over
    else:
        engine.log.info("giving up a health check", container=live.id, pid=pid)
        kernel.kill_tree(live.record.cgroup, pid)
    _forget(bundle, key)


async def _children_end(parent: int, word: str) -> None:
    """Wait for the end of the children of a process that have ``word`` among their arguments."""
    fds = kernel.children_with(parent, word)
    try:
        for fd in fds:
            await trio.lowlevel.wait_readable(fd)
    finally:
        for fd in fds:
            os.close(fd)

"""Another process in a running container.

Without a terminal the client's own descriptors become the process's stdio, so that no byte passes through any service. A command that
plainly can't be executed is refused before the runtime is asked, since the runtime would write its complaint to that same stderr.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import trio

from pyx_bus import errors
from pyx_bus.contract import containerd as contract

from . import bundle as bundles
from . import kernel, oci, plan
from .drivers.runtime import parse_failure
from .engine import Engine, Execution, Live
from .errors import exec_failed, is_paused, not_running
from .model import State
from .shims import Exit, RuntimeFailed

Started = Callable[[str, int], Awaitable[None]]
"""Called when the process runs, with the exec's ID, and the terminal's master or -1 (still ours)."""


async def execute(
    engine: Engine, live: Live, request: contract.ExecContainer, fds: Sequence[int], started: Started
) -> contract.ExitStatus:
    """Run it, and wait for its end unless ``detach``. ``fds``: stdin, stdout, stderr as the request says (they stay yours).

    If the caller goes away the process goes on. Errors: see ``contract.ExecContainer``.
    """
    execution, master, _ = await begin(engine, live, request, fds)
    try:
        await started(execution.key, master)
    finally:
        if master >= 0:
            os.close(master)
    if request.detach:
        return contract.ExitStatus(id=live.id)
    await execution.ended.wait()
    return _status(live, execution)


async def begin(
    engine: Engine,
    live: Live,
    request: contract.ExecContainer,
    fds: Sequence[int],
    *,
    key: str = "",
    attributes: dict[str, str] | None = None,
) -> tuple[Execution, int, int]:
    """Start it: (the execution, the terminal's master or -1, yours; the process's PID). Errors: see ``contract.ExecContainer``.

    If you give the ``key``, its PID file stays until you call ``remove_files``.
    """
    if live.record.state is State.PAUSED:
        raise is_paused(live.record.name)
    connection = live.shim
    if not live.running or connection is None:
        raise not_running(live.record.name)
    if not request.args:
        raise errors.InvalidArgument("no command specified")
    execution = Execution(key=key or new_key(), attributes=attributes or {})
    bundle = engine.bundle(live.id)
    runtime = await engine.runtime(live.record.runtime)
    engine.warm()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    live.executions[execution.key] = execution
    told = {"exec_id": execution.key}
    details = {"execID": execution.key, "command": " ".join(request.args), **execution.attributes}
    engine.publish(contract.ExecCreated, live.record, told, **details)
    try:
        stdio = None if request.tty else _stdio(request, fds, null)
        _write_process(live, bundle, execution.key, request)
        try:
            with trio.CancelScope(shield=True):  # a cancelled caller mustn't leave a process nobody knows of; it's bounded
                pid, master = await connection.spawn(
                    execution.key,
                    runtime.exec(live.id, execution.key, tty=request.tty),
                    f"exec-{execution.key}.pid",
                    stdio=stdio,
                    size=(request.rows, request.columns),
                )
        except RuntimeFailed as failed:
            try:
                log = (bundle / f"exec-{execution.key}.log").read_text(errors="replace")
            except OSError:
                log = ""
            failure = parse_failure(log, failed.exit_code)
            raise exec_failed(failure.reason, failure.exit_code) from None
        finally:
            remove_files(bundle, execution.key, *(("json", "log") if key else ()))
    except BaseException as failure:
        code = failure.details.get("exit_code", "") if isinstance(failure, errors.BusError) else ""
        execution.exit = Exit(execution.key, int(code) if code.isdigit() else 126, 0, time.time_ns())
        over(engine, live, execution)
        raise
    finally:
        os.close(null)
    if execution.key in live.executions:  # else the container has ended meanwhile
        engine.publish(contract.ExecStarted, live.record, told, **details)
    engine.background(_ended, engine, live, execution)
    return execution, master, pid


def new_key() -> str:
    return os.urandom(8).hex()


def remove_files(bundle: Path, key: str, *suffixes: str) -> None:
    """What its start needed, or some of it."""
    for suffix in suffixes or ("json", "pid", "log"):
        (bundle / f"exec-{key}.{suffix}").unlink(missing_ok=True)


def _stdio(request: contract.ExecContainer, fds: Sequence[int], null: int) -> tuple[int, int, int]:
    wanted = (request.stdin, request.stdout, request.stderr)
    if len(fds) != sum(wanted):
        raise errors.InvalidArgument(f"wrong number of descriptors: {len(fds)} came, {sum(wanted)} are named")
    given = iter(fds)
    stdin, stdout, stderr = (next(given) if want else null for want in wanted)
    return stdin, stdout, stderr


def _write_process(live: Live, bundle: Path, key: str, request: contract.ExecContainer) -> None:
    try:
        root = os.open(f"/proc/{live.record.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        raise not_running(live.record.name) from None
    try:
        identity = bundles.identity(root, request.user or live.record.process.user, live.record.spec.group_add)
        document = oci.exec_process(
            live.record,
            identity,
            args=request.args,
            env=request.env,
            working_dir=request.working_dir,
            tty=request.tty,
            privileged=request.privileged,
            size=(request.rows, request.columns),
            capability_bound=kernel.capability_bound(),
        )
        env = plan.merge_env(live.record.process.env, request.env)
        refusal = check_command(root, request.args[0], env, request.working_dir or live.record.process.working_dir)
    finally:
        os.close(root)
    if refusal:
        raise exec_failed(*refusal)
    bundles.write_config(bundle, f"exec-{key}.json", document)


def check_command(root: int, command: str, env: list[str], directory: str) -> tuple[str, int] | None:
    """Why a command can't be executed in a root, with Docker's exit code; None if nothing speaks against it (the kernel decides)."""
    if not command:
        return 'exec: "": executable file not found in $PATH', 127
    if "/" in command:
        path = command if command.startswith("/") else f"{directory.rstrip('/')}/{command}"
        found = kernel.find_executable(root, path)
        if found == "missing":
            return f'exec: "{command}": no such file or directory', 127
        if found:
            return f'exec: "{command}": ' + ("is a directory" if found == "directory" else "permission denied"), 126
        return None
    search = next((entry.partition("=")[2] for entry in env if entry.startswith("PATH=")), plan.DEFAULT_PATH)
    denied = False
    for place in search.split(":"):
        found = kernel.find_executable(root, f"{place or directory}/{command}")
        if not found:
            return None
        denied = denied or found == "denied"
    if denied:
        return f'exec: "{command}": permission denied', 126
    return f'exec: "{command}": executable file not found in $PATH', 127


async def _ended(engine: Engine, live: Live, execution: Execution) -> None:
    await execution.ended.wait()
    await trio.lowlevel.checkpoint()  # who sent the signal that ended it tells that first
    over(engine, live, execution)


def over(engine: Engine, live: Live, execution: Execution) -> None:
    """It has ended, or never began: forget and tell it, once."""
    if live.executions.pop(execution.key, None) is None:
        return
    code = _status(live, execution).exit_code
    fields = {"exec_id": execution.key, "exit_code": code}
    engine.publish(contract.ExecDied, live.record, fields, execID=execution.key, exitCode=str(code), **execution.attributes)


def _status(live: Live, execution: Execution) -> contract.ExitStatus:
    # If the container ended first, its init's end took this process along.
    exit_ = execution.exit
    if exit_ is None:
        return contract.ExitStatus(id=live.id, exit_code=137, exited_at_ns=time.time_ns())
    return contract.ExitStatus(id=live.id, exit_code=exit_.code, exited_at_ns=exit_.time_ns)



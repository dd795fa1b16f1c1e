"""The CLI's one connection to the bus, and what most commands do with it."""

from __future__ import annotations

import os

from .grammar import CliError, Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyx_bus.errors import BusError
    from pyx_bus.sync import Connection


def connect(options: Options, timeout_s: float = 5.0) -> Connection:
    """Raises CliError saying how to start the stack if the bus isn't there."""
    from pyx_bus.errors import BusError
    from pyx_bus.sync import Connection

    path = options.session["bus"]
    try:
        return Connection(path, "pyx", timeout_s)
    except (OSError, BusError) as error:
        raise unreachable(path, error, options.command.status) from error


def unreachable(path: str, error: BaseException, status: int = 1) -> CliError:
    if "errno" not in getattr(error, "details", {}) and not isinstance(error, OSError):
        return CliError(str(error), status, getattr(error, "hint", ""))  # it's there, but refused us or doesn't answer
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, PermissionError):
        return CliError(f"cannot connect to the bus at {path}: permission denied", status, "be root or a member of the group pyx")
    return CliError(
        f"cannot connect to the bus at {path}: is the stack running?", status, "start it with: pyx system up --detach"
    )


def items(body: dict[str, object], field: str) -> list[dict[str, object]]:
    """The maps of a list field; an absent field is an empty list (defaults don't travel)."""
    value = body.get(field)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def texts(body: dict[str, object], field: str) -> list[str]:
    value = body.get(field)
    return [str(item) for item in value] if isinstance(value, list) else []


def number(body: dict[str, object], field: str, default: int = 0) -> int:
    value = body.get(field, default)
    return value if isinstance(value, int) else default


def text(body: dict[str, object], field: str) -> str:
    return str(body.get(field, ""))


def mapping(body: dict[str, object], field: str) -> dict[str, object]:
    value = body.get(field)
    return value if isinstance(value, dict) else {}


def document(body: dict[str, object]) -> dict[str, object]:
    return mapping(body, "document")


def warn(message: str) -> None:
    os.write(2, f"WARNING: {message}\n".encode())


def error_line(error: BusError | CliError) -> str:
    return f"pyx: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else "")


def each(options: Options, act: object, names: list[str]) -> int:
    """Do ``act(name)`` for every name, going on past failures. 1 if any failed.

    Each success prints the name, or the text ``act`` returns, or nothing if that's True.
    """
    import sys

    from pyx_bus.errors import BusError

    assert callable(act)
    status = 0
    for name in names:
        try:
            answer = act(name)
        except BusError as error:
            sys.stdout.flush()
            sys.stderr.write(error_line(error))
            if options.session["debug"]:
                sys.stderr.write(f"code: {error.code} {error.details}\n")
            status = 1
            continue
        if answer is not True:
            sys.stdout.write(f"{name if answer is None else answer}\n")
    return status


def missing(error: BusError) -> bool:
    """A forced removal of what isn't there succeeds, and says so."""
    import sys

    sys.stderr.write(error_line(error))
    return True

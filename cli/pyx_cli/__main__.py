"""``pyx``: find the command, parse its flags, run it, and turn what went wrong into one line and an exit status."""

from __future__ import annotations

import os
import sys

from .grammar import CliError, Options, UsageError, check_count, parse
from .table import ALIASES, COMMANDS, GLOBAL, GROUPS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .grammar import Command


def _usage(error: UsageError, path: str) -> int:
    text = error.text
    if "\n" not in text:
        name = f"pyx {path}".rstrip()
        text = f"{text}\nSee '{name} --help'."
    sys.stderr.write(text + "\n")
    return error.status


def _out(text: str) -> int:
    sys.stdout.write(text)
    return 0


def find(words: Sequence[str]) -> tuple[Command | None, str, int]:
    """The command ``words`` begin with, the path as typed, and how many words that took. None: a group, or nothing, alone."""
    first = words[0]
    if first in GROUPS:
        if len(words) < 2 or words[1].startswith("-"):
            return None, first, 1
        path = f"{first} {words[1]}"
        command = COMMANDS.get(ALIASES.get(path, path))
        if command is None:
            raise UsageError(f"pyx: {words[1]!r} is not a pyx {first} command.\nSee 'pyx {first} --help'.", 1)
        return command, path, 2
    command = COMMANDS.get(ALIASES.get(first, first))
    if command is None:
        raise UsageError(f"pyx: {first!r} is not a pyx command.\nSee 'pyx --help'.", 1)
    return command, first, 1


def _session(values: dict[str, object]) -> dict[str, str]:
    """The global flags as commands want them, the environment filled in."""
    run = str(values.get("run") or os.environ.get("PYX_RUN") or "/run/pyx")
    root = str(values.get("root") or os.environ.get("PYX_ROOT") or "/var/lib/pyx")
    bus = str(values.get("bus") or values.get("host") or "")
    if bus.startswith("unix://"):
        bus = bus[7:]
    if not bus:
        bus = run + "/bus.sock" if values.get("run") else os.environ.get("PYX_BUS") or run + "/bus.sock"
    return {"run": run, "root": root, "bus": bus, "debug": "1" if values.get("debug") else ""}


def dispatch(argv: Sequence[str]) -> int:
    """Run the command line ``argv`` (without the program's name); the exit status. Errors of the engine are printed here."""
    path, debug, status = "", False, 1
    try:
        if argv and argv[0] == "help":
            argv = [*argv[1:], "--help"]
        values, words = parse(GLOBAL, argv, interspersed=False)
        debug = bool(values.get("debug"))
        if values.get("version"):
            from pyx_bus import __version__

            return _out(f"pyx version {__version__}\n")
        if values.get("help") or not words:
            from .help import main_help

            return _out(main_help())
        command, path, used = find(words)
        if command is None:
            from .help import group_help

            return _out(group_help(path)) if used == len(words) else _group_flags(path, words[1:])
        status = command.status
        given, args = parse(command.flags, words[used:], command.interspersed)
        if given.get("help"):
            from .help import command_help

            return _out(command_help(command, path))
        check_count(command, len(args))
        options = Options(command, given, args)
        options.session = _session({**values, **{key: given[key] for key in ("root", "run") if key in given}})
        module = __import__(f"pyx_cli.commands.{command.module}", fromlist=[command.function])
        result = getattr(module, command.function)(options)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except UsageError as error:
        return _usage(error, path)
    except CliError as error:
        _flush()
        if error.message:
            complain(error.message, error.hint)
        if debug:
            _traceback()
        return error.status
    except BrokenPipeError:
        return _broken_pipe()
    except KeyboardInterrupt:
        _flush()
        return 130
    except Exception as error:
        _flush()
        return _failure(error, status, debug)


def _group_flags(group: str, words: Sequence[str]) -> int:
    from .help import group_help

    parse((), words)  # complains of an unknown flag; --help is fine
    return _out(group_help(group))


def complain(message: str, hint: str = "") -> None:
    """One line for people, and what to do about it where that's known."""
    text = f"pyx: {message}\n"
    if hint:
        text += f"hint: {hint}\n"
    sys.stderr.write(text)
    sys.stderr.flush()


def _failure(error: Exception, status: int, debug: bool) -> int:
    """An error of the bus, of the operating system, or a bug of ours."""
    from pyx_bus import errors

    if isinstance(error, errors.BusError):
        complain(error.message, error.hint)
        if debug:
            sys.stderr.write(f"code: {error.code}\n" + "".join(f"{key}: {value}\n" for key, value in error.details.items()))
            _traceback()
        exit_code = error.details.get("exit_code", "")
        return int(exit_code) if status == 125 and exit_code.isdigit() else status
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename is not None else ""
        complain(f"{name}{(error.strerror or str(error)).lower()}")
    else:
        complain(f"internal error: {type(error).__name__}: {error}", "" if debug else "run again with pyx --debug to see where")
    if debug:
        _traceback()
    return status


def _traceback() -> None:
    import traceback

    traceback.print_exc()


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        pass


def _broken_pipe() -> int:
    """Whoever read our output has gone (``pyx ps | head -1``): end as any tool does, without a word."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    return 141  # 128 + SIGPIPE, what a shell shows for a program that the signal ended


def _open_standard_streams() -> None:
    """Started with one of the three closed (``<&-``), the next descriptor opened, the bus's say, would take its place."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free one: this
    # What the interpreter gives is None for a stream that was closed, whatever typeshed says.
    streams: dict[str, object] = {"stdout": sys.stdout, "stderr": sys.stderr}
    for name, stream in streams.items():
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the rest of the process


def main() -> None:
    """The console script. Ends the process at once: an orderly interpreter shutdown only costs milliseconds here."""
    _open_standard_streams()
    status = dispatch(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        status = _broken_pipe()
    except OSError as error:  # a full disk behind the redirection: the output isn't there, so this wasn't a success
        os.write(2, f"pyx: cannot write the output: {os.strerror(error.errno or 0).lower()}\n".encode())
        status = status or 1
    os._exit(status)


if __name__ == "__main__":
    main()

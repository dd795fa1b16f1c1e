"""The help texts, made from the table. Pure."""

from __future__ import annotations

from .grammar import Command, Flag
from .table import ALIASES, COMMANDS, COMMON, GLOBAL, GROUPS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def _columns(rows: Sequence[tuple[str, str]], indent: str = "  ") -> list[str]:
    width = max((len(left) for left, _ in rows), default=0)
    return [f"{indent}{left.ljust(width)}   {right}".rstrip() for left, right in rows]


def flag_lines(flags: Iterable[Flag]) -> list[str]:
    rows = []
    for flag in sorted(flags, key=lambda flag: flag.long):
        if flag.hidden:
            continue
        short = f"-{flag.short}, " if flag.short else "    "
        meta = f" {flag.meta}" if flag.meta else ""
        default = flag.default
        if default:
            default = f' (default "{default}")' if flag.kind == "string" else f" (default {default})"
        rows.append((f"{short}--{flag.long}{meta}", flag.help + default))
    return _columns(rows)


def names_of(path: str) -> list[str]:
    """Every name of a command, its own first."""
    return [path, *(alias for alias, target in ALIASES.items() if target == path)]


def command_help(command: Command, path: str) -> str:
    """``path`` is what the user typed: the usage line repeats it."""
    options = " [OPTIONS]" if command.flags else ""
    lines = ["", f"Usage:  pyx {path}{options} {command.args}".rstrip(), "", command.summary]
    names = names_of(command.path)
    if len(names) > 1:
        lines += ["", "Aliases:", "  " + ", ".join(f"pyx {name}" for name in names)]
    if command.flags:
        lines += ["", "Options:", *flag_lines(command.flags)]
    return "\n".join(lines) + "\n"


def group_help(group: str) -> str:
    rows = [
        (path.split(" ", 1)[1], command.summary)
        for path, command in sorted(COMMANDS.items())
        if path.startswith(group + " ")
    ]
    return "\n".join(
        ["", f"Usage:  pyx {group} COMMAND", "", GROUPS[group], "", "Commands:", *_columns(rows), "",
         f"Run 'pyx {group} COMMAND --help' for more information on a command.", ""]
    )  # fmt: skip


def _top(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, COMMANDS[ALIASES.get(name, name)].summary) for name in names]


def main_help() -> str:
    top = sorted({name for name in (*ALIASES, *COMMANDS) if " " not in name} - set(COMMON))
    return "\n".join(
        ["", "Usage:  pyx [OPTIONS] COMMAND", "", "A container engine made of small services on a bus", "",
         "Common commands:", *_columns(_top(COMMON)), "",
         "Management commands:", *_columns(sorted(GROUPS.items())), "",
         "Commands:", *_columns(_top(top)), "",
         "Global options:", *flag_lines(GLOBAL), "",
         "Run 'pyx COMMAND --help' for more information on a command.", ""]
    )  # fmt: skip

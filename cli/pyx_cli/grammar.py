"""Commands, their flags, and the parser: spf13/pflag's rules as Docker's command line uses them. Pure.

- ``--name x``, ``--name=x``, ``-n x``, ``-nx``, ``-n=x``; short flags without a value may be bundled (``-it``).
- A bool takes a value only after ``=`` (``--rm=false``).
- Flags and arguments may be mixed, unless the command is not ``interspersed``: then the first argument ends the flags
  (``run IMAGE --flag`` belongs to the container). ``--`` always ends them.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# strconv.ParseBool's words.
_BOOL = {
    "1": True, "t": True, "T": True, "true": True, "TRUE": True, "True": True,
    "0": False, "f": False, "F": False, "false": False, "FALSE": False, "False": False,
}  # fmt: skip


class CliError(Exception):
    """Something to tell the user: one line, a hint perhaps, and the exit status."""

    def __init__(self, message: str, status: int = 1, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.hint = hint


class UsageError(Exception):
    """The command line itself is wrong; ``text`` is printed as it is."""

    def __init__(self, text: str, status: int = 125) -> None:
        super().__init__(text)
        self.text = text
        self.status = status


class Flag:
    """``kind``: bool, string, int or list (may be repeated). ``meta`` is the value's name in the help text."""

    __slots__ = ("default", "help", "hidden", "kind", "long", "meta", "short")

    def __init__(
        self, long: str, short: str, kind: str, help: str, meta: str = "", default: str = "", hidden: bool = False
    ) -> None:
        self.long = long
        self.short = short
        self.kind = kind
        self.help = help
        self.meta = meta or ("" if kind == "bool" else kind)
        self.default = default
        self.hidden = hidden


class Command:
    """A command: ``module`` and ``function`` are what runs it, looked up only then."""

    __slots__ = ("args", "flags", "function", "interspersed", "maximum", "minimum", "module", "path", "status", "summary")

    def __init__(
        self,
        path: str,
        target: str,
        args: str,
        summary: str,
        flags: Sequence[Flag] = (),
        *,
        minimum: int = 0,
        maximum: int | None = None,
        interspersed: bool = True,
        status: int = 1,
    ) -> None:
        self.path = path
        self.module, _, self.function = target.partition(":")
        self.args = args
        self.summary = summary
        self.flags = flags
        self.minimum = minimum
        self.maximum = maximum
        self.interspersed = interspersed
        self.status = status  # what an error of the engine exits with: run, create and exec say 125, the others 1


class Options:
    """What was given. A flag that wasn't answers with the empty value of its kind; ``given`` tells the two apart."""

    __slots__ = ("args", "command", "session", "values")

    def __init__(self, command: Command, values: dict[str, object], args: list[str]) -> None:
        self.command = command
        self.values = values
        self.args = args
        self.session: dict[str, str] = {}  # the global flags: bus, root, run, debug

    def given(self, name: str) -> bool:
        return name in self.values

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.values.get(name, default))

    def text(self, name: str, default: str = "") -> str:
        return str(self.values.get(name, default))

    def number(self, name: str, default: int = 0) -> int:
        value = self.values.get(name, default)
        return value if isinstance(value, int) else default

    def list(self, name: str) -> list[str]:
        value = self.values.get(name)
        return [str(item) for item in value] if isinstance(value, list) else []


def convert(flag: Flag, shown: str, text: str) -> object:
    """The value of a flag; raises UsageError in pflag's words."""
    if flag.kind == "bool":
        if text not in _BOOL:
            raise UsageError(f'invalid argument "{text}" for "{shown}" flag: strconv.ParseBool: parsing "{text}": invalid syntax')
        return _BOOL[text]
    if flag.kind == "int":
        try:
            return int(text, 0)
        except ValueError:
            raise UsageError(
                f'invalid argument "{text}" for "{shown}" flag: strconv.ParseInt: parsing "{text}": invalid syntax'
            ) from None
    return text


def _shown(flag: Flag) -> str:
    return f"-{flag.short}, --{flag.long}" if flag.short and flag.long else f"-{flag.short}" if flag.short else f"--{flag.long}"


def parse(flags: Sequence[Flag], words: Sequence[str], interspersed: bool = True) -> tuple[dict[str, object], list[str]]:
    """Split ``words`` into flag values and arguments. ``--help`` (and ``-h`` unless a flag has it) is the value ``help``."""
    by_long = {flag.long: flag for flag in flags}
    by_short = {flag.short: flag for flag in flags if flag.short}
    values: dict[str, object] = {}
    args: list[str] = []

    def put(flag: Flag, text: str) -> None:
        value = convert(flag, _shown(flag), text)
        if flag.kind == "list":
            existing = values.setdefault(flag.long, [])
            assert isinstance(existing, list)
            existing.append(value)
        else:
            values[flag.long] = value

    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word == "--":
            args.extend(words[index:])
            break
        if len(word) < 2 or word[0] != "-":
            args.append(word)
            if not interspersed:
                args.extend(words[index:])
                break
            continue
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            flag = by_long.get(name)
            if flag is None:
                if name == "help":
                    values["help"] = True
                    continue
                if not name or name.startswith("-"):
                    raise UsageError(f"bad flag syntax: {word}")
                raise UsageError(f"unknown flag: --{name}")
            if equals:
                put(flag, text)
            elif flag.kind == "bool":
                put(flag, "true")
            elif index < len(words):
                put(flag, words[index])
                index += 1
            else:
                raise UsageError(f"flag needs an argument: --{name}")
            continue
        letters = word[1:]
        while letters:
            letter, rest = letters[0], letters[1:]
            flag = by_short.get(letter)
            if flag is None:
                if letter == "h":
                    values["help"] = True
                    letters = rest
                    continue
                raise UsageError(f"unknown shorthand flag: {letter!r} in {word}")
            if rest.startswith("="):
                put(flag, rest[1:])
                break
            if flag.kind == "bool":
                put(flag, "true")
                letters = rest
                continue
            if rest:
                put(flag, rest)
            elif index < len(words):
                put(flag, words[index])
                index += 1
            else:
                raise UsageError(f"flag needs an argument: {letter!r} in {word}")
            break
    return values, args


def check_count(command: Command, count: int) -> None:
    """Raise Docker's complaint if the number of arguments is wrong."""
    low, high = command.minimum, command.maximum
    if count >= low and (high is None or count <= high):
        return
    if high == 0:
        need = "accepts no arguments"
    elif high == low:
        need = f"requires exactly {low} argument{'' if low == 1 else 's'}"
    elif high is None or count < low:
        need = f"requires at least {low} argument{'' if low == 1 else 's'}"
    else:
        need = f"requires at most {high} argument{'' if high == 1 else 's'}"
    usage = f"pyx {command.path} [OPTIONS] {command.args}".rstrip()
    raise UsageError(
        f'"pyx {command.path}" {need}.\nSee \'pyx {command.path} --help\'.\n\nUsage:  {usage}\n\n{command.summary}', 1
    )

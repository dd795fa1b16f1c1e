"""Values people write on command lines: sizes, durations, times, lists, key=value. Pure but for files that are named."""

from __future__ import annotations

from .grammar import CliError

_UNITS = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
# time.ParseDuration's units, in nanoseconds; days are ours, since people write them.
_DURATION = {"ns": 1, "us": 1_000, "µs": 1_000, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86400 * 10**9}


def invalid(text: str, flag: str, why: str) -> CliError:
    """The complaint about a flag's value, in pflag's form."""
    return CliError(f'invalid argument "{text}" for "{flag}" flag: {why}', 125)


def size_bytes(text: str, flag: str) -> int:
    """``512m``, ``1.5g``, ``64KiB``, ``100``: bytes, in powers of 1024 as docker/go-units' RAMInBytes."""
    word = text.strip().lower()
    number = word.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = word[len(number) :].strip()
    for ending in ("ib", "b"):
        if unit.endswith(ending) and unit != "b":
            unit = unit[: -len(ending)]
            break
    try:
        value = float(number) if not set(number) - set("0123456789.") else -1.0
    except ValueError:
        value = -1.0
    if unit not in _UNITS or value < 0:
        raise invalid(text, flag, f"invalid size: '{text}'")
    return int(value * 1024 ** _UNITS[unit])


def duration_ns(text: str, flag: str) -> int:
    """``1h30m``, ``1.5s``, ``100ms``: nanoseconds, as Go's time.ParseDuration."""
    word = text.strip()
    sign = 1
    if word[:1] in ("-", "+"):
        sign = -1 if word[0] == "-" else 1
        word = word[1:]
    if word == "0":
        return 0
    total, position = 0.0, 0
    while position < len(word):
        start = position
        while position < len(word) and (word[position].isdigit() or word[position] == "."):
            position += 1
        number = word[start:position]
        start = position
        while position < len(word) and not (word[position].isdigit() or word[position] == "."):
            position += 1
        unit = word[start:position]
        try:
            if unit not in _DURATION:
                raise ValueError
            # Whole numbers stay exact; a float holds 2**53 ns (104 days) only.
            total += int(number) * _DURATION[unit] if number.isdigit() else float(number) * _DURATION[unit]
        except ValueError:
            raise invalid(text, flag, f'time: invalid duration "{text}"') from None
    if not word:
        raise invalid(text, flag, f'time: invalid duration "{text}"')
    return sign * int(total)


def timestamp_ns(text: str, flag: str, now_ns: int) -> int:
    """A point in time as ``logs --since`` takes it: Unix seconds (fraction allowed), a duration ago, or RFC 3339 in whole or part."""
    whole, _, fraction = text.partition(".")
    if whole.isdigit() and (fraction.isdigit() or not fraction):
        return int(whole) * 10**9 + int((fraction + "000000000")[:9])
    if text[:1].isdigit() and "-" not in text and ":" not in text:
        return now_ns - duration_ns(text, flag)
    from datetime import datetime

    word, extra = text, 0
    point = word.find(".")
    if point > 0:  # datetime stops at microseconds
        end = point + 1
        while end < len(word) and word[end].isdigit():
            end += 1
        extra = int((word[point + 1 : end] + "000000000")[:9] or 0)
        word = word[:point] + word[end:]
    try:
        moment = datetime.fromisoformat(word)
    except ValueError:
        raise invalid(text, flag, "neither a Unix time, a duration (10m) nor RFC 3339 (2013-01-02T13:23:37Z)") from None
    if moment.tzinfo is None:
        moment = moment.astimezone()  # Docker takes a time without a zone as local
    return int(moment.timestamp()) * 10**9 + extra


def nano_cpus(text: str, flag: str = "--cpus") -> int:
    """``1.5`` CPUs in billionths."""
    try:
        value = float(text)
        if not 0 <= value < 1e6:
            raise ValueError
    except ValueError:
        raise invalid(text, flag, f"failed to parse {text} as a rational number") from None
    return round(value * 10**9)


def key_values(items: list[str]) -> dict[str, str]:
    """``k=v`` and bare ``k`` (an empty value), as labels are given."""
    result = {}
    for item in items:
        key, _, value = item.partition("=")
        if not key:
            raise CliError(f'invalid label format: "{item}"', 125)
        result[key] = value
    return result


def options_map(items: list[str], flag: str) -> dict[str, str]:
    """``k=v`` where the ``=`` is required."""
    result = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise invalid(item, flag, f"invalid option format: '{item}', should be key=value")
        result[key] = value
    return result


def filters(items: list[str]) -> dict[str, list[str]]:
    """``--filter name=web --filter label=a=b`` as the services take them."""
    result: dict[str, list[str]] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise CliError(f'invalid argument "{item}" for "-f, --filter" flag: bad format of filter (expected name=value)', 125)
        result.setdefault(key.strip().lower(), []).append(value.strip())
    return result


def environment(items: list[str], files: list[str], host: dict[str, str]) -> list[str]:
    """``-e`` and ``--env-file``: a name without ``=`` takes the host's value, and is left out if there is none."""
    result = []
    for path in files:
        for number, line in enumerate(read_lines(path), 1):
            word = line.lstrip()
            if not word or word.startswith("#"):
                continue
            name = word.partition("=")[0]
            if not name:
                raise CliError(f"invalid environment variable in {path}, line {number}: no variable name on line '{word}'", 125)
            if name != name.strip() or " " in name:
                raise CliError(f"invalid environment variable in {path}, line {number}: variable '{name}' contains whitespaces", 125)
            result += _variable(word, host)
    for item in items:
        if not item or item.startswith("="):
            raise invalid(item, "-e, --env", f"invalid environment variable: {item}")
        result += _variable(item, host)
    return result


def _variable(word: str, host: dict[str, str]) -> list[str]:
    if "=" in word:
        return [word]
    return [f"{word}={host[word]}"] if word in host else []


def labels(items: list[str], files: list[str]) -> dict[str, str]:
    """``-l`` and ``--label-file``."""
    lines = [line.strip() for path in files for line in read_lines(path)]
    return key_values([line for line in lines if line and not line.startswith("#")] + items)


def read_lines(path: str) -> list[str]:
    """A file's lines, for files named on the command line. Raises CliError with exit status 125."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read().splitlines()
    except UnicodeDecodeError:
        raise CliError(f'"{path}" contains bytes that are not UTF-8', 125) from None
    except OSError as error:
        import os

        raise CliError(f"open {path}: {os.strerror(error.errno or 0).lower()}", 125) from None


_ULIMITS = (
    "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime",
    "sigpending", "stack",
)  # fmt: skip


def ulimit(text: str) -> dict[str, object]:
    """``nofile=1024:2048``, ``core=-1`` (unlimited): contract Ulimit's fields."""
    name, _, limits = text.partition("=")
    soft_text, colon, hard_text = limits.partition(":")
    try:
        soft = int(soft_text)
        hard = int(hard_text) if colon else soft
    except ValueError:
        raise invalid(text, "--ulimit", f"invalid ulimit argument: {text}") from None
    if name not in _ULIMITS:
        raise invalid(text, "--ulimit", f"invalid ulimit type: {name}")
    if hard != -1 and (soft > hard or soft == -1):
        raise invalid(text, "--ulimit", f"ulimit soft limit must be less than or equal to hard limit: {soft_text} > {hard_text}")
    return {"name": name, "soft": soft, "hard": hard}

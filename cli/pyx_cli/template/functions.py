"""Values as Go sees and prints them, and the functions a template may call."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class TemplateError(Exception):
    """The template is malformed, or doesn't fit what it's executed over."""


class _Nothing:
    """Go's nil of no type: what an absent map key gives inside if and with."""

    def __bool__(self) -> bool:
        return False


NOTHING = _Nothing()


class Texts(dict[str, str]):
    """Go's map[string]string: what isn't in it is ``<no value>`` as a field, and empty by ``index`` (any other dict's is an error)."""


class Struct(dict[str, object]):
    """A Go struct: the dict is its JSON, in that order. ``names``: which key a field of a template is; one that's absent is empty."""

    def __init__(self, names: dict[str, str], items: dict[str, object]) -> None:
        super().__init__(items)
        self.names = names


def show(value: object) -> str:
    """As Go's fmt prints it with %v."""
    if value is None or value is NOTHING:
        return "<no value>"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        return text[:-2] if text.endswith(".0") else text
    if isinstance(value, Struct):
        return "{" + " ".join(_inner(value.get(key, "")) for key in value.names.values()) + "}"
    if isinstance(value, dict):
        return "map[" + " ".join(f"{key}:{_inner(value[key])}" for key in sorted(value, key=str)) + "]"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(_inner(item) for item in value) + "]"
    return str(value)


def _inner(value: object) -> str:
    return "<nil>" if value is None else show(value)


def _json(value: object) -> str:
    import json

    # Go's encoder sorts a map's keys and escapes what HTML would trip over; Docker's json function switches that off.
    return json.dumps(None if value is NOTHING else _ordered(value), ensure_ascii=False, separators=(",", ":"))


def _ordered(value: object) -> object:
    if isinstance(value, dict):
        keys = value if isinstance(value, Struct) else sorted(value)
        return {key: _ordered(value[key]) for key in keys}
    return [_ordered(item) for item in value] if isinstance(value, (list, tuple)) else value


def _index(value: Any, *keys: Any) -> object:
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key, "" if isinstance(value, Texts) else NOTHING)
        elif isinstance(value, (list, tuple, str)):
            if not isinstance(key, int) or isinstance(key, bool):
                raise TemplateError(f"cannot index slice/array with type {type(key).__name__}")
            if not 0 <= key < len(value):
                raise TemplateError(f"error calling index: index out of range: {key}")
            value = value[key]
        else:
            raise TemplateError("error calling index: index of untyped nil" if not value else f"can't index {show(value)}")
    return value


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, (list, tuple, dict)):
        return len(value)
    raise TemplateError(f"error calling len: len of {show(value)}")


def _equal(first: object, *others: object) -> bool:
    if not others:
        raise TemplateError("error calling eq: missing argument for comparison")
    return any(_same_kind(first, other) and first == other for other in others)


def _same_kind(first: object, second: object) -> bool:
    numbers = (int, float)
    plain = isinstance(first, bool) == isinstance(second, bool)
    if plain and isinstance(first, numbers) and isinstance(second, numbers):
        return True
    if first is None or second is None or first is NOTHING or second is NOTHING:
        return True
    if isinstance(first, bool) and isinstance(second, bool):
        return True
    if isinstance(first, str) and isinstance(second, str):
        return True
    raise TemplateError("error calling eq: incompatible types for comparison")


def _less(first: Any, second: Any) -> bool:
    if not _same_kind(first, second) or isinstance(first, bool) or first is None or second is None:
        raise TemplateError("error calling lt: invalid type for comparison")
    return bool(first < second)


def _slice(value: Any, *ends: int) -> object:
    if not isinstance(value, (str, list)) or any(not isinstance(end, int) or not 0 <= end <= len(value) for end in ends):
        raise TemplateError("error calling slice: index out of range, or can't slice this")
    return value[slice(ends[0] if ends else 0, ends[1] if len(ends) > 1 else len(value))]


def _printf(template: Any, *values: object) -> str:
    out, position, used = [], 0, 0
    while position < len(template):
        if template[position] != "%":
            out.append(template[position])
            position += 1
            continue
        end = position + 1
        while end < len(template) and template[end] in "+-# 0123456789.":
            end += 1
        flags, verb = template[position + 1 : end], template[end : end + 1]
        position = end + 1
        if verb == "%":
            out.append("%")
            continue
        if used >= len(values):
            out.append(f"%!{verb}(MISSING)")
            continue
        value = values[used]
        used += 1
        try:
            if verb in ("v", "s"):
                out.append(f"%{flags}s" % show(value))
            elif verb == "q":
                out.append(f"%{flags}s" % _json(show(value)))
            elif verb == "t" and isinstance(value, bool):
                out.append(f"%{flags}s" % show(value))
            elif verb in ("d", "x", "X", "o", "c", "f", "g", "e"):
                out.append(f"%{flags}{verb}" % value)
            else:
                out.append(f"%!{verb}({show(value)})")
        except (TypeError, ValueError):
            out.append(f"%!{verb}({show(value)})")
    return "".join(out)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TemplateError(f"error calling {name}: wrong type for value; expected string; got {show(value)}")
    return value


def _print(*values: object) -> str:
    """fmt.Sprint: a space between two operands neither of which is a string."""
    out = ""
    for number, value in enumerate(values):
        if number and not isinstance(value, str) and not isinstance(values[number - 1], str):
            out += " "
        out += show(value)
    return out


def _join(items: Any, separator: Any = "") -> str:
    if not isinstance(items, (list, tuple)):
        raise TemplateError(f"error calling join: expected a list, got {show(items)}")
    return str(separator).join(show(item) for item in items)


def _truncate(text: Any, length: Any) -> str:
    return _text("truncate", text)[: int(length)]


def _title(text: Any) -> str:
    words = _text("title", text)
    return "".join(c.upper() if not i or not words[i - 1].isalnum() else c for i, c in enumerate(words))


FUNCTIONS: dict[str, Callable[..., object]] = {
    "json": _json,
    "join": _join,
    "split": lambda text, separator: _text("split", text).split(separator) if separator else list(text),
    "upper": lambda text: _text("upper", text).upper(),
    "lower": lambda text: _text("lower", text).lower(),
    "title": _title,
    "pad": lambda text, before, after: " " * before + text + " " * after if text else text,
    "truncate": _truncate,
    "index": _index,
    "slice": _slice,
    "len": _length,
    "print": _print,
    "println": lambda *values: " ".join(show(value) for value in values) + "\n",
    "printf": _printf,
    "html": lambda *values: _print(*values).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;"),
    "not": lambda value: not truth(value),
    "eq": _equal,
    "ne": lambda first, second: not _equal(first, second),
    "lt": _less,
    "le": lambda first, second: not _less(second, first),
    "gt": lambda first, second: _less(second, first),
    "ge": lambda first, second: not _less(first, second),
}


def truth(value: object) -> bool:
    """Go's: the zero value of anything is false."""
    return bool(value) and value is not NOTHING

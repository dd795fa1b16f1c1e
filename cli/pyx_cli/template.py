"""Go templates (text/template's language) as ``--format`` takes them: parse once, execute over plain dicts and lists. Pure.

What there is: fields and chains, variables, literals, pipelines, parentheses; if/else if/else, range (with else, break and
continue), with, define-free; trim markers and comments; text/template's functions and Docker's (json, join, upper, lower,
title, split, pad, truncate, println). What differs: a field that isn't there is an error, in a row and in a document alike.

Theory: ``_tokens`` cuts text and actions; ``_Parser`` makes nested tuples of them, ``(kind, …)``; ``_Run`` walks those.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Node = tuple[Any, ...]

_SPACE = " \t\r\n"


class TemplateError(Exception):
    """The template is malformed, or doesn't fit what it's executed over."""


class _Nothing:
    """Go's nil of no type: what an absent map key gives inside if and with."""

    def __bool__(self) -> bool:
        return False


NOTHING = _Nothing()


# -- text and tokens --------------------------------------------------------------------------------------------------


def _split(source: str) -> list[tuple[str, str]]:
    """[("text" | "action", …)]; trim markers done, comments left out."""
    pieces: list[tuple[str, str]] = []
    position, trim = 0, False
    while True:
        start = source.find("{{", position)
        text = source[position:] if start < 0 else source[position:start]
        if trim:
            text = text.lstrip(_SPACE)
        if start < 0:
            if text:
                pieces.append(("text", text))
            return pieces
        end = _action_end(source, start + 2)
        action = source[start + 2 : end]
        if action[:1] == "-" and action[1:2] in (*_SPACE, ""):
            text = text.rstrip(_SPACE)
            action = action[1:]
        trim = action.endswith("-") and action[-2:-1] in _SPACE and len(action) > 1
        if trim:
            action = action[:-1]
        if text:
            pieces.append(("text", text))
        action = action.strip(_SPACE)
        if not (action.startswith("/*") and action.endswith("*/")):
            pieces.append(("action", action))
        position = end + 2


def _action_end(source: str, position: int) -> int:
    quote = ""
    if source[position:].lstrip("- \t\r\n").startswith("/*"):
        close = source.find("*/", position)
        end = source.find("}}", close) if close >= 0 else -1
        if end < 0:
            raise TemplateError("unclosed comment")
        return end
    while position < len(source):
        letter = source[position]
        if quote:
            if letter == "\\" and quote != "`":
                position += 1
            elif letter == quote:
                quote = ""
        elif letter in "\"`'":
            quote = letter
        elif source.startswith("}}", position):
            return position
        position += 1
    raise TemplateError("unclosed action")


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


def _string(text: str, position: int) -> tuple[str, int]:
    """The literal that begins at ``position``, and where it ends."""
    quote = text[position]
    position += 1
    out: list[str] = []
    while position < len(text):
        letter = text[position]
        if letter == quote:
            return "".join(out), position + 1
        if letter == "\\" and quote != "`":
            position += 1
            code = text[position : position + 1]
            digits = {"x": 2, "u": 4, "U": 8}.get(code)
            if digits:
                try:
                    out.append(chr(int(text[position + 1 : position + 1 + digits], 16)))
                except (ValueError, OverflowError):
                    raise TemplateError(f"malformed escape in {text}") from None
                position += digits
            elif code in _ESCAPES:
                out.append(_ESCAPES[code])
            else:
                raise TemplateError(f"unknown escape \\{code}")
        else:
            out.append(letter)
        position += 1
    raise TemplateError("unterminated quoted string")


def _name_end(text: str, position: int) -> int:
    while position < len(text) and (text[position].isalnum() or text[position] == "_"):
        position += 1
    return position


def _tokens(text: str) -> list[tuple[str, object]]:
    """Tokens of one action: (space|field|dot|var|name|string|number|char, value)."""
    tokens: list[tuple[str, object]] = []
    position = 0
    while position < len(text):
        letter = text[position]
        if letter in _SPACE:
            while position < len(text) and text[position] in _SPACE:
                position += 1
            tokens.append(("space", " "))
        elif letter in "\"`":
            value, position = _string(text, position)
            tokens.append(("string", value))
        elif letter == "'":
            value, position = _string(text, position)
            if len(value) != 1:
                raise TemplateError(f"malformed character constant: {text}")
            tokens.append(("number", ord(value)))
        elif letter == ".":
            end = _name_end(text, position + 1)
            tokens.append(("field", text[position + 1 : end]) if end > position + 1 else ("dot", "."))
            position = end
        elif letter == "$":
            end = _name_end(text, position + 1)
            tokens.append(("var", text[position:end]))
            position = end
        elif letter.isdigit() or (letter in "+-" and text[position + 1 : position + 2].isdigit()):
            end = position + 1
            while end < len(text) and (text[end].isalnum() or text[end] in "._"):
                end += 1
            word = text[position:end]
            try:
                tokens.append(("number", int(word, 0)))
            except ValueError:
                try:
                    tokens.append(("number", float(word)))
                except ValueError:
                    raise TemplateError(f'bad number syntax: "{word}"') from None
            position = end
        elif letter.isalpha() or letter == "_":
            end = _name_end(text, position)
            tokens.append(("name", text[position:end]))
            position = end
        elif text.startswith(":=", position):
            tokens.append(("char", ":="))
            position += 2
        elif letter in "|(),=":
            tokens.append(("char", letter))
            position += 1
        else:
            raise TemplateError(f"unexpected {letter!r} in command")
    return tokens


# -- the parser -------------------------------------------------------------------------------------------------------


class _Parser:
    def __init__(self, source: str) -> None:
        self.pieces = _split(source)
        self.position = 0
        self.tokens: list[tuple[str, object]] = []
        self.at = 0

    def block(self, ends: tuple[str, ...], loop: bool = False) -> tuple[list[Node], str, str]:
        """Nodes until one of the keywords ``ends``; that keyword, and what follows it in its action."""
        nodes: list[Node] = []
        while self.position < len(self.pieces):
            kind, text = self.pieces[self.position]
            self.position += 1
            if kind == "text":
                nodes.append(("text", text))
                continue
            word = text[: _name_end(text, 0)]
            rest = text[len(word) :].strip(_SPACE)
            if word in ("else", "end"):
                if word not in ends:
                    raise TemplateError(f"unexpected {{{{{word}}}}}")
                return nodes, word, rest
            if word in ("break", "continue") and not rest:
                if not loop:
                    raise TemplateError(f"{{{{{word}}}}} outside {{{{range}}}}")
                nodes.append((word,))
            elif word in ("if", "with", "range"):
                nodes.append(self.control(word, rest, loop or word == "range"))
            elif word in ("define", "template", "block"):
                raise TemplateError(f"{word} isn't supported in --format")
            else:
                nodes.append(("pipe", self.pipeline(text)))
        if ends:
            raise TemplateError("unexpected EOF: an {{end}} is missing")
        return nodes, "", ""

    def control(self, word: str, text: str, loop: bool) -> Node:
        if not text:
            raise TemplateError(f"missing value for {word}")
        pipe = self.pipeline(text, word == "range")
        body, end, rest = self.block(("else", "end"), loop)
        other: list[Node] = []
        if end == "else":
            inner = rest[: _name_end(rest, 0)]
            if inner in ("if", "with"):  # else if: the one {{end}} closes both
                other = [self.control(inner, rest[len(inner) :].strip(_SPACE), loop)]
                return (word, pipe, body, other)
            other, _, _ = self.block(("end",), loop)
        return (word, pipe, body, other)

    def pipeline(self, text: str, ranging: bool = False) -> Node:
        """(names, assign, commands): names a pipeline declares or assigns."""
        if not text:
            raise TemplateError("missing value for command")
        self.tokens, self.at = _tokens(text), 0
        pipe = self.pipe(ranging)
        if self.at != len(self.tokens):
            raise TemplateError(f"unexpected {self.tokens[self.at][1]!r} in {text!r}")
        return pipe

    def peek(self) -> tuple[str, object]:
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")

    def skip_space(self) -> None:
        while self.peek()[0] == "space":
            self.at += 1

    def pipe(self, ranging: bool = False) -> Node:
        self.skip_space()
        names: list[str] = []
        assign = ""
        start = self.at
        if self.peek()[0] == "var":
            while self.peek()[0] == "var":
                names.append(str(self.peek()[1]))
                self.at += 1
                self.skip_space()
                if ranging and self.peek() == ("char", ","):
                    self.at += 1
                    self.skip_space()
            if self.peek() in (("char", ":="), ("char", "=")):
                assign = str(self.peek()[1])
                self.at += 1
            else:
                names, self.at = [], start
        if len(names) > (2 if ranging else 1):
            raise TemplateError("too many declarations")
        commands = [self.command()]
        while self.peek() == ("char", "|"):
            self.at += 1
            commands.append(self.command())
        return (names, assign, commands)

    def command(self) -> list[Node]:
        operands: list[Node] = []
        while True:
            self.skip_space()
            kind, value = self.peek()
            if kind == "end" or (kind == "char" and value in ("|", ")")):
                if not operands:
                    raise TemplateError("missing value for command")
                return operands
            operands.append(self.operand())
            if self.peek()[0] not in ("space", "end") and self.peek() not in (("char", "|"), ("char", ")")):
                raise TemplateError(f"unexpected {self.peek()[1]!r} in operand")

    def operand(self) -> Any:
        kind, value = self.peek()
        self.at += 1
        node: Any
        if kind == "char" and value == "(":
            node = ("nested", self.pipe())
            if self.peek() != ("char", ")"):
                raise TemplateError("unclosed left paren")
            self.at += 1
        elif kind in ("string", "number"):
            return ("constant", value)
        elif kind == "field":
            node = ("chain", ("dot",), [value])
        elif kind == "dot":
            return ("dot",)
        elif kind == "var":
            node = ("var", value)
        elif kind == "name":
            constants = {"true": True, "false": False, "nil": None}
            if value in constants:
                return ("constant", constants[str(value)])
            if value not in FUNCTIONS and value not in ("and", "or"):
                raise TemplateError(f'function "{value}" not defined')
            return ("function", value)
        else:
            raise TemplateError(f"unexpected {value!r}")
        fields = node[2] if node[0] == "chain" else []
        while self.peek()[0] == "field":
            fields = [*fields, self.peek()[1]]
            self.at += 1
        if fields:
            node = ("chain", node[1] if node[0] == "chain" else node, fields)
        return node


# -- values -----------------------------------------------------------------------------------------------------------


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
    return json.dumps(None if value is NOTHING else value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _index(value: Any, *keys: Any) -> object:
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key, NOTHING)
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


# -- execution --------------------------------------------------------------------------------------------------------


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


class _Run:
    def __init__(self, data: object) -> None:
        self.out: list[str] = []
        self.variables: list[tuple[str, object]] = [("$", data)]

    def nodes(self, nodes: list[Node], dot: object) -> None:
        mark = len(self.variables)
        for node in nodes:
            kind = node[0]
            if kind == "text":
                self.out.append(node[1])
            elif kind == "pipe":
                value = self.pipe(node[1], dot)
                if not node[1][1]:
                    self.out.append(show(value))
            elif kind == "range":
                self.range(node, dot)
            elif kind == "break":
                raise _Break
            elif kind == "continue":
                raise _Continue
            else:
                inner = len(self.variables)
                value = self.pipe(node[1], dot)
                if truth(value):
                    self.nodes(node[2], value if kind == "with" else dot)
                else:
                    self.nodes(node[3], dot)
                del self.variables[inner:]
        del self.variables[mark:]

    def range(self, node: Node, dot: object) -> None:
        names, _, commands = node[1]
        value = self.pipe(([], "", commands), dot)
        pairs: list[tuple[object, object]]
        if isinstance(value, dict):
            pairs = [(key, value[key]) for key in sorted(value, key=str)]
        elif isinstance(value, (list, tuple)):
            pairs = list(enumerate(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            pairs = [(number, number) for number in range(value)]
        elif not truth(value):
            pairs = []
        else:
            raise TemplateError(f"range can't iterate over {show(value)}")
        if not pairs:
            self.nodes(node[3], dot)
        mark = len(self.variables)
        for key, item in pairs:
            del self.variables[mark:]
            if len(names) == 2:
                self.variables += [(names[0], key), (names[1], item)]
            elif names:
                self.variables.append((names[0], item))
            try:
                self.nodes(node[2], item)
            except _Break:
                break
            except _Continue:
                continue
        del self.variables[mark:]

    def pipe(self, pipe: Node, dot: object) -> object:
        names, assign, commands = pipe
        value: object = NOTHING
        for number, command in enumerate(commands):
            value = self.command(command, dot, (value,) if number else ())
        if assign == ":=":
            self.variables.append((names[0], value))
        elif assign == "=":
            for index in range(len(self.variables) - 1, -1, -1):
                if self.variables[index][0] == names[0]:
                    self.variables[index] = (names[0], value)
                    break
            else:
                raise TemplateError(f'undefined variable "{names[0]}"')
        return value

    def command(self, operands: list[Node], dot: object, last: tuple[object, ...]) -> object:
        head = operands[0]
        if head[0] != "function":
            if len(operands) > 1 or last:
                raise TemplateError("can't give argument to non-function")
            return self.operand(head, dot)
        name = head[1]
        if name in ("and", "or"):  # they stop at the first operand that decides
            value: object = NOTHING
            for node in operands[1:]:
                value = self.operand(node, dot)
                if truth(value) == (name == "or"):
                    return value
            if last:
                value = last[0]
            elif len(operands) < 2:
                raise TemplateError(f"wrong number of args for {name}")
            return value
        arguments = [self.operand(node, dot) for node in operands[1:]] + list(last)
        try:
            return FUNCTIONS[name](*arguments)
        except (TypeError, ValueError, AttributeError) as error:
            raise TemplateError(f"error calling {name}: {error}") from None

    def operand(self, node: Node, dot: object) -> object:
        kind = node[0]
        if kind == "dot":
            return dot
        if kind == "constant":
            return node[1]
        if kind == "var":
            for name, value in reversed(self.variables):
                if name == node[1]:
                    return value
            raise TemplateError(f'undefined variable "{node[1]}"')
        if kind == "nested":
            return self.pipe(node[1], dot)
        if kind == "function":
            return self.command([node], dot, ())
        value = self.operand(node[1], dot)
        for field in node[2]:
            value = self.field(value, field)
        return value

    @staticmethod
    def field(value: object, field: str) -> object:
        if isinstance(value, dict):
            if field in value:
                return value[field]
            raise TemplateError(f'map has no entry for key "{field}"')
        if value is None or value is NOTHING:
            raise TemplateError(f"nil data; no entry for key \"{field}\"")
        raise TemplateError(f"can't evaluate field {field} in {show(value)}")


class Template:
    """A parsed template; ``render`` may be called for many values."""

    def __init__(self, source: str) -> None:
        """Raises TemplateError."""
        self._nodes = _Parser(source).block(())[0]

    def render(self, data: Mapping[str, object] | object) -> str:
        """Raises TemplateError where the data doesn't have what the template wants."""
        run = _Run(data)
        try:
            run.nodes(self._nodes, data)
        except RecursionError:
            raise TemplateError("the template is nested too deeply") from None
        return "".join(run.out)

    def fields(self) -> set[str]:
        """The first names of every chain from the dot: what of a row the template uses."""
        found: set[str] = set()

        def walk(node: object) -> None:
            if isinstance(node, tuple) and len(node) == 3 and node[0] == "chain" and node[1] == ("dot",):
                found.add(node[2][0])
            elif isinstance(node, (tuple, list)):
                for child in node:
                    walk(child)

        walk(self._nodes)
        return found

"""Parsing: ``_tokens`` cuts text and actions, ``Parser`` makes nested tuples of them, ``(kind, …)``."""

from __future__ import annotations

from .functions import FUNCTIONS, TemplateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Node = tuple[Any, ...]

_SPACE = " \t\r\n"


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


class Parser:
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

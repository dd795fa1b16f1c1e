"""Go templates (text/template's language) as ``--format`` takes them: parse once, execute over plain dicts and lists. Pure.

What there is: fields and chains, variables, literals, pipelines, parentheses; if/else if/else, range (with else, break and
continue), with, define-free; trim markers and comments; text/template's functions and Docker's (json, join, upper, lower,
title, split, pad, truncate, println). What differs: a field that isn't there is an error, in a row and in a document alike; ``Struct``
and ``Texts`` are for data in which it isn't, as in Go.

Theory: ``parse`` makes nested tuples of the text, ``_Run`` here walks them, ``functions`` has the values and what may be called.
"""

from __future__ import annotations

from .functions import FUNCTIONS, NOTHING, Struct, TemplateError, Texts, show, truth
from .parse import Parser

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    Node = tuple[Any, ...]

__all__ = ["Struct", "Template", "TemplateError", "Texts"]


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
        if isinstance(value, Struct):
            if field in value.names:
                return value.get(value.names[field], "")
            raise TemplateError(f"can't evaluate field {field}")
        if isinstance(value, dict):
            if field in value:
                return value[field]
            if isinstance(value, Texts):
                return NOTHING
            raise TemplateError(f'map has no entry for key "{field}"')
        if value is None or value is NOTHING:
            raise TemplateError(f"nil data; no entry for key \"{field}\"")
        raise TemplateError(f"can't evaluate field {field} in {show(value)}")


class Template:
    """A parsed template; ``render`` may be called for many values."""

    def __init__(self, source: str) -> None:
        """Raises TemplateError."""
        self._nodes = Parser(source).block(())[0]

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

"""What lists print: tables aligned as Docker's and fitted to the terminal, JSON lines, templates; and sizes and times for people."""

from __future__ import annotations

import os
import sys

from .grammar import CliError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .grammar import Options

    Row = dict[str, str]

_MIN_WIDTH, _PADDING = 10, 3  # text/tabwriter's parameters in Docker's formatter


def table_lines(rows: Sequence[Sequence[str]], width: int = 0, shrink: Sequence[int] = ()) -> list[str]:
    """Cells in columns. If ``width`` is given and the lines are longer, the columns ``shrink`` (indices) are cut, the widest first."""
    if not rows:
        return []
    count = max(len(row) for row in rows)
    widths = [max((len(row[index]) for row in rows if index < len(row)), default=0) for index in range(count)]
    minimum, padding = _MIN_WIDTH, _PADDING

    def total() -> int:
        return sum(max(minimum, size + padding) for size in widths[:-1]) + widths[-1]

    if width and total() > width:
        minimum, padding = 0, 2
        while total() > width:
            index = max((index for index in shrink if widths[index] > 8), key=lambda index: widths[index], default=-1)
            if index < 0:
                break
            others = total() - widths[index]
            second = max((widths[other] for other in shrink if other != index), default=8)
            widths[index] = max(8, min(widths[index] - 1, max(width - others, second)))
    lines = []
    for row in rows:
        line = ""
        for index, cell in enumerate(row):
            if len(cell) > widths[index]:
                cell = cell[: widths[index] - 1] + "…"
            line += cell if index == len(row) - 1 else cell.ljust(max(minimum, widths[index] + padding))
        lines.append(line.rstrip(" "))
    return lines


def terminal_width() -> int:
    """Columns of the terminal that standard output is; 0 if it's none."""
    try:
        if os.isatty(1):
            return os.get_terminal_size(1).columns
    except OSError:
        pass
    return 0


class Listing:
    """One kind of list: ``fields`` maps a row's field to its heading, ``columns`` are those shown unless a format says otherwise."""

    def __init__(self, fields: dict[str, str], columns: Sequence[str], shrink: Sequence[str] = (), key: str = "ID") -> None:
        self.fields = fields
        self.columns = columns
        self.shrink = shrink
        self.key = key

    def print(self, options: Options, rows: Sequence[Row], columns: Sequence[str] | None = None) -> None:
        """Print ``rows`` as the flags --quiet and --format want them."""
        template = options.text("format")
        if options.flag("quiet") and not template:
            sys.stdout.write("".join(f"{row[self.key]}\n" for row in rows))
            return
        if template == "json":
            from json import dumps

            sys.stdout.write("".join(dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows))
            return
        if template in ("", "table"):
            names = columns or self.columns
            lines = [[self.fields[name] for name in names], *([row[name] for name in names] for row in rows)]
            self._write(lines, names, options)
            return
        self._template(options, template, rows)

    def _write(self, lines: Sequence[Sequence[str]], names: Sequence[str], options: Options) -> None:
        width = 0 if options.flag("no-trunc") else terminal_width()
        shrink = [index for index, name in enumerate(names) if name in self.shrink]
        sys.stdout.write("".join(line + "\n" for line in table_lines(lines, width, shrink)))

    def _template(self, options: Options, source: str, rows: Sequence[Row]) -> None:
        table = source.startswith("table") and source[5:6] in (" ", "\t", "\\", "{")
        source = unescape(source[5:].lstrip(" ") if table else source)
        render = renderer(source)
        if not table:
            sys.stdout.write("".join(render(row) + "\n" for row in rows))
            return
        texts = [render(self.fields), *(render(row) for row in rows)]
        sys.stdout.write("".join(line + "\n" for line in table_lines([text.split("\t") for text in texts])))


def unescape(source: str) -> str:
    r"""``\t`` and ``\n`` as people type them in a shell's quotes."""
    return source.replace("\\t", "\t").replace("\\n", "\n")


def renderer(source: str) -> Callable[[object], str]:
    """A template as a function; raises CliError in Docker's words."""
    from .template import Template, TemplateError

    try:
        template = Template(source)
    except TemplateError as error:
        raise CliError(f"template parsing error: {error}", 64) from None

    def render(data: object) -> str:
        try:
            return template.render(data)
        except TemplateError as error:
            raise CliError(f"template: {error}: in {source!r}", 1) from None

    return render


def formatted(options: Options, value: object, indent: int = 0) -> str | None:
    """``value`` as --format wants it (json or a template); None if there's no --format."""
    source = options.text("format")
    if not source:
        return None
    if source == "json":
        from json import dumps

        return dumps(value, ensure_ascii=False, indent=indent or None, separators=(",", ":"))
    return renderer(unescape(source))(value)


def short_id(text: str) -> str:
    """Twelve hex digits, whatever algorithm precedes them."""
    return text.partition(":")[2][:12] if ":" in text else text[:12]


def human_size(size: int) -> str:
    """``4.26MB``: powers of 1000, four significant digits at most, three from 100 on; docker/go-units' HumanSizeWithPrecision 3."""
    value, units = float(size), ("B", "kB", "MB", "GB", "TB", "PB")
    index = 0
    while value >= 1000 and index < len(units) - 1:
        value /= 1000
        index += 1
    return f"{value:.3g}{units[index]}" if value < 1000 else f"{value:.0f}{units[index]}"


def human_duration(seconds: float) -> str:
    """``About a minute``, ``3 hours``: docker/go-units' HumanDuration."""
    whole = int(seconds)
    if whole < 1:
        return "Less than a second"
    if whole == 1:
        return "1 second"
    if whole < 60:
        return f"{whole} seconds"
    minutes = whole // 60
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    hours = int(seconds / 3600 + 0.5)
    if hours == 1:
        return "About an hour"
    if hours < 48:
        return f"{hours} hours"
    if hours < 24 * 7 * 2:
        return f"{hours // 24} days"
    if hours < 24 * 30 * 2:
        return f"{hours // 24 // 7} weeks"
    if hours < 24 * 365 * 2:
        return f"{hours // 24 // 30} months"
    return f"{hours // 24 // 365} years"


def ago(then_ns: int, now_ns: int) -> str:
    return human_duration((now_ns - then_ns) / 1e9) + " ago" if then_ns > 0 else "N/A"


def created_at(then_ns: int) -> str:
    """``2024-01-31 12:00:00 +0100 CET``, as Go prints a local time."""
    import time

    if then_ns <= 0:
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S %z %Z", time.localtime(then_ns // 10**9))


def labels_text(labels: dict[str, object]) -> str:
    return ",".join(f"{key}={labels[key]}" for key in sorted(labels))


def print_json(value: object) -> None:
    """Indented by four spaces, as ``docker inspect``."""
    from json import dumps

    sys.stdout.write(dumps(value, ensure_ascii=False, indent=4) + "\n")

"""system bus and system forget: how the broker fares, and its durable subscriptions."""

from __future__ import annotations

import sys

from ..client import connect, each, items, mapping, number, text
from ..grammar import Options
from ..output import formatted, human_size, table_lines

_QUANTILES = (0.5, 0.99)


def _quantile(histogram: list[int], share: float) -> str:
    """The bucket's upper bound that so many calls are below, as the broker's histogram has it."""
    total = sum(histogram)
    seen = 0
    for power, count in enumerate(histogram):
        seen += count
        if total and seen >= share * total:
            bound_us = 1 << power
            for unit, size in (("s", 1_000_000), ("ms", 1000)):
                if bound_us >= size:
                    return f"<{bound_us / size:.3g} {unit}"
            return f"<{bound_us} µs"
    return "-"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _methods(stats: dict[str, object]) -> list[list[str]]:
    rows = [["METHOD", "CALLS", "ERRORS", "CANCELLED", "MEDIAN", "99 %"]]
    for name in sorted(methods := mapping(stats, "methods")):
        one = mapping(methods, name)
        histogram = [int(str(count)) for count in one.get("latency_us_log2") or []]  # type: ignore[attr-defined]
        counts = [str(number(one, key)) for key in ("calls", "errors", "cancelled")]
        rows.append([name, *counts, *(_quantile(histogram, share) for share in _QUANTILES)])
    return rows


def _summary(stats: dict[str, object]) -> list[str]:
    def count(key: str) -> int:
        return number(stats, key)

    roles = ", ".join(f"{many} {role}" for role, many in sorted(mapping(stats, "connections_by_role").items()))
    kept = count("next_offset") - count("oldest_offset")
    return [
        f"Connections: {count('connections')} ({roles}), {count('refused')} refused, {count('protocol_errors')} broke the protocol",
        f"Traffic: {human_size(count('bytes_in'))} in, {human_size(count('bytes_out'))} out",
        f"Calls: {count('calls_total')}, {count('calls_in_flight')} in flight",
        f"Events: {count('events_total')} published, {count('events_duplicate')} came twice, {count('events_refused')} refused",
        f"Subscriptions: {count('subscriptions')}, {count('slow_readers')} reading behind (by {count('most_behind')} at most), "
        f"{_many(count('gaps'), 'gap')} of {_many(count('events_lost'), 'event')}",
        f"Journal: {text(stats, 'journal_id')}, offsets {count('oldest_offset')} to {count('next_offset') - 1} ({_many(kept, 'event')}), "
        f"{human_size(count('journal_bytes'))} in {_many(count('journal_segments'), 'segment')}",
        *([f"The journal can't be written: {error}"] if (error := text(stats, "journal_error")) else []),
    ]


def bus(options: Options) -> int:
    connection = connect(options)
    stats = connection.call("bus.stats", {}, timeout_s=30)
    stats["durables"] = items(connection.call("bus.durables", {}, timeout_s=30), "durables")
    said = formatted(options, stats)
    if said is not None:
        sys.stdout.write(said + "\n")
        return 0
    lines = [*_summary(stats), "", *table_lines(_methods(stats))]
    if durables := items(stats, "durables"):
        rows = [["DURABLE", "USER", "NEXT", "BEHIND", "IN USE BY"]]
        for one in durables:
            behind = max(0, number(stats, "next_offset") - number(one, "offset"))
            pid = number(one, "pid")
            rows.append(
                [
                    text(one, "name"),
                    str(number(one, "uid")),
                    str(number(one, "offset")),
                    str(behind),
                    f"process {pid}" if pid else "-",
                ]
            )
        lines += ["", *table_lines(rows)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def forget(options: Options) -> int:
    connection = connect(options)

    def one(name: str) -> None:
        connection.call("bus.forget", {"name": name}, timeout_s=30)

    return each(options, one, options.args)

"""What the broker counts. Latencies are histograms in powers of two: bucket n counts calls of less than 2^n microseconds."""

from __future__ import annotations

BUCKETS = 32  # the last one is 36 minutes and more


class MethodCounters:
    """Calls of one method. ``errors`` counts any answer that is one, ``cancelled`` those whose caller left or gave up."""

    __slots__ = ("buckets", "calls", "cancelled", "errors", "total_ns")

    def __init__(self) -> None:
        self.calls = 0
        self.errors = 0
        self.cancelled = 0
        self.total_ns = 0
        self.buckets = [0] * BUCKETS

    def done(self, duration_ns: int) -> None:
        self.total_ns += duration_ns
        self.buckets[min(BUCKETS - 1, (duration_ns // 1000).bit_length())] += 1

    def body(self) -> dict[str, object]:
        last = max((index for index, count in enumerate(self.buckets) if count), default=-1)
        return {
            "calls": self.calls,
            "errors": self.errors,
            "cancelled": self.cancelled,
            "total_us": self.total_ns // 1000,
            "latency_us_log2": self.buckets[: last + 1],
        }

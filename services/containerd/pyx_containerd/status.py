"""The STATUS column of ``ps``: Docker's words for how long ago. Pure."""

from __future__ import annotations

from . import health
from .model import Container, State

SECOND_NS = 1_000_000_000


def human_duration(duration_ns: int) -> str:
    """Docker's coarse durations: "Less than a second", "5 seconds", "About a minute", "3 hours", "2 weeks"."""
    seconds = duration_ns // SECOND_NS
    if seconds < 1:
        return "Less than a second"
    if seconds == 1:
        return "1 second"
    if seconds < 60:
        return f"{seconds} seconds"
    minutes = seconds // 60
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    hours = (2 * minutes + 60) // 120  # rounded, as Docker does
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


def status_text(container: Container, now_ns: int) -> str:
    """``Up 3 minutes``, ``Exited (0) 2 hours ago``, ``Created``, ..."""
    up = human_duration(max(0, now_ns - container.started_at_ns))
    ago = human_duration(max(0, now_ns - container.finished_at_ns))
    match container.state:
        case State.RUNNING:
            return f"Up {up}" + (f" ({health.in_brackets(container.health)})" if container.health else "")
        case State.PAUSED:
            return f"Up {up} (Paused)"
        case State.RESTARTING:
            return f"Restarting ({container.exit_code}) {ago} ago"
        case State.EXITED:
            return f"Exited ({container.exit_code}) {ago} ago"
        case State.REMOVING:
            return "Removal In Progress"
        case State.DEAD:
            return "Dead"
        case _:
            return "Created"

"""The closed set of errors that travel on the bus.

A code says what kind of failure it was, so that a program can act on it; the message is for people: lowercase, quoting the
offending value, and saying what to do where that is known (``hint``). Nothing ever matches an error by its text.
The set is containerd's ``errdefs`` (which is gRPC's status codes less what a local engine has no use for).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing costs the command line some milliseconds
    from typing import ClassVar

# An error is for people and must fit into a frame with room to spare.
MAX_TEXT = 16 << 10
MAX_DETAILS = 32


class BusError(Exception):
    """Base of every error that crosses the bus.

    ``details`` are small machine-readable facts (``{"exit_code": "127"}``); ``retryable`` says whether the same call may succeed
    later without anybody changing anything.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", details: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details or {}


class InvalidArgument(BusError):
    """The request itself is wrong, whatever the state."""

    code = "invalid_argument"


class NotFound(BusError):
    """The named object doesn't exist."""

    code = "not_found"


class AlreadyExists(BusError):
    """The name or ID is taken."""

    code = "already_exists"


class FailedPrecondition(BusError):
    """The object isn't in a state that allows it (remove of a running container)."""

    code = "failed_precondition"


class Conflict(BusError):
    """Somebody else holds what was asked for, or changed it meanwhile (a host port, a volume in use)."""

    code = "conflict"


class ResourceExhausted(BusError):
    """A limit was reached: addresses, queue, disk, quota."""

    code = "resource_exhausted"


class PermissionDenied(BusError):
    """The caller may not do this."""

    code = "permission_denied"


class Unavailable(BusError):
    """The service is down or lost the connection; the call may or may not have taken effect. Retry idempotent methods."""

    code = "unavailable"
    retryable = True


class DeadlineExceeded(BusError):
    """The deadline passed; the callee was cancelled."""

    code = "deadline_exceeded"


class Unimplemented(BusError):
    """This host or this version can't do it."""

    code = "not_implemented"


class Internal(BusError):
    """A bug, or a failure nobody foresaw. The service's own log has the traceback."""

    code = "internal"


class Cancelled(BusError):
    """The caller cancelled the call. Only ever seen by somebody else than that caller."""

    code = "cancelled"


BY_CODE: dict[str, type[BusError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        Conflict,
        ResourceExhausted,
        PermissionDenied,
        Unavailable,
        DeadlineExceeded,
        Unimplemented,
        Internal,
        Cancelled,
    )
}


def to_body(error: BusError) -> dict[str, object]:
    """The error's form on the wire (docs/bus.md, "ERROR").

    It can always be sent: a message quotes what the caller or a file system gave, however long that is and whatever bytes it has.
    """
    body: dict[str, object] = {"code": error.code, "message": _sendable(error.message)}
    if error.hint:
        body["hint"] = _sendable(error.hint)
    if error.details:
        body["details"] = {_sendable(key): _sendable(error.details[key]) for key in list(error.details)[:MAX_DETAILS]}
    return body


def _sendable(text: str) -> str:
    """Valid UTF-8 (a file's name may have come as surrogates), and short enough."""
    if len(text) > MAX_TEXT:
        text = text[: MAX_TEXT // 2] + " ... " + text[-MAX_TEXT // 2 :]
    return text.encode("utf-8", "backslashreplace").decode()


def from_body(body: object) -> BusError:
    """The error a peer sent. An unknown code becomes ``Internal``: newer peers may know more codes than we do."""
    if not isinstance(body, dict):
        return Internal(f"malformed error body: {body!r}")
    cls = BY_CODE.get(str(body.get("code")), Internal)
    details = body.get("details")
    return cls(
        str(body.get("message", "")),
        hint=str(body.get("hint", "")),
        details={str(k): str(v) for k, v in details.items()} if isinstance(details, dict) else None,
    )

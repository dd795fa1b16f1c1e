"""containerd's errors: the bus's classes, each raised from one place so that its words are always the same."""

from __future__ import annotations

import os

from pyx_bus import errors


class KernelError(errors.Internal):
    """A system call failed. ``errno`` is kept for those who can go on from some of them."""

    def __init__(self, errno: int, call: str, path: str) -> None:
        super().__init__(f'{call} "{path}": {os.strerror(errno).lower()}', details={"errno": str(errno), "call": call})
        self.errno = errno


def no_such_container(reference: str) -> errors.NotFound:
    return errors.NotFound(f'no such container: "{reference}"', hint="pyx ps -a lists all containers")


def ambiguous(reference: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        f'container ID prefix "{reference}" is ambiguous: it fits several containers', hint="give more digits"
    )


def name_taken(name: str, container_id: str) -> errors.AlreadyExists:
    return errors.AlreadyExists(
        f'container name "/{name}" is already in use by container "{container_id}"',
        hint="remove or rename that container, or choose another name",
    )


def not_running(container_id: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(f'container "{container_id}" is not running')


def is_paused(container_id: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(f'container "{container_id}" is paused', hint="unpause it first")


def start_failed(name: str, reason: str, exit_code: int) -> errors.BusError:
    """126/127: the command can't be executed, the user's matter; 125: the engine's or the runtime's."""
    details = {"exit_code": str(exit_code)}
    message = f'failed to start container "{name}": {reason}'
    if exit_code in (126, 127):
        return errors.FailedPrecondition(message, details=details)
    return errors.Internal(message, details=details)


def exec_failed(reason: str, exit_code: int) -> errors.BusError:
    details = {"exit_code": str(exit_code)}
    if exit_code in (126, 127):
        return errors.FailedPrecondition(reason, details=details)
    return errors.Internal(f"exec failed: {reason}", details=details)

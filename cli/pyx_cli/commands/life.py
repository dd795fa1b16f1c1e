"""What changes containers that exist: stop, kill, restart, pause, unpause, wait, update, rm, rename. Several names go on past a failure."""

from __future__ import annotations

from ..client import connect, each, missing, number
from ..grammar import CliError, Options


def _stop_body(options: Options, name: str) -> dict[str, object]:
    body: dict[str, object] = {"container": name}
    if options.given("signal"):
        body["signal"] = options.text("signal")
    for flag in ("time", "timeout"):
        if options.given(flag):
            body["timeout_s"] = options.number(flag)
    return body


def stop(options: Options) -> int:
    return _stop(options, "containerd.stop")


def restart(options: Options) -> int:
    return _stop(options, "containerd.restart")


def _stop(options: Options, method: str) -> int:
    connection = connect(options)

    def one(name: str) -> None:
        connection.call(method, _stop_body(options, name))

    return each(options, one, options.args)


def kill(options: Options) -> int:
    connection = connect(options)

    def one(name: str) -> None:
        connection.call("containerd.kill", {"container": name, "signal": options.text("signal", "KILL")})

    return each(options, one, options.args)


def pause(options: Options) -> int:
    return _plain(options, "containerd.pause")


def unpause(options: Options) -> int:
    return _plain(options, "containerd.unpause")


def _plain(options: Options, method: str) -> int:
    connection = connect(options)

    def one(name: str) -> None:
        connection.call(method, {"container": name})

    return each(options, one, options.args)


def wait(options: Options) -> int:
    connection = connect(options)
    condition = options.text("condition", "not-running")

    def one(name: str) -> str:
        return str(number(connection.call("containerd.wait", {"container": name, "condition": condition}), "exit_code"))

    return each(options, one, options.args)


def remove(options: Options) -> int:
    from pyx_bus.errors import NotFound

    connection = connect(options)
    force, volumes = options.flag("force"), options.flag("volumes")

    def one(name: str) -> str | bool:
        try:
            connection.call("containerd.remove", {"container": name, "force": force, "volumes": volumes})
        except NotFound as error:
            if not force:
                raise
            return missing(error)
        return name

    return each(options, one, options.args)


def update(options: Options) -> int:
    from ..spec import limits

    given = limits(options)
    if not given:
        raise CliError("you must provide one or more flags when using this command")
    connection = connect(options)

    def one(name: str) -> None:
        connection.call("containerd.update", {"container": name, "resources": given})

    return each(options, one, options.args)


def rename(options: Options) -> int:
    old, new = options.args
    connect(options).call("containerd.rename", {"container": old, "name": new})
    return 0

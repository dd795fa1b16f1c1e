"""The stack itself: up, down, info, version."""

from __future__ import annotations

import os
import sys

from ..client import connect, items, mapping, number, text, texts
from ..grammar import CliError, Options
from ..output import formatted, human_size
from ..values import duration_ns


def up(options: Options) -> int:
    from ..supervisor import Stack

    stack = Stack(options.session["root"], options.session["run"])
    timeout_s = duration_ns(options.text("timeout", "30s"), "--timeout") / 1e9
    return stack.up(options.flag("detach"), timeout_s)


def down(options: Options) -> int:
    from ..supervisor import Stack

    stack = Stack(options.session["root"], options.session["run"])
    if pid := stack.supervisor_pid():
        try:
            os.kill(pid, 0)
        except PermissionError:  # before anything is said or stopped
            raise CliError(f"only root may stop the stack in {stack.run}") from None
        except ProcessLookupError:
            pass  # it has just ended
        _before_down(options)
    return stack.down()


def _before_down(options: Options) -> None:
    """Stop the containers if that's wanted, else say how many go on."""
    from pyx_bus.errors import BusError, NotFound

    try:
        connection = connect(options, 2.0)
        running = items(connection.call("containerd.list", {}, timeout_s=5), "containers")
        if running and options.flag("stop-containers"):
            serials = {connection.open("containerd.stop", {"container": text(one, "id")}) for one in running}
            failures = []
            while serials:
                message = connection.receive()
                if message is not None and message.kind in ("result", "error"):
                    serials.discard(message.serial)
                    if message.kind == "error" and not isinstance(message.error(), NotFound):  # that one has gone by itself
                        failures.append(message.error().message)
            if failures:
                raise CliError("; ".join(failures))
        elif running:
            many = "1 container goes" if len(running) == 1 else f"{len(running)} containers go"
            sys.stderr.write(f"{many} on running without the stack; pyx system up finds them again\n")
    except (CliError, BusError) as error:
        if options.flag("stop-containers"):
            raise CliError(f"cannot stop the containers: {error}", 1, "pyx system down without --stop-containers leaves them") from None


def version(options: Options) -> int:
    import platform

    from pyx_bus import __version__
    from pyx_bus.errors import Unavailable

    client: dict[str, object] = {
        "Version": __version__, "PythonVersion": platform.python_version(), "Os": "linux", "Arch": platform.machine(),
    }  # fmt: skip
    server: dict[str, object] | None = None
    failure: CliError | None = None
    try:
        connection = connect(options)
        try:
            info = connection.call("containerd.info", timeout_s=10)
        except Unavailable:
            info = {}
        found_services = items(connection.call("bus.services"), "services")
        components = [{"Name": text(one, "name"), "Version": text(one, "version")} for one in found_services]
        server = {
            "Components": sorted(components, key=lambda one: one["Name"]),
            "DefaultRuntime": text(info, "default_runtime"),
            "RuntimeVersion": text(info, "runtime_version"),
            "KernelVersion": text(info, "kernel_version"),
        }  # fmt: skip
    except CliError as error:
        failure = error
    found = formatted(options, {"Client": client, "Server": server})
    if found is not None:
        print(found)
    else:
        print("Client:")
        for key, value in (("Version", "Version"), ("Python version", "PythonVersion")):
            print(f" {key + ':':<16}{client[value]}")
        print(f" {'OS/Arch:':<16}{client['Os']}/{client['Arch']}")
        if server is not None:
            print("\nServer:")
            print(f" {'Runtime:':<16}{server['DefaultRuntime']}, {server['RuntimeVersion']}")
            print(f" {'Kernel:':<16}{server['KernelVersion']}")
            for one in items(server, "Components"):
                print(f" {text(one, 'Name') + ':':<16}{text(one, 'Version')}")
    if failure is not None:
        raise failure
    return 0


def info(options: Options) -> int:
    from pyx_bus.errors import Unavailable

    connection = connect(options)
    services = sorted(items(connection.call("bus.services"), "services"), key=lambda one: text(one, "name"))
    stats = connection.call("bus.stats")
    body: dict[str, object] = {}
    images = 0
    missing = []
    # This is what one looks at when something doesn't work: a service that is down must not make it fail.
    try:
        body = connection.call("containerd.info", timeout_s=10)
    except Unavailable as error:
        missing.append(error.message)
    try:
        images = len(items(connection.call("imaged.list", {}, timeout_s=10), "images"))
    except Unavailable as error:
        missing.append(error.message)
    runtimes = mapping(body, "runtimes")
    data: dict[str, object] = {
        "Containers": number(body, "containers"),
        "ContainersRunning": number(body, "containers_running"),
        "ContainersPaused": number(body, "containers_paused"),
        "ContainersStopped": number(body, "containers_stopped"),
        "Images": images,
        "Runtimes": runtimes,
        "DefaultRuntime": text(body, "default_runtime"),
        "RuntimeVersion": text(body, "runtime_version"),
        "RuntimeReason": text(body, "runtime_reason"),
        "CgroupVersion": text(body, "cgroup_version"),
        "CgroupDriver": text(body, "cgroup_driver"),
        "KernelVersion": text(body, "kernel_version"),
        "OperatingSystem": text(body, "operating_system"),
        "Architecture": text(body, "architecture"),
        "NCPU": number(body, "cpus"),
        "MemTotal": number(body, "memory_bytes"),
        "Name": text(body, "hostname"),
        "RootDir": text(body, "root_dir") or options.session["root"],
        "Bus": {"Path": options.session["bus"], **stats},
        "Services": services,
        "Warnings": texts(body, "warnings"),
    }
    found = formatted(options, data)
    if found is not None:
        print(found)
        return 0
    lines = [
        f"Containers: {data['Containers']}",
        f" Running: {data['ContainersRunning']}",
        f" Paused: {data['ContainersPaused']}",
        f" Stopped: {data['ContainersStopped']}",
        f"Images: {images}",
        f"Runtimes: {' '.join(sorted(runtimes))}",
        *(f" {name}: {runtimes[name]}" for name in sorted(runtimes)),
        f"Default runtime: {data['DefaultRuntime']}",
        f" Version: {data['RuntimeVersion']}",
        f" Why: {data['RuntimeReason']}",
        f"Cgroup driver: {data['CgroupDriver']}",
        f"Cgroup version: {data['CgroupVersion']}",
        f"Kernel version: {data['KernelVersion']}",
        f"Operating system: {data['OperatingSystem']}",
        f"Architecture: {data['Architecture']}",
        f"CPUs: {data['NCPU']}",
        f"Total memory: {human_size(number(body, 'memory_bytes'))}",
        f"Name: {data['Name']}",
        f"Root directory: {data['RootDir']}",
        f"Bus: {options.session['bus']}",
        "Services:",
        *(f" {text(one, 'name')}: pid {number(one, 'pid')}, version {text(one, 'version')}" for one in services),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    for warning in texts(body, "warnings"):
        os.write(2, f"WARNING: {warning}\n".encode())
    for message in missing:
        os.write(2, f"pyx: {message}\n".encode())
    return 1 if missing else 0

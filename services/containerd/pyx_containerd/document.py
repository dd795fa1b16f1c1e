"""``inspect``: a container as Docker's JSON shows it (Engine API, GET /containers/{id}/json). Pure."""

from __future__ import annotations

import time
from typing import Any

from pyx_bus.contract.imaged import HealthCheck
from pyx_bus.contract.netd import PortMapping

from .model import Container, Health, State

_ZERO_TIME = "0001-01-01T00:00:00Z"


def timestamp(time_ns: int) -> str:
    """RFC 3339 with nanoseconds, UTC; Go's zero time for 0."""
    if not time_ns:
        return _ZERO_TIME
    seconds, fraction = divmod(time_ns, 10**9)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return text + (f".{fraction:09d}".rstrip("0") if fraction else "") + "Z"


def inspect(container: Container, *, bundle: str, exec_ids: list[str], shim_version: str = "") -> dict[str, Any]:
    """The whole document."""
    spec, process = container.spec, container.process
    return {
        "Id": container.id,
        "Created": timestamp(container.created_at_ns),
        "Path": process.args[0],
        "Args": process.args[1:],
        "State": _state(container),
        "Image": container.image.id,
        "ResolvConfPath": f"{bundle}/resolv.conf",
        "HostnamePath": f"{bundle}/hostname",
        "HostsPath": f"{bundle}/hosts",
        "LogPath": container.log_path,
        "Name": "/" + container.name,
        "RestartCount": container.restart_count,
        "Driver": container.snapshotter,
        "Platform": "linux",
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": "",
        "ExecIDs": exec_ids or None,
        "HostConfig": _host_config(container),
        "GraphDriver": {"Data": _graph(container), "Name": container.snapshotter},
        "Mounts": [
            {
                "Type": volume.kind,
                **({"Name": volume.name} if volume.name else {}),
                "Source": volume.source if volume.kind != "tmpfs" else "",
                "Destination": volume.target,
                **({"Driver": volume.driver} if volume.driver else {}),
                "Mode": ",".join(option for option in volume.options if option in ("ro", "z", "Z")),
                "RW": not volume.read_only,
                "Propagation": volume.propagation,
            }
            for volume in container.attached_volumes
        ],
        "Config": {
            "Hostname": container.hostname,
            "Domainname": spec.domainname,
            "User": process.user,
            "AttachStdin": False,
            "AttachStdout": False,
            "AttachStderr": False,
            "ExposedPorts": {port: {} for port in container.exposed_ports} or None,
            "Tty": spec.tty,
            "OpenStdin": spec.open_stdin,
            "StdinOnce": spec.stdin_once,
            "Env": process.env,
            "Cmd": spec.command if spec.command is not None else (container.image.cmd or None),
            "Image": spec.image,
            "Volumes": {path: {} for path in container.image.volumes} or None,
            "WorkingDir": "" if process.working_dir == "/" and not spec.working_dir else process.working_dir,
            "Entrypoint": spec.entrypoint if spec.entrypoint is not None else (container.image.entrypoint or None),
            "OnBuild": None,
            "Labels": container.labels,
            "StopSignal": f"{spec.stop_signal or container.image.stop_signal or 'SIGTERM'}",
            **({"Healthcheck": _healthcheck(container.healthcheck)} if container.healthcheck else {}),
            **({"StopTimeout": spec.stop_timeout_s} if spec.stop_timeout_s is not None else {}),
        },
        "NetworkSettings": _network(container),
    }


def _state(container: Container) -> dict[str, Any]:
    state = container.state
    return {
        "Status": state.value,
        "Running": state in (State.RUNNING, State.PAUSED, State.RESTARTING),
        "Paused": state is State.PAUSED,
        "Restarting": state is State.RESTARTING,
        "OOMKilled": container.oom_killed,
        "Dead": state is State.DEAD,
        "Pid": container.pid,
        "ExitCode": container.exit_code,
        "Error": container.error,
        "StartedAt": timestamp(container.started_at_ns),
        "FinishedAt": timestamp(container.finished_at_ns),
        **({"Health": _health(container.health)} if container.health else {}),
    }


def _health(health: Health) -> dict[str, Any]:
    log = [
        {
            "Start": timestamp(result.started_at_ns),
            "End": timestamp(result.ended_at_ns),
            "ExitCode": result.exit_code,
            "Output": result.output,
        }
        for result in health.log
    ]
    return {"Status": health.status.value, "FailingStreak": health.failing_streak, "Log": log}


def _healthcheck(check: HealthCheck) -> dict[str, Any]:
    found = {
        "Test": check.test,
        "Interval": check.interval_ns,
        "Timeout": check.timeout_ns,
        "StartPeriod": check.start_period_ns,
        "StartInterval": check.start_interval_ns,
        "Retries": check.retries,
    }
    return {key: value for key, value in found.items() if value}


def _host_config(container: Container) -> dict[str, Any]:
    spec, limits = container.spec, container.spec.resources
    binds = []
    for mount in spec.mounts:
        if mount.type in ("bind", "volume") and mount.source:
            binds.append(f"{mount.source}:{mount.target}" + (":ro" if mount.read_only else ""))
    return {
        "Binds": binds or None,
        "LogConfig": {"Type": spec.log_driver or "json-file", "Config": dict(spec.log_options)},
        "NetworkMode": spec.network or "bridge",
        "PortBindings": _bindings(spec.ports, skip_host=False),
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        "AutoRemove": spec.auto_remove,
        "CapAdd": spec.cap_add or None,
        "CapDrop": spec.cap_drop or None,
        "CgroupnsMode": "host",
        "Dns": spec.dns,
        "DnsOptions": spec.dns_options,
        "DnsSearch": spec.dns_search,
        "ExtraHosts": spec.extra_hosts or None,
        "GroupAdd": spec.group_add or None,
        "IpcMode": spec.ipc_mode or "private",
        "OomScoreAdj": limits.oom_score_adj,
        "PidMode": spec.pid_mode,
        "Privileged": spec.privileged,
        "PublishAllPorts": spec.publish_all_ports,
        "ReadonlyRootfs": spec.read_only_rootfs,
        "SecurityOpt": ["no-new-privileges"] if spec.no_new_privileges else None,
        "Sysctls": spec.sysctls or None,
        "UTSMode": spec.uts_mode,
        "ShmSize": spec.shm_size_bytes or 64 << 20,
        "Runtime": container.runtime or spec.runtime,
        "Isolation": "",
        "Init": spec.init,
        "CgroupParent": spec.cgroup_parent,
        "Memory": limits.memory_bytes,
        "MemoryReservation": limits.memory_reservation_bytes,
        "MemorySwap": limits.memory_swap_bytes or 2 * limits.memory_bytes,
        "NanoCpus": limits.nano_cpus,
        "CpuShares": limits.cpu_shares,
        "CpuPeriod": limits.cpu_period_us,
        "CpuQuota": limits.cpu_quota_us,
        "CpusetCpus": limits.cpuset_cpus,
        "CpusetMems": limits.cpuset_mems,
        "PidsLimit": limits.pids_limit or None,
        "Devices": list(spec.devices),
        "Ulimits": [{"Name": limit.name, "Soft": limit.soft, "Hard": limit.hard} for limit in spec.ulimits] or None,
        "Annotations": spec.annotations or None,
    }


def _graph(container: Container) -> dict[str, str]:
    data: dict[str, str] = {}
    names = {"lowerdir": "LowerDir", "upperdir": "UpperDir", "workdir": "WorkDir"}
    for mount in container.rootfs_mounts:
        for option in mount.options:
            key, separator, value = option.partition("=")
            if separator and key in names:
                data[names[key]] = value
    if container.writable_path:
        data.setdefault("UpperDir", container.writable_path)
    return data


def _bindings(ports: list[PortMapping], *, skip_host: bool) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for port in ports:
        host_port = str(port.host_port) if port.host_port else ""
        found.setdefault(f"{port.container_port}/{port.protocol}", []).append(
            {"HostIp": port.host_ip or ("0.0.0.0" if skip_host else ""), "HostPort": host_port}
        )
    return found


def _network(container: Container) -> dict[str, Any]:
    sandbox = container.sandbox
    ports: dict[str, Any] = {}
    networks: dict[str, Any] = {}
    first: dict[str, Any] = {"IPAddress": "", "IPPrefixLen": 0, "Gateway": "", "MacAddress": "", "EndpointID": ""}
    if sandbox:
        ports = dict.fromkeys(container.exposed_ports) | _bindings(sandbox.ports, skip_host=True)
        for endpoint in sandbox.endpoints:
            entry = {
                "IPAMConfig": {"IPv4Address": container.spec.ipv4_address} if container.spec.ipv4_address else None,
                "Links": None,
                "Aliases": None,
                "NetworkID": endpoint.network_id,
                "EndpointID": endpoint.endpoint_id,
                "Gateway": endpoint.gateway,
                "IPAddress": endpoint.ipv4_address,
                "IPPrefixLen": endpoint.prefix_length,
                "IPv6Gateway": "",
                "GlobalIPv6Address": "",
                "GlobalIPv6PrefixLen": 0,
                "MacAddress": endpoint.mac_address,
                "DriverOpts": None,
            }
            networks[endpoint.network] = entry
        if networks:
            chosen = next(iter(networks.values()))
            first = {key: chosen[key] for key in first}
    if not networks:
        name = container.spec.network or "bridge"
        networks[name] = {"NetworkID": "", "EndpointID": "", "Gateway": "", "IPAddress": "", "IPPrefixLen": 0, "MacAddress": ""}
    return {
        "Bridge": "",
        "SandboxID": container.id if sandbox else "",
        "SandboxKey": sandbox.netns_path if sandbox else "",
        "Ports": ports,
        "GlobalIPv6Address": "",
        "GlobalIPv6PrefixLen": 0,
        "IPv6Gateway": "",
        **first,
        "Networks": networks,
    }

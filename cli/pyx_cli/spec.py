"""The flags of ``run`` and ``create`` → contract ContainerSpec's fields.

Only what was given is sent: the rest is the contract's default.
"""

from __future__ import annotations

from . import mounts, ports, values
from .grammar import CliError, Options

_TEXTS = {
    "name": "name", "user": "user", "workdir": "working_dir", "hostname": "hostname", "domainname": "domainname",
    "stop-signal": "stop_signal", "ip": "ipv4_address", "mac-address": "mac_address", "pid": "pid_mode", "ipc": "ipc_mode",
    "uts": "uts_mode", "cgroup-parent": "cgroup_parent", "log-driver": "log_driver", "runtime": "runtime", "platform": "platform",
    "network": "network", "net": "network",
}  # fmt: skip
_BOOLS = {
    "tty": "tty", "interactive": "open_stdin", "rm": "auto_remove", "read-only": "read_only_rootfs", "privileged": "privileged",
    "init": "init", "publish-all": "publish_all_ports",
}  # fmt: skip
_LISTS = {
    "group-add": "group_add", "cap-add": "cap_add", "cap-drop": "cap_drop", "dns": "dns", "dns-search": "dns_search",
    "dns-option": "dns_options",
}  # fmt: skip
_NUMBERS = {
    "cpu-shares": "cpu_shares", "cpu-period": "cpu_period_us", "cpu-quota": "cpu_quota_us", "pids-limit": "pids_limit",
    "oom-score-adj": "oom_score_adj",
}  # fmt: skip


def container_spec(options: Options, host_env: dict[str, str], cwd: str) -> dict[str, object]:
    """Raises CliError (status 125) on what can't be right whatever the engine's state."""
    image, *command = options.args
    spec: dict[str, object] = {"image": image}
    if command:
        spec["command"] = command
    if options.given("entrypoint"):
        entrypoint = options.text("entrypoint")
        spec["entrypoint"] = [entrypoint] if entrypoint else []
        # An entrypoint of one's own drops the image's command too.
        spec["command"] = command
    for flag, field in _TEXTS.items():
        if options.given(flag):
            spec[field] = options.text(flag)
    for flag, field in _BOOLS.items():
        if options.flag(flag):
            spec[field] = True
    for flag, field in _LISTS.items():
        if options.given(flag):
            spec[field] = options.list(flag)
    env = values.environment(options.list("env"), options.list("env-file"), host_env)
    if env:
        spec["env"] = env
    if options.given("label") or options.given("label-file"):
        spec["labels"] = values.labels(options.list("label"), options.list("label-file"))
    if options.given("annotation"):
        spec["annotations"] = values.options_map(options.list("annotation"), "--annotation")
    if options.given("sysctl"):
        spec["sysctls"] = values.options_map(options.list("sysctl"), "--sysctl")
    if options.given("log-opt"):
        spec["log_options"] = values.options_map(options.list("log-opt"), "--log-opt")
    if options.given("ulimit"):
        spec["ulimits"] = [values.ulimit(text) for text in options.list("ulimit")]
    if options.given("stop-timeout"):
        spec["stop_timeout_s"] = options.number("stop-timeout")
    if options.given("shm-size"):
        spec["shm_size_bytes"] = values.size_bytes(options.text("shm-size"), "--shm-size")
    if options.given("device"):
        spec["devices"] = [_device(text) for text in options.list("device")]
    if options.given("add-host"):
        spec["extra_hosts"] = [_host(text) for text in options.list("add-host")]
    if options.given("pull"):
        policy = options.text("pull")
        if policy not in ("always", "missing", "never"):
            raise CliError(f"invalid pull option: '{policy}': must be one of 'always', 'missing' or 'never'", 125)
        spec["pull_policy"] = policy
    _security(options, spec)
    _ports(options, spec)
    _mounts(options, spec, cwd)
    resources = limits(options)
    if resources:
        spec["resources"] = resources
    health = _health(options)
    if health:
        spec["healthcheck"] = health
    if options.given("health-action"):
        action = options.text("health-action")
        if action not in ("none", "restart", "stop"):
            raise CliError(f"invalid health action: '{action}': must be one of 'none', 'restart' or 'stop'", 125)
        spec["health_action"] = action
    return spec


def _device(text: str) -> str:
    parts = text.split(":")
    if not parts[0] or len(parts) > 3 or (len(parts) == 3 and not set("rwm").issuperset(parts[2])):
        raise CliError(f'invalid argument "{text}" for "--device" flag: bad format for path: {text}', 125)
    return text


def _host(text: str) -> str:
    separator = "=" if "=" in text else ":"
    name, _, address = text.partition(separator)
    address = address.strip("[]")
    if not name or not address:
        raise CliError(f'invalid argument "{text}" for "--add-host" flag: bad format for add-host: "{text}"', 125)
    if address != "host-gateway":
        import _socket

        try:
            _socket.inet_pton(_socket.AF_INET6 if ":" in address else _socket.AF_INET, address)
        except (OSError, UnicodeEncodeError):
            raise CliError(
                f'invalid argument "{text}" for "--add-host" flag: invalid IP address in add-host: "{address}"', 125
            ) from None
    return f"{name}:{address}"


def _security(options: Options, spec: dict[str, object]) -> None:
    for text in options.list("security-opt"):
        if text in ("no-new-privileges", "no-new-privileges:true", "no-new-privileges=true"):
            spec["no_new_privileges"] = True
        elif text in ("no-new-privileges:false", "no-new-privileges=false"):
            spec["no_new_privileges"] = False
        else:
            raise CliError(f'invalid --security-opt: "{text}"', 125, "no-new-privileges is the one there is")


def _ports(options: Options, spec: dict[str, object]) -> None:
    published = [mapping for text in options.list("publish") for mapping in ports.publish(text)]
    if published:
        spec["ports"] = published
    exposed = [port for text in options.list("expose") for port in ports.expose(text)]
    if exposed:
        spec["exposed_ports"] = exposed


def _mounts(options: Options, spec: dict[str, object], cwd: str) -> None:
    driver = options.text("volume-driver")
    requests = [mounts.volume(text, cwd, driver) for text in options.list("volume")]
    requests += [mounts.mount(text, cwd) for text in options.list("mount")]
    requests += [mounts.tmpfs(text) for text in options.list("tmpfs")]
    seen = set()
    for request in requests:
        if request["target"] in seen:
            raise CliError(f"duplicate mount point: {request['target']}", 125)
        seen.add(request["target"])
    if requests:
        spec["mounts"] = requests


def limits(options: Options) -> dict[str, object]:
    """The limits that were given."""
    given: dict[str, object] = {}
    for flag, field in (("memory", "memory_bytes"), ("memory-reservation", "memory_reservation_bytes")):
        if options.given(flag):
            given[field] = values.size_bytes(options.text(flag), "-m, --memory" if flag == "memory" else f"--{flag}")
    if options.given("memory-swap"):
        text = options.text("memory-swap")
        given["memory_swap_bytes"] = -1 if text == "-1" else values.size_bytes(text, "--memory-swap")
    if options.given("cpus"):
        if options.given("cpu-quota") or options.given("cpu-period"):
            raise CliError("conflicting options: --cpus and --cpu-quota or --cpu-period", 125)
        given["nano_cpus"] = values.nano_cpus(options.text("cpus"))
    for flag, field in _NUMBERS.items():
        if options.given(flag):
            given[field] = options.number(flag)
    for flag, field in (("cpuset-cpus", "cpuset_cpus"), ("cpuset-mems", "cpuset_mems")):
        if options.given(flag):
            given[field] = options.text(flag)
    score = options.number("oom-score-adj")
    if not -1000 <= score <= 1000:
        raise CliError(f"invalid value {score}, range for oom score adj is [-1000, 1000]", 125)
    return given


def _health(options: Options) -> dict[str, object]:
    given = [flag for flag in options.values if flag.startswith("health-")]
    if options.flag("no-healthcheck"):
        if given:
            raise CliError("--no-healthcheck conflicts with --health-* options", 125)
        return {"test": ["NONE"]}
    health: dict[str, object] = {}
    if options.text("health-cmd"):
        health["test"] = ["CMD-SHELL", options.text("health-cmd")]
    for flag in ("interval", "timeout", "start-period", "start-interval"):
        if options.given(f"health-{flag}"):
            value = values.duration_ns(options.text(f"health-{flag}"), f"--health-{flag}")
            if value < 0:
                raise CliError(f"--health-{flag} cannot be negative", 125)
            health[flag.replace("-", "_") + "_ns"] = value
    if options.given("health-retries"):
        if options.number("health-retries") < 0:
            raise CliError("--health-retries cannot be negative", 125)
        health["retries"] = options.number("health-retries")
    return health

"""The table of commands: what there is, under which names, with which flags. Data only; long because the command line is.

``COMMANDS`` maps a path (``container run``) to its command; ``ALIASES`` other paths to the same (``run``, ``container list``).
"""

from __future__ import annotations

from .grammar import Command, Flag

_NO_TRUNC = Flag("no-trunc", "", "bool", "Don't truncate output")
_FILTER = Flag("filter", "f", "list", "Filter output based on conditions provided", "filter")
_FORMAT = Flag("format", "", "string", "Format output: table, table TEMPLATE, json, or a Go template", "string")
_DETACH_KEYS = Flag("detach-keys", "", "string", "Key sequence for detaching a container", "string", "ctrl-p,ctrl-q")
_SIG_PROXY = Flag("sig-proxy", "", "bool", "Proxy received signals to the process", "", "true")
_SIGNAL = Flag("signal", "s", "string", "Signal to send to the container", "string")
_PLATFORM = Flag("platform", "", "string", "Platform, as os/arch[/variant]", "string")

_CREATE = (
    Flag("add-host", "", "list", "Add a custom host-to-IP mapping (host:ip)", "list"),
    Flag("annotation", "", "list", "Add an annotation to the container (passed to the OCI runtime)", "map"),
    Flag("attach", "a", "list", "Attach to STDIN, STDOUT or STDERR", "list"),
    Flag("cap-add", "", "list", "Add Linux capabilities", "list"),
    Flag("cap-drop", "", "list", "Drop Linux capabilities", "list"),
    Flag("cgroup-parent", "", "string", "Parent cgroup for the container"),
    Flag("cidfile", "", "string", "Write the container ID to the file"),
    Flag("cpu-period", "", "int", "Limit CPU CFS period, in microseconds"),
    Flag("cpu-quota", "", "int", "Limit CPU CFS quota, in microseconds"),
    Flag("cpu-shares", "c", "int", "CPU shares (relative weight)"),
    Flag("cpus", "", "string", "Number of CPUs", "decimal"),
    Flag("cpuset-cpus", "", "string", "CPUs in which to allow execution (0-3, 0,1)"),
    Flag("cpuset-mems", "", "string", "MEMs in which to allow execution (0-3, 0,1)"),
    Flag("device", "", "list", "Add a host device to the container", "list"),
    Flag("dns", "", "list", "Set custom DNS servers", "list"),
    Flag("dns-option", "", "list", "Set DNS options", "list"),
    Flag("dns-search", "", "list", "Set custom DNS search domains", "list"),
    Flag("domainname", "", "string", "Container NIS domain name"),
    Flag("entrypoint", "", "string", "Overwrite the default ENTRYPOINT of the image"),
    Flag("env", "e", "list", "Set environment variables", "list"),
    Flag("env-file", "", "list", "Read in a file of environment variables", "list"),
    Flag("expose", "", "list", "Expose a port or a range of ports", "list"),
    Flag("group-add", "", "list", "Add additional groups to join", "list"),
    Flag("health-action", "", "string", 'What to do when it turns unhealthy ("none", "restart", "stop")', "", "none"),
    Flag("health-cmd", "", "string", "Command to run to check health"),
    Flag("health-interval", "", "string", "Time between running the check (ms|s|m|h)", "duration"),
    Flag("health-retries", "", "int", "Consecutive failures needed to report unhealthy"),
    Flag("health-start-interval", "", "string", "Time between checks during the start period (ms|s|m|h)", "duration"),
    Flag("health-start-period", "", "string", "Start period before failures count (ms|s|m|h)", "duration"),
    Flag("health-timeout", "", "string", "Maximum time to allow one check to run (ms|s|m|h)", "duration"),
    Flag("help", "", "bool", "Print usage"),
    Flag("hostname", "h", "string", "Container host name"),
    Flag("init", "", "bool", "Run an init inside the container that forwards signals and reaps processes"),
    Flag("interactive", "i", "bool", "Keep STDIN open even if not attached"),
    Flag("ip", "", "string", "IPv4 address (e.g., 172.30.100.104)"),
    Flag("ipc", "", "string", "IPC mode to use"),
    Flag("label", "l", "list", "Set meta data on a container", "list"),
    Flag("label-file", "", "list", "Read in a line delimited file of labels", "list"),
    Flag("log-driver", "", "string", "Logging driver for the container"),
    Flag("log-opt", "", "list", "Log driver options", "list"),
    Flag("mac-address", "", "string", "Container MAC address (e.g., 92:d0:c6:0a:29:33)"),
    Flag("memory", "m", "string", "Memory limit", "bytes"),
    Flag("memory-reservation", "", "string", "Memory soft limit", "bytes"),
    Flag("memory-swap", "", "string", "Limit of memory plus swap; -1 for unlimited swap", "bytes"),
    Flag("mount", "", "list", "Attach a filesystem mount to the container", "mount"),
    Flag("name", "", "string", "Assign a name to the container"),
    Flag("net", "", "string", "Connect a container to a network", "network", hidden=True),
    Flag("network", "", "string", "Connect a container to a network", "network", "bridge"),
    Flag("no-healthcheck", "", "bool", "Disable any health check of the image"),
    Flag("oom-score-adj", "", "int", "Tune the host's OOM preferences (-1000 to 1000)"),
    Flag("pid", "", "string", "PID namespace to use"),
    Flag("pids-limit", "", "int", "Tune the container's pids limit (-1 for unlimited)"),
    Flag("platform", "", "string", "Set the platform of the image, as os/arch[/variant]"),
    Flag("privileged", "", "bool", "Give extended privileges to the container"),
    Flag("publish", "p", "list", "Publish a container's ports to the host", "list"),
    Flag("publish-all", "P", "bool", "Publish all exposed ports to random ports"),
    Flag("pull", "", "string", 'Pull the image before creating ("always", "missing", "never")', "string", "missing"),
    Flag("quiet", "q", "bool", "Suppress the pull output"),
    Flag("read-only", "", "bool", "Mount the container's root filesystem as read only"),
    Flag("rm", "", "bool", "Automatically remove the container when it exits"),
    Flag("runtime", "", "string", "OCI runtime to use for this container"),
    Flag("security-opt", "", "list", "Security options (no-new-privileges)", "list"),
    Flag("shm-size", "", "string", "Size of /dev/shm", "bytes"),
    Flag("stop-signal", "", "string", "Signal to stop the container"),
    Flag("stop-timeout", "", "int", "Timeout (in seconds) to stop the container"),
    Flag("sysctl", "", "list", "Sysctl options", "map"),
    Flag("tmpfs", "", "list", "Mount a tmpfs directory", "list"),
    Flag("tty", "t", "bool", "Allocate a pseudo-TTY"),
    Flag("ulimit", "", "list", "Ulimit options (name=soft[:hard])", "ulimit"),
    Flag("user", "u", "string", "User name or UID (format: <name|uid>[:<group|gid>])"),
    Flag("uts", "", "string", "UTS namespace to use"),
    Flag("volume", "v", "list", "Bind mount a volume", "list"),
    Flag("volume-driver", "", "string", "Optional volume driver for the container"),
    Flag("workdir", "w", "string", "Working directory inside the container"),
)
_RUN = (
    *_CREATE,
    Flag("detach", "d", "bool", "Run container in background and print container ID"),
    _DETACH_KEYS,
    _SIG_PROXY,
)
_PS = (
    Flag("all", "a", "bool", "Show all containers (default shows just running)"),
    _FILTER,
    _FORMAT,
    Flag("last", "n", "int", "Show n last created containers (includes all states)", "int", "-1"),
    Flag("latest", "l", "bool", "Show the latest created container (includes all states)"),
    _NO_TRUNC,
    Flag("quiet", "q", "bool", "Only display container IDs"),
)
_STOP = (
    _SIGNAL,
    Flag("time", "t", "int", "Seconds to wait before killing the container (-1: for ever)"),
    Flag("timeout", "", "int", "Seconds to wait before killing the container (-1: for ever)", hidden=True),
)
_INSPECT = (Flag("format", "f", "string", "Format output using a Go template, or json"),)
_STACK = (
    Flag("root", "", "string", "Directory of the stack's data (default $PYX_ROOT, else /var/lib/pyx)", "dir"),
    Flag("run", "", "string", "Directory of the stack's sockets (default $PYX_RUN, else /run/pyx)", "dir"),
)
_LABEL = Flag("label", "", "list", "Set metadata for a volume", "list")

COMMANDS = {
    command.path: command
    for command in (
        Command("container attach", "run:attach", "CONTAINER",
                "Attach local standard input, output, and error streams to a running container",
                (_DETACH_KEYS, Flag("no-stdin", "", "bool", "Do not attach STDIN"), _SIG_PROXY), minimum=1, maximum=1),
        Command("container commit", "commit:commit", "CONTAINER [REPOSITORY[:TAG]]", "Create a new image from a container's changes", (
            Flag("author", "a", "string", "Author (e.g., \"John Hannibal Smith <hannibal@a-team.com>\")"),
            Flag("change", "c", "list", "Apply Dockerfile instruction to the created image", "list"),
            Flag("message", "m", "string", "Commit message"),
            Flag("pause", "p", "bool", "Pause container during commit", "", "true"),
        ), minimum=1, maximum=2),
        Command("container cp", "copy:cp", "CONTAINER:SRC_PATH DEST_PATH|- | SRC_PATH|- CONTAINER:DEST_PATH",
                "Copy files/folders between a container and the local filesystem", (
            Flag("archive", "a", "bool", "Archive mode (copy all uid/gid information)"),
            Flag("follow-link", "L", "bool", "Always follow symbol link in SRC_PATH"),
            Flag("quiet", "q", "bool", "Suppress the report of what was copied"),
        ), minimum=2, maximum=2),
        Command("container create", "run:create", "IMAGE [COMMAND] [ARG...]", "Create a new container", _CREATE,
                minimum=1, interspersed=False),
        Command("container diff", "commit:diff", "CONTAINER",
                "Inspect changes to files or directories on a container's filesystem", minimum=1, maximum=1),
        Command("container exec", "run:exec_", "CONTAINER COMMAND [ARG...]", "Execute a command in a running container", (
            Flag("detach", "d", "bool", "Run command in the background"),
            _DETACH_KEYS,
            Flag("env", "e", "list", "Set environment variables", "list"),
            Flag("env-file", "", "list", "Read in a file of environment variables", "list"),
            Flag("interactive", "i", "bool", "Keep STDIN open even if not attached"),
            Flag("privileged", "", "bool", "Give extended privileges to the command"),
            Flag("tty", "t", "bool", "Allocate a pseudo-TTY"),
            Flag("user", "u", "string", "User name or UID (format: <name|uid>[:<group|gid>])"),
            Flag("workdir", "w", "string", "Working directory inside the container"),
        ), minimum=2, interspersed=False),
        Command("container export", "copy:export", "CONTAINER", "Export a container's filesystem as a tar archive", (
            Flag("output", "o", "string", "Write to a file, instead of STDOUT"),
        ), minimum=1, maximum=1),
        Command("container inspect", "inspect:containers", "CONTAINER [CONTAINER...]",
                "Display detailed information on one or more containers",
                _INSPECT, minimum=1),
        Command("container kill", "life:kill", "CONTAINER [CONTAINER...]", "Kill one or more running containers",
                (Flag("signal", "s", "string", "Signal to send to the container", "string", "KILL"),), minimum=1),
        Command("container logs", "logs:logs", "CONTAINER", "Fetch the logs of a container", (
            Flag("details", "", "bool", "Show extra details provided to logs"),
            Flag("follow", "f", "bool", "Follow log output"),
            Flag("since", "", "string", "Show logs since timestamp (2013-01-02T13:23:37Z) or relative (42m)"),
            Flag("tail", "n", "string", "Number of lines to show from the end of the logs", "string", "all"),
            Flag("timestamps", "t", "bool", "Show timestamps"),
            Flag("until", "", "string", "Show logs before a timestamp (2013-01-02T13:23:37Z) or relative (42m)"),
        ), minimum=1, maximum=1),
        Command("container ls", "ps:ps", "", "List containers", _PS, maximum=0),
        Command("container pause", "life:pause", "CONTAINER [CONTAINER...]", "Pause all processes within one or more containers",
                minimum=1),
        Command("container port", "ps:port", "CONTAINER [PRIVATE_PORT[/PROTO]]", "List port mappings of a container",
                minimum=1, maximum=2),
        Command("container rename", "life:rename", "CONTAINER NEW_NAME", "Rename a container", minimum=2, maximum=2),
        Command("container restart", "life:restart", "CONTAINER [CONTAINER...]", "Restart one or more containers", _STOP, minimum=1),
        Command("container rm", "life:remove", "CONTAINER [CONTAINER...]", "Remove one or more containers", (
            Flag("force", "f", "bool", "Force the removal of a running container (uses SIGKILL)"),
            Flag("volumes", "v", "bool", "Remove anonymous volumes associated with the container"),
        ), minimum=1),
        Command("container run", "run:run", "IMAGE [COMMAND] [ARG...]", "Create and run a new container from an image", _RUN,
                minimum=1, interspersed=False, status=125),
        Command("container start", "run:start", "CONTAINER [CONTAINER...]", "Start one or more stopped containers", (
            Flag("attach", "a", "bool", "Attach STDOUT/STDERR and forward signals"),
            _DETACH_KEYS,
            Flag("interactive", "i", "bool", "Attach container's STDIN"),
            _SIG_PROXY,
        ), minimum=1),
        Command("container stop", "life:stop", "CONTAINER [CONTAINER...]", "Stop one or more running containers", _STOP, minimum=1),
        Command("container top", "look:top", "CONTAINER [ps OPTIONS]", "Display the running processes of a container",
                minimum=1, interspersed=False),
        Command("container unpause", "life:unpause", "CONTAINER [CONTAINER...]",
                "Unpause all processes within one or more containers", minimum=1),
        Command("container update", "life:update", "CONTAINER [CONTAINER...]", "Update the limits of one or more containers", tuple(
            flag for flag in _CREATE if flag.long in (
                "cpu-period", "cpu-quota", "cpu-shares", "cpus", "cpuset-cpus", "cpuset-mems", "memory", "memory-reservation",
                "memory-swap", "pids-limit",
            )
        ), minimum=1),
        Command("container wait", "life:wait", "CONTAINER [CONTAINER...]",
                "Block until one or more containers stop, then print their exit codes",
                (Flag("condition", "", "string", "not-running, next-exit or removed", "string", "not-running"),), minimum=1),
        Command("image import", "images:import_", "file|- [REPOSITORY[:TAG]]",
                "Import the contents from a tarball to create a filesystem image", (
            Flag("change", "c", "list", "Apply Dockerfile instruction to the created image", "list"),
            Flag("message", "m", "string", "Set commit message for imported image"),
            _PLATFORM,
        ), minimum=1, maximum=2),
        Command("image inspect", "inspect:images", "IMAGE [IMAGE...]", "Display detailed information on one or more images",
                (*_INSPECT, _PLATFORM), minimum=1),
        Command("image load", "images:load", "", "Load an image from a tar archive or STDIN", (
            Flag("input", "i", "string", "Read from tar archive file, instead of STDIN"),
            _PLATFORM,
            Flag("quiet", "q", "bool", "Suppress the load output"),
        ), maximum=0),
        Command("image ls", "images:ls", "[REPOSITORY[:TAG]]", "List images", (
            Flag("all", "a", "bool", "Show all images (default hides intermediate images)"),
            Flag("digests", "", "bool", "Show digests"),
            _FILTER, _FORMAT, _NO_TRUNC,
            Flag("quiet", "q", "bool", "Only show image IDs"),
        ), maximum=1),
        Command("image pull", "images:pull", "NAME[:TAG|@DIGEST]", "Download an image from a registry", (
            _PLATFORM, Flag("quiet", "q", "bool", "Suppress verbose output"),
        ), minimum=1, maximum=1),
        Command("image rm", "images:remove", "IMAGE [IMAGE...]", "Remove one or more images", (
            Flag("force", "f", "bool", "Force removal of the image"),
        ), minimum=1),
        Command("image tag", "images:tag", "SOURCE_IMAGE[:TAG] TARGET_IMAGE[:TAG]",
                "Create a tag TARGET_IMAGE that refers to SOURCE_IMAGE", minimum=2, maximum=2),
        Command("network inspect", "inspect:networks", "NETWORK [NETWORK...]",
                "Display detailed information on one or more networks", _INSPECT, minimum=1),
        Command("network ls", "networks:ls", "", "List networks",
                (_FILTER, _FORMAT, _NO_TRUNC, Flag("quiet", "q", "bool", "Only display network IDs")), maximum=0),
        Command("volume create", "volumes:create", "[VOLUME]", "Create a volume", (
            Flag("driver", "d", "string", "Specify volume driver name", "string", "local"),
            _LABEL,
            Flag("name", "", "string", "Volume name", hidden=True),
            Flag("opt", "o", "list", "Set driver specific options", "map"),
        ), maximum=1),
        Command("volume inspect", "inspect:volumes", "VOLUME [VOLUME...]",
                "Display detailed information on one or more volumes", _INSPECT, minimum=1),
        Command("volume ls", "volumes:ls", "", "List volumes",
                (_FILTER, _FORMAT, Flag("quiet", "q", "bool", "Only display volume names")), maximum=0),
        Command("volume rm", "volumes:remove", "VOLUME [VOLUME...]", "Remove one or more volumes",
                (Flag("force", "f", "bool", "Don't complain about volumes that don't exist"),), minimum=1),
        Command("system up", "system:up", "", "Start the stack: every service under one supervisor", (
            Flag("detach", "d", "bool", "Return when every service is ready, leaving the stack in the background"),
            *_STACK,
            Flag("timeout", "", "string", "How long to wait for the services with --detach", "duration", "30s"),
        ), maximum=0),
        Command("system down", "system:down", "", "Stop the stack; containers go on running", (
            *_STACK, Flag("stop-containers", "", "bool", "Stop every running container first"),
        ), maximum=0),
        Command("system events", "events:events", "", "Get real time events from the services", (
            _FILTER, Flag("format", "", "string", "Format output: json, or a Go template", "string"),
            Flag("since", "", "string", "Show all events created since timestamp, offset:NUMBER[@JOURNAL] or beginning"),
            Flag("until", "", "string", "Stream events until this timestamp"),
            Flag("json", "", "bool", "Everything about each event, and about lost ones, as a line of JSON"),
            Flag("durable", "", "string", "Go on where the last command with this name stopped"),
        ), maximum=0),
        Command("system bus", "bus:bus", "", "Display how the bus fares: calls, events, the journal, durable subscriptions", (
            Flag("format", "f", "string", "Format output using a Go template, or json"),
        ), maximum=0),
        Command("system forget", "bus:forget", "NAME [NAME...]", "Remove durable subscriptions", (), minimum=1),
        Command("system info", "system:info", "", "Display system-wide information", (
            Flag("format", "f", "string", "Format output using a Go template, or json"),
        ), maximum=0),
        Command("inspect", "inspect:any_", "NAME|ID [NAME|ID...]", "Return low-level information on objects", (
            *_INSPECT,
            Flag("type", "", "string", "Only look up objects of this type: container, image, network, volume"),
        ), minimum=1),
        Command("version", "system:version", "", "Show the version information", (
            Flag("format", "f", "string", "Format output using a Go template, or json"),
        ), maximum=0),
    )
}  # fmt: skip

ALIASES = {
    "container list": "container ls", "container ps": "container ls", "ps": "container ls",
    "container remove": "container rm", "image list": "image ls", "images": "image ls", "image remove": "image rm", "rmi": "image rm",
    "import": "image import", "load": "image load", "pull": "image pull", "tag": "image tag",
    "network list": "network ls", "volume list": "volume ls", "volume remove": "volume rm",
    "events": "system events", "info": "system info",
}  # fmt: skip
ALIASES.update(
    (name, f"container {name}")
    for name in (
        "attach", "commit", "cp", "create", "diff", "exec", "export", "kill", "logs", "pause", "port", "rename", "restart", "rm", "run",
        "start", "stop", "top", "unpause", "update", "wait",
    )
)  # fmt: skip

GROUPS = {
    "container": "Manage containers",
    "image": "Manage images",
    "network": "Manage networks",
    "system": "Manage the stack",
    "volume": "Manage volumes",
}

COMMON = ("run", "exec", "ps", "pull", "images", "logs", "events", "info", "version")

GLOBAL = (
    Flag("bus", "", "string", "Socket of the bus (default $PYX_BUS, else bus.sock in $PYX_RUN, else /run/pyx/bus.sock)", "path"),
    Flag("debug", "D", "bool", "Say more about errors"),
    Flag("host", "H", "string", "The same as --bus; unix:// may precede the path", "path"),
    Flag("root", "", "string", "Directory of the stack's data (default $PYX_ROOT, else /var/lib/pyx)", "dir"),
    Flag("run", "", "string", "Directory of the stack's sockets (default $PYX_RUN, else /run/pyx)", "dir"),
    Flag("version", "v", "bool", "Print version information and quit"),
)

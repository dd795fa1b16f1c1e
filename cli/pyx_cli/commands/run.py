"""run, create, start, attach and exec: what has a process's input and output."""

from __future__ import annotations

import os
import sys

from ..client import connect, document, mapping, text, texts, warn
from ..demux import Demux
from ..foreground import Foreground, connection_size, flush_python_streams, output_pipe
from ..grammar import CliError, Options
from ..terminal import is_terminal, parse_keys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyx_bus.sync import Connection


def _spec(options: Options, detach: bool) -> dict[str, object]:
    from ..spec import container_spec

    spec = container_spec(options, dict(os.environ), os.getcwd() if _needs_cwd(options) else "/")
    if options.flag("interactive"):
        # Docker's rule: input that is attached ends with its one client; a detached container's stays open for the next.
        spec["stdin_once"] = not detach
    return spec


def _needs_cwd(options: Options) -> bool:
    return options.given("volume") or options.given("mount")


def _detach_keys(options: Options) -> bytes:
    return parse_keys(options.text("detach-keys", "ctrl-p,ctrl-q"))


def _streams(options: Options) -> tuple[bool, bool, bool]:
    """(stdin, stdout, stderr) to attach: what ``-a`` names, else all, stdin only with ``-i``."""
    names = [name.lower() for name in options.list("attach")]
    for name in names:
        if name not in ("stdin", "stdout", "stderr"):
            raise CliError(
                f'invalid argument "{name}" for "-a, --attach" flag: valid streams are STDIN, STDOUT and STDERR', 125
            )
    if not names:
        return options.flag("interactive"), True, True
    return "stdin" in names and options.flag("interactive"), "stdout" in names, "stderr" in names


def _need_terminal(tty: bool, stdin: bool, status: int) -> None:
    if tty and stdin and not is_terminal(0):
        raise CliError("the input device is not a TTY", status)


class _CidFile:
    """``--cidfile``: refused if it's there, written as soon as the ID is known."""

    def __init__(self, path: str) -> None:
        self._path = path
        if path and os.path.lexists(path):
            raise CliError(f'container ID file found, make sure the other container isn\'t running or delete "{path}"', 125)

    def write(self, container: str) -> None:
        if self._path:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                os.write(fd, container.encode())
            finally:
                os.close(fd)


class _Items:
    """What comes before the start: pull progress, the ID, warnings."""

    def __init__(self, options: Options, cidfile: _CidFile) -> None:
        self.container = ""
        self._cidfile = cidfile
        self._progress: object = None
        self._quiet = options.flag("quiet")

    def __call__(self, body: dict[str, object]) -> None:
        phase = body.get("phase")
        if phase == "created":
            if not self.container:
                self.container = text(body, "id")
                self._cidfile.write(self.container)
            for warning in texts(body, "warnings"):
                warn(warning)
        elif phase == "pull":
            from ..progress import Progress

            if self._progress is None:
                self._progress = Progress(2, self._quiet)
            assert isinstance(self._progress, Progress)
            self._progress.item(body)


def _follow(connection: Connection, serial: int, items: _Items) -> dict[str, object]:
    """A call without any streams: its items, then its result. Ctrl-c while it pulls cancels the call."""
    while True:
        message = connection.receive()
        assert message is not None
        if message.serial != serial:
            continue
        if message.kind == "item":
            for fd in message.fds:
                os.close(fd)
            items(message.body)
        elif message.kind == "result":
            return message.body
        elif message.kind == "error":
            raise message.error()


def create(options: Options) -> int:
    try:
        spec = _spec(options, False)
        cidfile = _CidFile(options.text("cidfile"))
        connection = connect(options)
    except CliError as error:
        error.status = 1 if error.status == 125 and "cannot connect" in error.message else error.status
        raise
    items = _Items(options, cidfile)
    result = _follow(connection, connection.open("containerd.create", {"spec": spec}), items)
    if not items.container:
        items({"phase": "created", "id": text(result, "id")})
    for warning in texts(result, "warnings"):
        warn(warning)
    print(text(result, "id"))
    return 0


def run(options: Options) -> int:
    detach, tty = options.flag("detach"), options.flag("tty")
    if detach and options.given("attach"):
        raise CliError("conflicting options: -a and -d", 125)
    spec = _spec(options, detach)
    cidfile = _CidFile(options.text("cidfile"))
    items = _Items(options, cidfile)
    if detach:
        connection = connect(options)
        body: dict[str, object] = {"spec": spec, "detach": True}
        if tty:
            body["attach"] = dict(zip(("rows", "columns"), connection_size(), strict=True))
        try:
            result = _follow(connection, connection.open("containerd.run", body), items)
        except Exception:
            if items.container and not options.flag("rm"):
                print(items.container)
            raise
        print(items.container or text(result, "id"))
        return 0
    stdin, stdout, stderr = _streams(options)
    _need_terminal(tty, stdin, 1)
    session = Foreground(
        lambda: connect(options), tty=tty, stdin=stdin, proxy=options.flag("sig-proxy", True),
        detach_keys=_detach_keys(options), on_item=items,
    )  # fmt: skip
    return _attached(session, "containerd.run", {"spec": spec}, tty, stdin, stdout, stderr)


def _attached(
    session: Foreground, method: str, body: dict[str, object], tty: bool, stdin: bool, stdout: bool, stderr: bool
) -> int:
    """Make the call with a pipe for the output and see it through; detaching is a success."""
    attach: dict[str, object] = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
    fds = []
    if stdout or stderr:
        read, write = output_pipe()
        session.add_output(read, 1 if tty else Demux())
        attach["output"] = True
        fds.append(write)
    if tty:
        attach["rows"], attach["columns"] = connection_size()
    flush_python_streams()
    code = session.run(method, {**body, "attach": attach}, fds)
    return 0 if code is None else code


def _container(options: Options, name: str) -> dict[str, object]:
    connection = connect(options)
    try:
        return document(connection.call("containerd.inspect", {"container": name}))
    finally:
        connection.close()


def start(options: Options) -> int:
    if not (options.flag("attach") or options.flag("interactive")):
        from ..client import each

        connection = connect(options)

        def one(name: str) -> None:
            connection.call("containerd.start", {"container": name})

        return each(options, one, options.args)
    if len(options.args) > 1:
        raise CliError("you cannot start and attach multiple containers at once", 1)
    return _attach_to(options, "containerd.start", {"wait": True}, options.flag("interactive"))


def attach(options: Options) -> int:
    return _attach_to(options, "containerd.attach", {}, not options.flag("no-stdin"))


def _attach_to(options: Options, method: str, more: dict[str, object], want_stdin: bool) -> int:
    found = _container(options, options.args[0])
    config = mapping(found, "Config")
    tty = bool(config.get("Tty"))
    stdin = want_stdin and bool(config.get("OpenStdin"))
    if tty and stdin and not is_terminal(0):
        if method == "containerd.attach":
            raise CliError("the input device is not a TTY", 1)
        raise CliError("cannot attach stdin to a TTY-enabled container because stdin is not a terminal", 1)
    container = text(found, "Id")
    session = Foreground(
        lambda: connect(options), tty=tty, stdin=stdin, proxy=options.flag("sig-proxy", True),
        detach_keys=_detach_keys(options), container=container, redraw=method == "containerd.attach",
    )  # fmt: skip
    return _attached(session, method, {"container": container, **more}, tty, stdin, True, True)


def exec_(options: Options) -> int:
    from ..values import environment

    container, *args = options.args
    tty, stdin, detach = options.flag("tty"), options.flag("interactive"), options.flag("detach")
    body: dict[str, object] = {"container": container, "args": args}
    env = environment(options.list("env"), options.list("env-file"), dict(os.environ))
    if env:
        body["env"] = env
    for flag, field in (("user", "user"), ("workdir", "working_dir")):
        if options.given(flag):
            body[field] = options.text(flag)
    if options.flag("privileged"):
        body["privileged"] = True
    if tty:
        body["tty"] = True
        body["rows"], body["columns"] = connection_size()
    try:
        if detach:
            connect(options).call("containerd.exec", {**body, "detach": True})
            return 0
        _need_terminal(tty, stdin, 1)
        session = Foreground(
            lambda: connect(options), tty=tty, stdin=stdin, detach_keys=_detach_keys(options), container=container, is_exec=True
        )
        fds = []
        if tty:
            body["stdin"] = stdin
        else:
            if stdin:
                read, write = os.pipe2(os.O_CLOEXEC)
                session.set_input(write)
                fds.append(read)
                body["stdin"] = True
            for target, field in ((1, "stdout"), (2, "stderr")):
                read, write = output_pipe()
                session.add_output(read, target)
                fds.append(write)
                body[field] = True
        flush_python_streams()
        code = session.run("containerd.exec", body, fds)
        return 0 if code is None else code
    except Exception as error:
        # Docker's exec fails with 1, but with 126 or 127 if the command couldn't be executed.
        details = getattr(error, "details", None)
        if isinstance(details, dict) and str(details.get("exit_code", "")) in ("126", "127"):
            from ..client import error_line

            sys.stderr.write(error_line(error))  # type: ignore[arg-type]
            return int(details["exit_code"])
        raise

"""containerd on a real broker with a real runtime, shim and logd; imaged, netd and volumed are recording holders."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import termios
from pathlib import Path

import pytest
import trio
import trio.testing
from tests.containerd_stack import leftovers, output_of, serve_containerd, stack, wait_nothing_left

import pyx_logd.__main__
from pyx_bus import errors, testing
from pyx_bus.contract import containerd as c
from pyx_bus.contract import logd, volumed
from pyx_bus.contract.base import Empty
from pyx_containerd import kernel, start
from pyx_containerd import shim as wire
from pyx_containerd.shims import Shim
from pyx_containerd.store import Store

OUTPUT = c.AttachOptions(output=True)


def spec(*command, **fields):
    return c.ContainerSpec(image="busybox", command=list(command), **fields)


@pytest.fixture
async def s(tmp_path):
    async with stack(tmp_path) as running:
        try:
            yield running
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(20):
                await running.bus.call(c.INFO, Empty())  # the container that tries the runtimes is gone when this is answered
                listed = await running.bus.call(c.LIST, c.ListContainers(all=True))
                for row in listed.containers:
                    with contextlib.suppress(errors.BusError):
                        await running.bus.call(c.REMOVE, c.RemoveContainer(container=row.id, force=True, volumes=True))
                await wait_nothing_left(tmp_path, running.context.prefix)
            assert running.holders.empty


async def run(s, *command, attach=OUTPUT, auto_remove=True, **fields):
    """(exit status, output) of a foreground run."""
    reader, writer = os.pipe()
    try:
        request = c.RunContainer(spec=spec(*command, auto_remove=auto_remove, **fields), attach=attach)
        async with s.bus.stream(c.RUN, request, fds=[writer], timeout_s=30) as stream:
            os.close(writer)
            writer = -1
            status = await stream.result()
        return status, await trio.to_thread.run_sync(output_of, reader)
    except BaseException:
        os.close(reader)
        raise
    finally:
        if writer >= 0:
            os.close(writer)


async def run_detached(s, *command, **fields):
    status = await s.bus.call(c.RUN, c.RunContainer(spec=spec(*command, **fields), detach=True), timeout_s=30)
    return status.id


async def inspect(s, reference):
    return (await s.bus.call(c.INSPECT, c.ContainerRef(container=reference))).document


async def exec_(s, container, *args, **fields):
    reader, writer = os.pipe()
    request = c.ExecContainer(container=container, args=list(args), stdout=True, **fields)
    try:
        status = await s.bus.call(c.EXEC, request, fds=[writer], timeout_s=30)
    finally:
        os.close(writer)
    with open(reader, "rb") as file:
        return status, await trio.to_thread.run_sync(file.read)


async def test_output_exit_code_and_nothing_left(s):
    status, output = await run(s, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert status.exit_code == 7
    assert sorted(output.split()) == [b"err", b"out"]
    await wait_nothing_left(s.directory, s.context.prefix)
    assert s.holders.empty
    assert (await s.bus.call(c.LIST, c.ListContainers(all=True))).containers == []


async def test_the_name_is_free_when_run_has_replied(s):
    for _ in range(5):
        await run(s, "true", name="again")
        assert s.holders.empty  # so are its ports, volumes and image


async def test_a_signal_gives_128_and_more(s):
    status, _ = await run(s, "sh", "-c", "kill -9 $$; sleep 1")
    # an init ignores signals it has no handler for, even KILL when it's its own: so the shell goes on
    assert status.exit_code in (0, 137)
    id_ = await run_detached(s, "sleep", "100")
    await s.bus.call(c.KILL, c.KillContainer(container=id_))
    status = await s.bus.call(c.WAIT, c.WaitContainer(container=id_))
    assert status.exit_code == 137
    assert (await inspect(s, id_))["State"]["ExitCode"] == 137


async def test_environment_user_directory_and_files(s):
    script = "id -u; id -g; pwd; echo $HOME $FOO; hostname; cat /etc/resolv.conf; grep b.test /etc/hosts; touch /x 2>&1"
    _, output = await run(
        s, "sh", "-c", script, user="www-data", working_dir="/made/here", env=["FOO=bar"], hostname="box", extra_hosts=["b.test:1.2.3.4"]
    )
    lines = output.decode().splitlines()
    assert len(lines) == 8, output
    assert lines[:5] == ["33", "33", "/made/here", "/var/www bar", "box"]
    assert lines[5] == "nameserver 192.0.2.53"
    assert lines[6].split() == ["1.2.3.4", "b.test"]
    assert "Permission denied" in lines[7]


async def test_limits_reach_the_kernel(s):
    limits = c.Resources(memory_bytes=64 << 20, pids_limit=17)
    v1 = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/pids/pids.max"
    script = f"{v1} 2>/dev/null || cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max; ulimit -n"
    _, output = await run(s, "sh", "-c", script, resources=limits, ulimits=[c.Ulimit(name="nofile", soft=99, hard=99)])
    assert output.split() == [str(64 << 20).encode(), b"17", b"99"]


async def test_privileged_and_shared_namespaces(s):
    script = "mkdir /m && mount -t tmpfs x /m && echo mounted; ls /dev | grep -c ."
    _, output = await run(s, "sh", "-c", script, privileged=True)
    assert output.startswith(b"mounted\n")
    await run_detached(s, "sh", "-c", "echo shared > /dev/shm/x; sleep 100", name="peer", ipc_mode="shareable")
    with trio.fail_after(5):
        while (await exec_(s, "peer", "cat", "/dev/shm/x"))[1] != b"shared\n":
            await trio.sleep(0.01)
    join = {"network": "container:peer", "pid_mode": "container:peer", "ipc_mode": "container:peer"}
    _, output = await run(s, "sh", "-c", "cat /dev/shm/x; ps | grep -c [s]leep", **join)
    assert output == b"shared\n1\n"
    await run_detached(s, "sleep", "100", name="private")
    with pytest.raises(errors.FailedPrecondition, match="share"):
        await run(s, "true", ipc_mode="container:private")
    _, output = await run(s, "sh", "-c", "echo $$; readlink /proc/self/ns/uts", pid_mode="host", uts_mode="host", ipc_mode="host")
    pid, uts = output.split()
    assert int(pid) > 1
    assert uts.decode() == os.readlink("/proc/self/ns/uts")


async def test_out_of_memory_is_noted(s):
    limits = c.Resources(memory_bytes=16 << 20, memory_swap_bytes=16 << 20)
    status, _ = await run(s, "sh", "-c", "x=x; while :; do x=$x$x$x$x; done", resources=limits)
    assert status.exit_code == 137
    assert status.oom_killed


@pytest.mark.parametrize(
    ("command", "code"), [("nope", "127"), ("/nope", "127"), ("/etc/passwd", "126"), ("/etc", "126")]
)
async def test_what_cannot_be_executed(s, command, code):
    with pytest.raises(errors.FailedPrecondition) as caught:
        await run(s, command)
    assert caught.value.details["exit_code"] == code
    assert command in caught.value.message
    await wait_nothing_left(s.directory, s.context.prefix)
    assert s.holders.empty


async def test_a_failed_start_without_rm_stays_created(s):
    with pytest.raises(errors.FailedPrecondition):
        await run(s, "nope", auto_remove=False, name="bad")
    await wait_nothing_left(s.directory, s.context.prefix)
    state = (await inspect(s, "bad"))["State"]
    assert state["Status"] == "created"
    assert state["ExitCode"] == 127
    assert "nope" in state["Error"]
    assert s.holders.sandboxes == set()


async def test_a_run_that_cannot_be_recorded_leaves_nothing(s, monkeypatch):
    """Without a row a restart of the service would not know the container: rather none."""

    async def full(self, container):
        raise errors.ResourceExhausted("can't write the container store: database or disk is full")

    monkeypatch.setattr(Store, "insert", full)
    with pytest.raises(errors.ResourceExhausted):
        await s.bus.call(c.RUN, c.RunContainer(spec=spec("sleep", "1000"), detach=True), timeout_s=30)
    await wait_nothing_left(s.directory, s.context.prefix)
    assert (await s.bus.call(c.LIST, c.ListContainers(all=True))).containers == []
    assert s.holders.empty


async def test_failures_of_others_leave_nothing(s):
    for step, error in (
        ("netd.attach", errors.Conflict("port 80 is taken")),
        ("volumed.attach", errors.InvalidArgument("no such place")),
    ):
        s.holders.fail = {step: error}
        mounts = [volumed.MountRequest(type="volume", target="/data")]
        with pytest.raises(type(error), match=error.message):
            await run(s, "true", name="unlucky", mounts=mounts)
        assert s.holders.empty
        await wait_nothing_left(s.directory, s.context.prefix)
    s.holders.fail = {}
    with pytest.raises(errors.NotFound, match="nothing"):
        await s.bus.call(c.CREATE, c.CreateContainer(spec=c.ContainerSpec(image="nothing")))
    with pytest.raises(errors.InvalidArgument, match="unknown or invalid runtime"):
        await run(s, "true", runtime="magic")
    with pytest.raises(errors.InvalidArgument, match="unable to find user"):
        await run(s, "true", user="nobody-here")
    with pytest.raises(errors.InvalidArgument):
        await run(s, "true", log_driver="json-file", log_options={"no-such-option": "1"})
    await wait_nothing_left(s.directory, s.context.prefix)
    assert s.holders.empty


async def test_racing_creates_have_one_winner(s):
    outcomes = []

    async def create():
        try:
            await s.bus.call(c.CREATE, c.CreateContainer(spec=spec("true", name="only")))
            outcomes.append("made")
        except errors.AlreadyExists as error:
            assert "only" in error.message
            outcomes.append("refused")

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(create)
    assert sorted(outcomes) == ["made"] + ["refused"] * 9
    assert len(s.holders.snapshots) == 1


async def test_a_cancelled_create_leaves_nothing(s):
    s.holders.block = trio.Event()
    with trio.move_on_after(0.2):
        await s.bus.call(c.CREATE, c.CreateContainer(spec=spec("true", name="half")))
    s.holders.block.set()
    with trio.fail_after(5):
        while not s.holders.empty:
            await trio.sleep(0.01)
        while True:  # the name is free again
            try:
                await s.bus.call(c.CREATE, c.CreateContainer(spec=spec("true", name="half")))
                break
            except errors.AlreadyExists:
                await trio.sleep(0.01)


async def test_volumes_are_mounted(s):
    (s.directory / "bound").mkdir()
    mounts = [volumed.MountRequest(type="bind", source=str(s.directory / "bound"), target="/data")]
    await run(s, "sh", "-c", "echo kept > /data/file", mounts=mounts)
    assert (s.directory / "bound" / "file").read_text() == "kept\n"
    await wait_nothing_left(s.directory, s.context.prefix)
    created = await s.bus.call(c.CREATE, c.CreateContainer(spec=spec("true", mounts=mounts)))
    assert leftovers(s.directory, s.context.prefix) == []  # the root was mounted only for a moment
    await s.bus.call(c.START, c.StartContainer(container=created.id, wait=True))


async def test_stdin(s):
    reader, writer = os.pipe()
    request = c.RunContainer(
        spec=spec("sort", open_stdin=True, stdin_once=True, auto_remove=True), attach=c.AttachOptions(output=True, stdin=True)
    )
    async with s.bus.stream(c.RUN, request, fds=[writer], timeout_s=20) as stream:
        os.close(writer)
        async for item in stream:
            if item.phase == "started":
                (stdin,) = stream.take_fds()
                os.write(stdin, b"b\na\n")
                os.close(stdin)  # the only other holder would be the shim: this must be the end of input
        assert (await stream.result()).exit_code == 0
    assert await trio.to_thread.run_sync(output_of, reader) == b"a\nb\n"


async def test_terminal(s):
    reader, writer = os.pipe()
    request = c.RunContainer(
        spec=spec("sh", tty=True, open_stdin=True, auto_remove=True),
        attach=c.AttachOptions(output=True, stdin=True, rows=31, columns=97),
    )
    async with s.bus.stream(c.RUN, request, fds=[writer], timeout_s=20) as stream:
        os.close(writer)
        async for item in stream:
            if item.phase == "started":
                (master,) = stream.take_fds()
                size = struct.unpack("HHHH", termios_size(master))
                assert size[:2] == (31, 97)
                os.write(master, b"stty size; tty; exit 5\n")
                os.close(master)
        assert (await stream.result()).exit_code == 5
    with open(reader, "rb") as file:
        text = await trio.to_thread.run_sync(file.read)
    assert b"31 97\r\n/dev/pts/0\r\n" in text


def termios_size(fd):
    import fcntl

    return fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))


async def test_exec(s):
    id_ = await run_detached(s, "sleep", "100", env=["A=1"], name="web")
    status, output = await exec_(s, "web", "sh", "-c", "echo $A $B; pwd; exit 3", env=["B=2"], working_dir="/tmp")
    assert (status.exit_code, output) == (3, b"1 2\n/tmp\n")
    for command, code in (("nope", "127"), ("/etc", "126"), ("/etc/passwd", "126"), ("./nope", "127")):
        with pytest.raises(errors.FailedPrecondition) as caught:
            await exec_(s, "web", command)
        assert caught.value.details["exit_code"] == code
    with pytest.raises(errors.InvalidArgument, match="unable to find user"):
        await exec_(s, "web", "true", user="who")
    await exec_(s, "web", "sh", "-c", "(sleep 0.01; :) & :")  # an orphan: the shim reaps it or init does
    await s.bus.call(c.EXEC, c.ExecContainer(container="web", args=["touch", "/made"], detach=True))
    with trio.fail_after(5):
        while (await exec_(s, "web", "ls", "/made"))[0].exit_code:
            await trio.sleep(0.02)
    bundle = s.directory / "run" / "containerd" / "bundles" / id_
    assert [name for name in os.listdir(bundle) if name.startswith("exec-")] == []
    await s.bus.call(c.STOP, c.StopContainer(container="web", timeout_s=0))
    with pytest.raises(errors.FailedPrecondition, match="not running"):
        await exec_(s, "web", "true")


async def test_exec_with_a_terminal(s):
    await run_detached(s, "sleep", "100", name="web")
    request = c.ExecContainer(container="web", args=["sh", "-c", "stty size; exit 4"], tty=True, rows=20, columns=60)
    text = b""
    async with s.bus.stream(c.EXEC, request, timeout_s=20) as stream:
        async for item in stream:
            assert item.phase == "started"
            (master,) = stream.take_fds()
            with contextlib.suppress(OSError):
                while data := await trio.to_thread.run_sync(os.read, master, 1000):
                    text += data
            os.close(master)
        assert (await stream.result()).exit_code == 4
    assert text == b"20 60\r\n"


async def test_exec_ends_with_its_container(s):
    await run_detached(s, "sleep", "100", name="web")
    codes = []

    async def sleeper():
        codes.append((await exec_(s, "web", "sleep", "100"))[0].exit_code)

    async with s.bus.events("container.exec.start") as events, trio.open_nursery() as nursery:
        nursery.start_soon(sleeper)
        with trio.fail_after(5):
            await events.__anext__()
        assert (await inspect(s, "web"))["ExecIDs"]
        await s.bus.call(c.KILL, c.KillContainer(container="web"))
    assert codes == [137]


async def test_stop_start_restart(s):
    trap = "trap 'exit 9' TERM; trap 'exit 10' USR1; touch /ready; while :; do sleep 0.05; done"

    async def listens():
        with trio.fail_after(10):
            while (await exec_(s, "web", "rm", "/ready"))[0].exit_code:
                await trio.sleep(0.02)

    await run_detached(s, "sh", "-c", trap, name="web")
    await listens()
    first = (await inspect(s, "web"))["State"]["Pid"]
    await s.bus.call(c.STOP, c.StopContainer(container="web"))
    state = (await inspect(s, "web"))["State"]
    assert (state["Status"], state["ExitCode"], state["Pid"]) == ("exited", 9, 0)
    assert s.holders.sandboxes == set()
    await s.bus.call(c.STOP, c.StopContainer(container="web"))  # does nothing
    await s.bus.call(c.START, c.StartContainer(container="web"))
    await listens()
    await s.bus.call(c.START, c.StartContainer(container="web"))  # does nothing
    await s.bus.call(c.RESTART, c.StopContainer(container="web"))
    await listens()
    state = (await inspect(s, "web"))["State"]
    assert state["Status"] == "running"
    assert state["Pid"] != first
    await s.bus.call(c.KILL, c.KillContainer(container="web", signal="USR1"))
    status = await s.bus.call(c.WAIT, c.WaitContainer(container="web"))
    assert status.exit_code == 10


async def test_stop_kills_what_does_not_listen(s):
    await run_detached(s, "sh", "-c", "trap '' TERM; while :; do sleep 0.05; done", name="deaf")
    with trio.fail_after(8):
        await s.bus.call(c.STOP, c.StopContainer(container="deaf", timeout_s=1))
    assert (await inspect(s, "deaf"))["State"]["ExitCode"] == 137


async def test_pause(s):
    await run_detached(s, "sleep", "100", name="web")
    await s.bus.call(c.PAUSE, c.ContainerRef(container="web"))
    assert (await inspect(s, "web"))["State"]["Paused"]
    with pytest.raises(errors.FailedPrecondition, match="paused"):
        await exec_(s, "web", "true")
    with pytest.raises(errors.FailedPrecondition, match="already paused"):
        await s.bus.call(c.PAUSE, c.ContainerRef(container="web"))
    await s.bus.call(c.UNPAUSE, c.ContainerRef(container="web"))
    assert (await exec_(s, "web", "true"))[0].exit_code == 0
    await s.bus.call(c.PAUSE, c.ContainerRef(container="web"))
    await s.bus.call(c.REMOVE, c.RemoveContainer(container="web", force=True))


async def test_remove_and_rename(s):
    id_ = await run_detached(s, "sleep", "100", name="web")
    with pytest.raises(errors.Conflict, match="running"):
        await s.bus.call(c.REMOVE, c.RemoveContainer(container="web"))
    await s.bus.call(c.RENAME, c.RenameContainer(container="web", name="site"))
    with pytest.raises(errors.NotFound):
        await inspect(s, "web")
    assert (await inspect(s, id_[:10]))["Name"] == "/site"
    with pytest.raises(errors.InvalidArgument):
        await s.bus.call(c.RENAME, c.RenameContainer(container="site", name="a/b"))
    await s.bus.call(c.REMOVE, c.RemoveContainer(container="site", force=True))
    with pytest.raises(errors.NotFound, match="no such container"):
        await s.bus.call(c.REMOVE, c.RemoveContainer(container="site", force=True))
    assert s.holders.empty


async def test_references(s):
    one = await s.bus.call(c.CREATE, c.CreateContainer(spec=spec("true", name="one")))
    ids = [one.id]
    while len({id_[0] for id_ in ids}) == len(ids):  # until two share their first digit
        ids.append((await s.bus.call(c.CREATE, c.CreateContainer(spec=spec("true")))).id)
    digit = next(id_[0] for id_ in ids if sum(other[0] == id_[0] for other in ids) > 1)
    with pytest.raises(errors.InvalidArgument, match="ambiguous"):
        await inspect(s, digit)
    for reference in (one.id, "one", "/one", one.id[:20]):
        assert (await inspect(s, reference))["Id"] == one.id


async def test_wait_conditions(s):
    created = await s.bus.call(c.CREATE, c.CreateContainer(spec=spec("sh", "-c", "exit 2", name="wt")))
    results = {}

    async def wait(condition):
        results[condition] = (await s.bus.call(c.WAIT, c.WaitContainer(container=created.id, condition=condition))).exit_code

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "next-exit")
        nursery.start_soon(wait, "removed")
        await s.bus.call(c.WAIT, c.WaitContainer(container="wt"))  # it isn't running
        await s.bus.call(c.START, c.StartContainer(container="wt", wait=True))
        await s.bus.call(c.REMOVE, c.RemoveContainer(container="wt"))
    assert results == {"next-exit": 2, "removed": 2}
    with pytest.raises(errors.NotFound):
        await s.bus.call(c.WAIT, c.WaitContainer(container="wt"))


async def test_attach(s):
    await run_detached(s, "cat", name="cat", open_stdin=True)
    reader, writer = os.pipe()
    request = c.AttachContainer(container="cat", attach=c.AttachOptions(output=True, stdin=True))
    async with s.bus.stream(c.ATTACH, request, fds=[writer], timeout_s=20) as stream:
        os.close(writer)
        async for _ in stream:
            (stdin,) = stream.take_fds()
            os.write(stdin, b"hello\n")
            os.close(stdin)
            data = await trio.to_thread.run_sync(os.read, reader, 100)
            assert data[8:] == b"hello\n"
            await s.bus.call(c.KILL, c.KillContainer(container="cat"))
        assert (await stream.result()).exit_code == 137
    os.close(reader)


async def test_the_caller_goes_the_container_stays(s):
    with trio.move_on_after(20):
        async with s.bus.stream(c.RUN, c.RunContainer(spec=spec("sleep", "100", name="stays"))) as stream:
            async for item in stream:
                if item.phase == "started":
                    break
    assert (await inspect(s, "stays"))["State"]["Running"]


async def test_events_tell_the_story(s):
    async with s.bus.events("container.>") as events:
        await run(s, "sh", "-c", "exit 3", name="told", labels={"k": "v"})
        topics = []
        with trio.fail_after(5):
            async for event in events:
                topics.append(event.topic)
                attributes = event.payload.attributes
                assert (attributes["name"], attributes["image"], attributes["k"]) == ("told", "busybox", "v")
                if event.topic == "container.die":
                    assert attributes["exitCode"] == "3"
                if event.topic == "container.destroy":
                    break
    assert topics == [f"container.{action}" for action in ("create", "attach", "start", "die", "destroy")]


async def test_few_commits(s):
    """A run with --rm writes its row, that it runs, and deletes it: three commits at most, two of them beside other work."""
    import sqlite3

    def version():
        # grows with every commit of another connection
        return watcher.execute("PRAGMA data_version").fetchone()[0]

    watcher = sqlite3.connect(s.directory / "root" / "containerd" / "containers.db")
    await run(s, "true")
    before, seen = version(), 0
    async with trio.open_nursery() as nursery:

        async def watch():
            nonlocal before, seen
            while True:
                now = version()
                seen += now != before
                before = now
                await trio.sleep(0.001)

        nursery.start_soon(watch)
        await run(s, "true")
        nursery.cancel_scope.cancel()
    assert seen <= 3
    assert watcher.execute("SELECT count(*) FROM containers").fetchone() == (0,)
    watcher.close()


async def test_restart_of_the_service_while_containers_run(tmp_path):
    async with stack(tmp_path, containerd=False) as s:
        async with serve_containerd(s.bus_path, tmp_path) as context:
            s.context = context
            long = await run_detached(s, "sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.02; done", name="long")
            short = await run_detached(s, "sh", "-c", "trap 'exit 6' USR1; while :; do sleep 0.02; done", name="short")
            pid = (await inspect(s, "long"))["State"]["Pid"]
            ends = (await inspect(s, "short"))["State"]["Pid"]
            await exec_(s, "short", "true")  # by now it has set its trap
        os.kill(ends, signal.SIGUSR1)  # it exits while nobody is there
        exit_file = tmp_path / "run" / "containerd" / "bundles" / short / "exit"
        with trio.fail_after(10):
            while not exit_file.exists():
                await trio.sleep(0.02)
        async with serve_containerd(s.bus_path, tmp_path):
            status = await s.bus.call(c.WAIT, c.WaitContainer(container="short"))
            assert status.exit_code == 6
            state = (await inspect(s, "long"))["State"]
            assert (state["Running"], state["Pid"]) == (True, pid)
            assert (await exec_(s, "long", "echo", "still here"))[1] == b"still here\n"
            assert s.holders.sandboxes == {long}
            await s.bus.call(c.STOP, c.StopContainer(container="long"))
            assert (await inspect(s, "long"))["State"]["ExitCode"] == 9
            for name in ("long", "short"):
                await s.bus.call(c.REMOVE, c.RemoveContainer(container=name))
            await wait_nothing_left(tmp_path, context.prefix)
            assert s.holders.empty
            assert s.holders.retained.count("netd") == 2


async def test_a_killed_shim_takes_its_container_along(s):
    id_ = await run_detached(s, "sleep", "100", name="web")
    pid = (await inspect(s, "web"))["State"]["Pid"]
    status = Path(f"/proc/{pid}/status").read_text()
    shim = int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid")))
    os.kill(shim, signal.SIGKILL)
    with trio.fail_after(10):
        assert (await s.bus.call(c.WAIT, c.WaitContainer(container=id_))).exit_code == 137
    with trio.fail_after(5):
        while Path(f"/proc/{pid}").exists():
            await trio.sleep(0.02)
    await wait_nothing_left(s.directory, s.context.prefix)


async def test_a_log_survives_and_is_removed(s):
    id_ = await run_detached(s, "sh", "-c", "echo one; echo two", name="logs")
    await s.bus.call(c.WAIT, c.WaitContainer(container=id_))
    await s.bus.call(logd.WAIT_DRAINED, logd.WaitDrained(container_id=id_, run=1))
    path = (await inspect(s, id_))["LogPath"]
    assert Path(path).read_text().count("\n") == 2
    await s.bus.call(c.REMOVE, c.RemoveContainer(container=id_))
    with trio.fail_after(5):
        while Path(path).exists():
            await trio.sleep(0.02)


async def test_a_restart_does_not_remove_what_removes_itself(s):
    trap = "trap 'exit 9' TERM; while :; do sleep 0.02; done"
    id_ = await run_detached(s, "sh", "-c", trap, name="web", auto_remove=True)
    await s.bus.call(c.RESTART, c.StopContainer(container="web"), timeout_s=20)
    document = await inspect(s, "web")
    assert (document["Id"], document["State"]["Status"]) == (id_, "running")
    await s.bus.call(c.STOP, c.StopContainer(container="web"), timeout_s=20)
    with pytest.raises(errors.NotFound):
        await inspect(s, "web")


async def test_forced_removal_of_what_is_just_being_started(s):
    created = await s.bus.call(c.CREATE, c.CreateContainer(spec=spec("sleep", "1000", name="web")))

    async def begin():
        with contextlib.suppress(errors.NotFound):  # the removal was first
            await s.bus.call(c.START, c.StartContainer(container=created.id), timeout_s=20)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(begin)
        await trio.testing.wait_all_tasks_blocked()
        await s.bus.call(c.REMOVE, c.RemoveContainer(container=created.id, force=True), timeout_s=20)
    with pytest.raises(errors.NotFound):
        await inspect(s, "web")


async def test_a_pause_is_known_after_a_restart_of_the_service(tmp_path):
    """Also one that ended by a signal, and one that happened in the very moment the service was killed."""
    trap = "trap : USR1; trap 'exit 9' TERM; while :; do sleep 0.02; done"
    async with stack(tmp_path, containerd=False) as s:
        async with serve_containerd(s.bus_path, tmp_path) as context:
            id_ = await run_detached(s, "sh", "-c", trap, name="web")
            await exec_(s, "web", "true")  # by now it has set its traps
            await s.bus.call(c.PAUSE, c.ContainerRef(container="web"))
            await s.bus.call(c.KILL, c.KillContainer(container="web", signal="USR1"))
            assert (await inspect(s, "web"))["State"]["Status"] == "running"
        async with serve_containerd(s.bus_path, tmp_path):
            assert (await inspect(s, "web"))["State"]["Status"] == "running"
        cgroup = f"/{context.prefix}/{id_}"
        assert not kernel.frozen(cgroup)
        for place in kernel.cgroup_directories(cgroup):
            for name, word in (("cgroup.freeze", "1"), ("freezer.state", "FROZEN")):
                if (place / name).exists() and place.parts[4] != "unified":
                    (place / name).write_text(word)
        assert kernel.frozen(cgroup)
        async with serve_containerd(s.bus_path, tmp_path):
            assert (await inspect(s, "web"))["State"]["Status"] == "paused"
            await s.bus.call(c.STOP, c.StopContainer(container="web"), timeout_s=20)
            assert (await inspect(s, "web"))["State"]["ExitCode"] == 9
            await s.bus.call(c.REMOVE, c.RemoveContainer(container="web"))
            await wait_nothing_left(tmp_path, context.prefix)


async def test_a_shim_that_hung_up_is_asked_again(s, monkeypatch):
    """A shim lets go of a connection that isn't read or sends nonsense: no reason to give its container up."""
    connections = []

    class Recorded(Shim):
        def __init__(self, sock):
            super().__init__(sock)
            connections.append(self)

    monkeypatch.setattr(start, "Shim", Recorded)
    await run_detached(s, "sh", "-c", "trap 'exit 6' TERM; while :; do sleep 0.02; done", name="web")
    pid = (await inspect(s, "web"))["State"]["Pid"]
    codes = []

    async def long():
        codes.append((await exec_(s, "web", "sh", "-c", "echo ready > /ready; sleep 1000"))[0].exit_code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(long)
        with trio.fail_after(10):
            while (await exec_(s, "web", "test", "-e", "/ready"))[0].exit_code:
                await trio.sleep(0.01)
            wire.send_message(connections[0]._sock, b"nonsense")
            while len(connections) < 2:
                await trio.sleep(0.01)
        state = (await inspect(s, "web"))["State"]
        assert (state["Status"], state["Pid"]) == ("running", pid)
        assert (await exec_(s, "web", "echo", "still here"))[1] == b"still here\n"
        assert codes == []
        await s.bus.call(c.STOP, c.StopContainer(container="web"), timeout_s=20)
        assert (await inspect(s, "web"))["State"]["ExitCode"] == 6
    assert codes == [137]


async def test_what_lost_its_shim_while_the_service_was_away_is_cleaned_up_at_once(tmp_path):
    async with stack(tmp_path, containerd=False) as s:
        async with serve_containerd(s.bus_path, tmp_path) as context:
            await run_detached(s, "sleep", "1000", name="web")
            pid = (await inspect(s, "web"))["State"]["Pid"]
            status = Path(f"/proc/{pid}/status").read_text()
            shim = int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid")))
        os.kill(shim, signal.SIGKILL)
        async with serve_containerd(s.bus_path, tmp_path):
            assert (await s.bus.call(c.WAIT, c.WaitContainer(container="web"), timeout_s=10)).exit_code == 255
            await wait_nothing_left(tmp_path, context.prefix)
            await s.bus.call(c.REMOVE, c.RemoveContainer(container="web"))


async def test_the_end_of_the_output_waits_for_a_logd_that_is_long_away(tmp_path, monkeypatch):
    """Longer than calls are usually repeated for; the container is over, its last words in the pipe the shim holds."""
    monkeypatch.setattr("pyx_bus.client.calls.RETRY_FOR_S", 0.2)
    async with stack(tmp_path, logd=False) as s:

        def serve_logd():
            place = {"root": tmp_path / "root" / "logd", "run": tmp_path / "run" / "logd"}
            return testing.serve(s.bus_path, "logd", pyx_logd.__main__.setup, **place)

        async with serve_logd():
            id_ = await run_detached(s, "sh", "-c", "trap 'echo last; exit 3' TERM; while :; do sleep 0.02; done", name="web")
            await exec_(s, "web", "true")
        await s.bus.call(c.STOP, c.StopContainer(container="web"), timeout_s=20)
        await trio.sleep(1.5)  # as long as it would take to give up: the first attempt, and the repeated ones
        async with serve_logd():
            with trio.fail_after(10):
                path = (await inspect(s, "web"))["LogPath"]
                while "last" not in Path(path).read_text():
                    await trio.sleep(0.02)
            await s.bus.call(c.REMOVE, c.RemoveContainer(container=id_))
            await wait_nothing_left(tmp_path, s.context.prefix)


async def test_what_was_done_for_a_dead_predecessor_after_all_is_given_back(tmp_path, monkeypatch):
    """It asked for a root file system as it died, and the holder was slow: the first list its successor draws is older than that."""
    monkeypatch.setattr("pyx_containerd.recovery.TELL_AGAIN_AFTER_S", (0.3,))
    async with stack(tmp_path, containerd=False) as s:
        async with serve_containerd(s.bus_path, tmp_path):
            with trio.fail_after(10):
                while "imaged" not in s.holders.retained:
                    await trio.sleep(0.01)
            s.holders.snapshots.add("f" * 64)
            with trio.fail_after(10):
                while s.holders.snapshots:
                    await trio.sleep(0.01)

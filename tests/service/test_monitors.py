"""What a monitor gets from each service in place of secrets, and that a list and the events after it fit together."""

from __future__ import annotations

import contextlib

import pytest
import trio
from tests.containerd_stack import stack, wait_nothing_left
from tests.imaged_support import imaged
from tests.service.test_imaged_lifecycle import SMALL
from tests.service.test_volumed_service import stack as volumed_stack

from pyx_bus import errors, server
from pyx_bus.contract import containerd as c
from pyx_bus.contract import imaged as images
from pyx_bus.contract import volumed
from pyx_bus.contract.base import Empty


@pytest.fixture
def monitor(monkeypatch):
    """From here on every call is a monitor's, as the broker says it in a flag of the call (who is one is its matter)."""
    init = server.Call.__init__

    def is_one(self, *arguments):
        init(self, *arguments)
        self.monitor = True

    @contextlib.contextmanager
    def switched():
        with monkeypatch.context() as patch:
            patch.setattr(server.Call, "__init__", is_one)
            yield

    return switched


async def test_containers(tmp_path, monitor):
    async with stack(tmp_path) as s:
        spec = c.ContainerSpec(
            image="busybox", command=["sleep", "100"], name="box", env=["PW=hunter2"], log_options={"max-size": "1m"}
        )
        await s.call(c.RUN, c.RunContainer(spec=spec, detach=True))
        try:
            inspect = c.ContainerRef(container="box")
            plain = (await s.call(c.INSPECT, inspect)).document
            assert "PW=hunter2" in plain["Config"]["Env"]
            with monitor():
                masked = (await s.call(c.INSPECT, inspect)).document
                assert "PW=***" in masked["Config"]["Env"] and "hunter2" not in repr(masked)
                assert masked["HostConfig"] == plain["HostConfig"] and masked["Config"]["Cmd"] == ["sleep", "100"]
                assert len((await s.call(c.TOP, c.TopContainer(container="box"))).processes) == 1
                with pytest.raises(errors.PermissionDenied):
                    await s.call(c.TOP, c.TopContainer(container="box", ps_args=["auxe"]))
        finally:
            await s.call(c.REMOVE, c.RemoveContainer(container="box", force=True))
            await s.call(c.INFO, Empty())
            await wait_nothing_left(tmp_path, s.context.prefix)


async def test_images(tmp_path, monitor):
    async with imaged(tmp_path) as service:
        await service.import_bytes(SMALL, "a", changes=["ENV PW=hunter2"])
        wanted = images.ResolveImage(reference="a")
        assert (await service.bus.call(images.RESOLVE, wanted)).env == ["PW=hunter2"]
        with monitor():
            assert (await service.bus.call(images.RESOLVE, wanted)).env == ["PW=***"]
            assert (await service.bus.call(images.INSPECT, wanted)).document["Config"]["Env"] == ["PW=***"]
        assert (await service.bus.call(images.RESOLVE, wanted)).env == ["PW=hunter2"]


async def test_volumes(tmp_path, monitor):
    async with volumed_stack(tmp_path) as s:
        options = {"type": "tmpfs", "device": "tmpfs", "o": "size=1m,password=hunter2"}
        await s.bus.call(volumed.CREATE, volumed.CreateVolume(name="vv", driver_options=options))
        with monitor():
            shown = {**options, "o": "size=1m,password=***"}
            assert (await s.bus.call(volumed.LIST, volumed.ListVolumes())).volumes[0].options == shown
            assert (await s.bus.call(volumed.INSPECT, volumed.VolumeRef(name="vv"))).document["Options"] == shown


async def test_a_list_and_the_events_after_it_make_the_state(tmp_path):
    """Lists are drawn in the middle of containers coming and going; each, with what's published after it, leads to the same end."""
    async with stack(tmp_path) as s:
        ends: list[tuple[dict[str, str], list[str]]] = []
        over = trio.Event()

        async def come_and_go(name: str) -> None:
            for number in range(3):
                spec = c.ContainerSpec(image="busybox", command=["true"], name=f"{name}-{number}", auto_remove=number < 2)
                await s.call(c.RUN, c.RunContainer(spec=spec))
                if number == 2:
                    await s.call(c.RENAME, c.RenameContainer(container=f"{name}-{number}", name=f"{name}-stays"))

        async def look() -> None:
            async with s.bus.watch(c.LIST, c.ListContainers(all=True), "container.*", timeout_s=20) as (state, events):
                known = {row.id: f"{row.name} {row.state}" for row in state.containers}
                steps: list[str] = []
                after = {"create": "created", "start": "running", "die": "exited"}
                async for event in events:
                    action, id_ = event.topic.partition(".")[2], event.payload.id
                    name = event.payload.attributes["name"]
                    steps.append(f"{action} {name}")
                    if action == "create":
                        assert id_ not in known, "the list had it already"
                        known[id_] = f"{name} created"
                    elif action == "destroy":
                        assert id_ in known, "the list had it no more"
                        del known[id_]
                        if name == "last":
                            break
                    elif action in after:
                        assert known[id_] != f"{name} {after[action]}", f"the list had this {action} already"
                        known[id_] = f"{name} {after[action]}"
                    elif action == "rename":
                        assert not known[id_].startswith(name + " "), "the list had this name already"
                        known[id_] = f"{name} {known[id_].partition(' ')[2]}"
                ends.append((known, steps))
                if len(ends) == 6:
                    over.set()

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as workers:
                for name in ("aa", "bb"):
                    workers.start_soon(come_and_go, name)
                for _ in range(6):
                    nursery.start_soon(look)
                    await s.call(c.INFO, Empty())
                    await trio.sleep(0.1)  # spread over what goes on, wherever that is just then
            spec = c.ContainerSpec(image="busybox", command=["true"], name="last", auto_remove=True)
            await s.call(c.RUN, c.RunContainer(spec=spec))
            with trio.fail_after(20):
                await over.wait()
        rows = (await s.call(c.LIST, c.ListContainers(all=True))).containers
        truth = {row.id: f"{row.name} {row.state}" for row in rows}
        assert sorted(truth.values()) == ["aa-stays exited", "bb-stays exited"]
        for known, steps in ends:
            assert known == truth, steps
        for row in rows:
            await s.call(c.REMOVE, c.RemoveContainer(container=row.id))
        await wait_nothing_left(tmp_path, s.context.prefix)

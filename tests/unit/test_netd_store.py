from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from pyx_bus.errors import FailedPrecondition
from pyx_netd.model import Attachment, Network, Port
from pyx_netd.store import AttachmentStore, NetworkStore

NETWORK = Network("n1", "bridge", "bridge", 5, "172.17.0.0/16", "172.17.0.1", labels={"a": "b"})
ATTACHMENT = Attachment(
    "c1", "n1", "e1", "web", "/run/ns/c1", 4026531840, 7, "172.17.0.2", "02:42:ac:11:00:02", "veth1",
    (Port("tcp", 80, 8080), Port("udp", 53, 5353, "127.0.0.1")),
)  # fmt: skip


def test_networks_come_back(tmp_path: Path) -> None:
    store = NetworkStore(tmp_path)
    store.save(NETWORK)
    store.save(replace(NETWORK, subnet="172.18.0.0/16"))
    store.close()
    assert NetworkStore(tmp_path).load() == [replace(NETWORK, subnet="172.18.0.0/16")]


def test_attachments_come_back_within_the_boot(tmp_path: Path) -> None:
    store = AttachmentStore(tmp_path, "boot-1")
    assert store.cursor() == 0
    store.add(ATTACHMENT, 99)
    store.add(replace(ATTACHMENT, container_id="c2", created_ns=6, address="", ports=()), 0)
    # Not closed, as after a kill: another process sees what was committed.
    again = AttachmentStore(tmp_path, "boot-1")
    assert [attachment.container_id for attachment in again.load()] == ["c2", "c1"]
    assert again.load()[1] == ATTACHMENT
    assert again.cursor() == 99
    again.remove("c1")
    again.remove("c1")
    assert [attachment.container_id for attachment in store.load()] == ["c2"]


def test_another_boot_knows_nothing(tmp_path: Path) -> None:
    store = AttachmentStore(tmp_path, "boot-1")
    store.add(ATTACHMENT, 99)
    store.close()
    assert AttachmentStore(tmp_path, "boot-2").load() == []
    assert not list(tmp_path.glob("*boot-1*"))


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    NetworkStore(tmp_path).close()
    db = sqlite3.connect(tmp_path / "netd.sqlite")
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(FailedPrecondition, match="newer version"):
        NetworkStore(tmp_path)

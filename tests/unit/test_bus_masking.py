"""What a monitor sees in place of values."""

from __future__ import annotations

from typing import Any

import pytest

from pyx_bus import masking


def test_an_environment_keeps_its_names() -> None:
    assert masking.environment(["A=1", "EMPTY=", "B=x=y", "ALONE"]) == ["A=***", "EMPTY=***", "B=***", "ALONE"]


@pytest.mark.parametrize(
    "name", ["splunk-token", "PASSWORD", "passwd", "secret", "awslogs-key", "credentials-file", "auth-token", "gcp-api-KEY"]
)
def test_options_whose_names_tell_are_masked(name: str) -> None:
    assert masking.options({name: "hunter2", "max-size": "10m"}) == {name: "***", "max-size": "10m"}


def test_mount_options_are_looked_into() -> None:
    given = {"type": "cifs", "o": "addr=10.0.0.1,username=me,password=hunter2,ro", "device": "//10.0.0.1/x"}
    assert masking.options(given) == {**given, "o": "addr=10.0.0.1,username=me,password=***,ro"}


def test_documents_are_masked_and_left_as_they_are() -> None:
    document: dict[str, Any] = {
        "Id": "x", "Args": ["--password", "kept"],
        "Config": {"Env": ["PW=hunter2"], "Cmd": ["a"], "Labels": {"token": "kept"}},
        "HostConfig": {"Memory": 1, "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "api-key": "hunter2"}}},
    }  # fmt: skip
    masked = masking.container(document)
    assert "hunter2" not in repr(masked) and "hunter2" in repr(document)
    assert masked == {
        "Id": "x", "Args": ["--password", "kept"],
        "Config": {"Env": ["PW=***"], "Cmd": ["a"], "Labels": {"token": "kept"}},
        "HostConfig": {"Memory": 1, "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "api-key": "***"}}},
    }  # fmt: skip
    assert "State" not in masked
    assert masking.image({"Config": {"Env": None}, "Size": 1}) == {"Config": {"Env": None}, "Size": 1}
    assert masking.volume({"Name": "v", "Options": None}) == {"Name": "v", "Options": None}
    assert masking.volume({"Options": {"o": "password=x"}}) == {"Options": {"o": "password=***"}}


def test_what_a_health_check_wrote_is_masked() -> None:
    results = [{"Start": "s", "End": "e", "ExitCode": 1, "Output": "login with hunter2 failed"}, {"ExitCode": 0, "Output": ""}]
    document: dict[str, Any] = {"State": {"Status": "running", "Health": {"Status": "unhealthy", "FailingStreak": 1, "Log": results}}}
    masked = masking.container(document)
    assert masked["State"] == {
        "Status": "running",
        "Health": {
            "Status": "unhealthy",
            "FailingStreak": 1,
            "Log": [{"Start": "s", "End": "e", "ExitCode": 1, "Output": "***"}, {"ExitCode": 0, "Output": ""}],
        },
    }
    assert results[0]["Output"] == "login with hunter2 failed"
    none_yet = {"State": {"Health": {"Status": "starting", "Log": None}}}
    assert masking.container(none_yet)["State"] == {"Health": {"Status": "starting", "Log": []}}
    assert masking.container({"State": {"Status": "created"}})["State"] == {"Status": "created"}

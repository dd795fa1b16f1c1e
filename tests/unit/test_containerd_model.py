"""The state machine, exhaustively, and how a reference finds its container."""

import itertools

import pytest

from pyx_containerd.model import TRANSITIONS, Change, State, TransitionError, next_state, resolve

PATHS = [
    # what people do to containers, and where it leads
    ([Change.START, Change.EXIT, Change.REMOVE], State.REMOVING),
    ([Change.START, Change.PAUSE, Change.UNPAUSE, Change.EXIT], State.EXITED),
    ([Change.START, Change.PAUSE, Change.EXIT], State.EXITED),
    ([Change.START, Change.EXIT, Change.START], State.RUNNING),
    ([Change.START_FAILED, Change.START], State.RUNNING),
    ([Change.START, Change.EXIT, Change.START_FAILED], State.EXITED),
    ([Change.START, Change.RETRY, Change.START], State.RUNNING),
    ([Change.START, Change.RETRY, Change.GIVE_UP, Change.REMOVE], State.REMOVING),
    ([Change.REMOVE, Change.REMOVE_FAILED, Change.REMOVE], State.REMOVING),
]


@pytest.mark.parametrize(("changes", "end"), PATHS)
def test_paths(changes, end):
    state = State.CREATED
    for change in changes:
        state = next_state(state, change)
    assert state is end


@pytest.mark.parametrize(("state", "change"), list(itertools.product(State, Change)))
def test_every_pair_is_in_the_table_or_refused(state, change):
    if (state, change) in TRANSITIONS:
        assert next_state(state, change) in State
    else:
        with pytest.raises(TransitionError, match=state.value):
            next_state(state, change)


def test_every_state_is_reached_and_only_removing_ends():
    assert set(TRANSITIONS.values()) == set(State)
    for state in State:
        assert any(before is state for before, _ in TRANSITIONS)


def test_a_running_container_is_neither_started_nor_removed():
    for change in (Change.START, Change.REMOVE, Change.START_FAILED):
        assert (State.RUNNING, change) not in TRANSITIONS
        assert (State.PAUSED, change) not in TRANSITIONS


def test_resolve():
    ids = {"abc1": 1, "abd2": 2, "ffff": 3}
    names = {"web": "abc1", "abd": "ffff"}
    assert resolve("abc1", ids, names) == ["abc1"]
    assert resolve("/web", ids, names) == resolve("web", ids, names) == ["abc1"]
    assert resolve("abd", ids, names) == ["ffff"]  # a whole name goes before a prefix
    assert sorted(resolve("ab", ids, names)) == ["abc1", "abd2"]
    assert resolve("we", ids, names) == []  # names have no prefixes
    assert resolve("", ids, names) == []

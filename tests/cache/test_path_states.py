"""A path has one state, and only the written-down transitions are possible."""

from itertools import product

import pytest

from gcs_prefetchd.cache.path_states import ALLOWED, PathState, PathStates

ABSENT, CACHED, PUBLISHING, PUBLISHING_OR_EVICTING, UNLINKING = PathState
REST = {ABSENT, CACHED}
WAYS: dict[PathState, list[PathState]] = {  # from absent to each state that is stored
    PUBLISHING: [PUBLISHING],
    PUBLISHING_OR_EVICTING: [PUBLISHING, PUBLISHING_OR_EVICTING],
    UNLINKING: [UNLINKING],
}


def test_a_path_at_rest_is_cached_if_it_has_an_entry() -> None:
    states = PathStates({"a"}.__contains__)
    assert states.state("a") is CACHED
    assert states.state("b") is ABSENT
    assert not states.is_in_transition("a")


@pytest.mark.parametrize(("before", "after"), list(product(WAYS, PathState)))
def test_only_the_allowed_transitions_are_possible(before: PathState, after: PathState) -> None:
    states = PathStates(set[str]().__contains__)
    for state in WAYS[before]:
        states.move("a", state)
    if after not in ALLOWED[before]:
        with pytest.raises(AssertionError, match=f"a: {before.name} -> {after.name}"):
            states.move("a", after)
        assert states.state("a") is before
    else:
        states.move("a", after)
        assert states.is_in_transition("a") == (after not in REST)


def test_an_eviction_cannot_wait_for_an_unclaimed_publication() -> None:
    with pytest.raises(AssertionError):
        PathStates(set[str]().__contains__).move("a", PUBLISHING_OR_EVICTING)


def test_every_state_leads_back_to_rest() -> None:
    assert set(ALLOWED) == set(PathState)
    assert all(allowed & REST for allowed in ALLOWED.values())


def test_publishing_and_unlinking_paths_are_distinguished() -> None:
    states = PathStates(set[str]().__contains__)
    states.move("published", PUBLISHING)
    states.move("unwanted", PUBLISHING)
    states.move("unwanted", PUBLISHING_OR_EVICTING)
    states.move("evicted", UNLINKING)
    assert [path for path in ("published", "unwanted", "evicted") if states.is_publishing(path)] == ["published", "unwanted"]
    assert states.unlinking() == ["evicted"]

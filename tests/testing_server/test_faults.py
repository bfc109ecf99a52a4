"""The plan alone decides which request gets which fault."""

import pytest

from gcs_prefetchd.shared.errors import ProtocolError
from gcs_prefetchd.testing import Close, Cut, FaultPlan, Kind, Reset, Status
from gcs_prefetchd.testing.control import read_rule


def faulty_requests(plan: FaultPlan, keys: list[str], kind: Kind = Kind.MEDIA) -> list[int]:
    return [number for number, key in enumerate(keys, 1) if plan.next(kind, key) is not None]


def test_a_fault_hits_the_numbered_requests_for_each_object() -> None:
    plan = FaultPlan()
    plan.add(Close(), "b/*", requests={1, 3})
    assert faulty_requests(plan, ["b/x", "b/x", "b/y", "b/x", "b/x", "c/x", "b/y"]) == [1, 3, 4]


def test_requests_counted_together_are_one_sequence_over_all_objects() -> None:
    plan = FaultPlan()
    plan.add(Close(), "b/*", requests=range(2, 100, 2), together=True)
    assert faulty_requests(plan, ["b/x", "b/y", "c/z", "b/x", "b/y"]) == [2, 5]


def test_a_fault_without_numbers_hits_every_request() -> None:
    plan = FaultPlan()
    plan.add(Close(), "b/x")
    assert faulty_requests(plan, ["b/x", "b/x", "b/xx"]) == [1, 2]


def test_counting_starts_when_the_rule_is_added() -> None:
    """`requests=1` is the next one, however many arrived before."""
    plan = FaultPlan()
    assert faulty_requests(plan, ["b/x", "b/x"]) == []
    plan.add(Close(), "b/x", requests=1)
    assert faulty_requests(plan, ["b/x", "b/x"]) == [1]


def test_the_first_rule_that_applies_decides_and_all_count() -> None:
    plan = FaultPlan()
    plan.add(Close(), "b/x", requests=1)
    plan.add(Reset(), "b/*", requests={1, 2})
    assert [plan.next(Kind.MEDIA, "b/x") for _ in range(3)] == [Close(), Reset(), None]


def test_a_rule_applies_to_one_kind_of_request() -> None:
    plan = FaultPlan()
    plan.add(Status(503), "b", kind="list")
    assert faulty_requests(plan, ["b"]) == []
    assert faulty_requests(plan, ["b"], Kind.LIST) == [1]


def test_a_name_with_pattern_characters_matches_itself() -> None:
    plan = FaultPlan()
    plan.add(Close(), "b/x[1]")
    assert faulty_requests(plan, ["b/x[1]"]) == [1]


def test_a_rule_in_json_has_the_fields_of_its_fault() -> None:
    rule = read_rule({"fault": "Cut", "after_bytes": 7, "framing": "chunked", "object": "b/*", "requests": [2]})
    assert rule.fault == Cut(7, "chunked")
    assert (rule.object, rule.kind, rule.requests) == ("b/*", Kind.MEDIA, frozenset({2}))
    assert 300 in (read_rule({"fault": "Close", "every": 100}).requests or ())


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"fault": "Nonesuch"},
        {"fault": "Cut"},
        {"fault": "Cut", "after_bytes": 1, "color": "red"},
        {"fault": "Close", "kind": "nonesuch"},
        {"fault": "Close", "requests": 7},
        {"fault": "Close", "every": "x"},
        {"fault": ["Close"]},
        {"fault": "Cut", "after_bytes": "x"},
        {"fault": "Cut", "after_bytes": -1},
        {"fault": "Drip", "piece_bytes": 0},
        {"fault": "Partial", "first": 2, "last": 1},
        {"fault": "Status", "status": 1000},
    ],
)
def test_an_invalid_rule_in_json_is_refused(value: object) -> None:
    with pytest.raises(ProtocolError):
        read_rule(value)

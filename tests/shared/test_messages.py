"""The messages between readers and the daemon."""

import json
from array import array
from dataclasses import asdict, fields, replace
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gcs_prefetchd.shared.errors import ProtocolError
from gcs_prefetchd.shared.messages import (
    MAX_OBJECTS_PER_MESSAGE,
    MAX_TEXT_LENGTH,
    PLAN_KINDS,
    FetchRequest,
    FetchResponse,
    ManifestResponse,
    Plan,
    ReadReport,
    Status,
    pack_indices,
    unpack_indices,
)

Message = Status | ManifestResponse | FetchRequest | FetchResponse | ReadReport | Plan
MESSAGE_TYPES: tuple[type[Message], ...] = get_args(Message)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers(0, 2**63 - 1)
seconds = st.floats(0, 1e12)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "str": texts,
    "int": numbers,
    "float": seconds,
    "list[str]": st.lists(texts, max_size=5),
}
plans = st.builds(
    lambda values, rank, others: Plan(**(values | {"rank": rank, "world": rank + others})),
    st.fixed_dictionaries(
        {field.name: VALUES[str(field.type)] for field in fields(Plan)}
        | {"kind": st.sampled_from(PLAN_KINDS), "drop_last": st.sampled_from([0, 1])}
    ),
    st.integers(0, 2**62),
    st.integers(1, 2**62),
)
messages = st.one_of(
    [plans]
    + [
        st.builds(kind, **{field.name: VALUES[str(field.type)] for field in fields(kind)})
        for kind in MESSAGE_TYPES
        if kind is not Plan
    ],
)
PLAN = Plan("job", "job/0", "gs://pictures/train", "d", "shuffled", 7, 2, 3, 1, 4, 0, 16, "0" * 16)
EXAMPLES: tuple[Message, ...] = (
    Status(1, "a", "1.0", ["gs://pictures/train"], ["train-1"]),
    ManifestResponse("d", "/cache/manifests/d", 512),
    FetchRequest(["gs://pictures/train/images/1.jpg"]),
    FetchResponse([""]),
    ReadReport("job", "reporter", 7, 1, 2, 3, 0.5, ["gs://pictures/train/images/1.jpg"]),
    PLAN,
)
FIELDS = [(one, field.name, str(field.type)) for one in EXAMPLES for field in fields(one)]
BAD: dict[str, list[object]] = {
    "str": [None, 1, True, ["a"], {"a": 1}, "a" * (MAX_TEXT_LENGTH + 1)],
    "int": [None, "1", 1.5, 1.0, True, False, -1, 2**63, 10**400, [1], {}],
    "float": [None, "1", True, False, -1, -0.5, 2**63, 10**400, float("nan"), float("inf"), float("-inf"), [1.0]],
    "list[str]": [None, "gs://a/b", {"a": 1}, [1], ["a", None], ["a", True], [["a"]], ["a"] * (MAX_OBJECTS_PER_MESSAGE + 1)],
}


@given(messages)
def test_every_message_parses_back_unchanged(message: Message) -> None:
    assert type(message).from_json(message.to_json()) == message
    assert type(message).from_json(message.to_json().encode()) == message


def test_every_kind_of_message_has_an_example() -> None:
    assert {type(one) for one in EXAMPLES} == set(MESSAGE_TYPES)


@pytest.mark.parametrize(("message", "field", "kind"), FIELDS, ids=str)
def test_a_missing_field_is_named(message: Message, field: str, kind: str) -> None:
    content = asdict(message)
    del content[field]
    with pytest.raises(ProtocolError, match=f"^{type(message).__name__}: field '{field}' is missing$"):
        type(message).from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [(one, name, value) for one, name, kind in FIELDS for value in BAD[kind]],
    ids=lambda value: str(value)[:40],
)
def test_an_invalid_field_is_named(message: Message, field: str, value: object) -> None:
    content = asdict(message) | {field: value}
    with pytest.raises(ProtocolError, match=f"^{type(message).__name__}: field '{field}' ") as caught:
        type(message).from_json(json.dumps(content))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["", "{", "nul", b"\xff\xfe\x00", "'a'", "{}{}", "[" * 100_000, '{"a":' * 100_000, "9" * 5000])
@pytest.mark.parametrize("kind", MESSAGE_TYPES)
def test_text_that_is_not_json_is_refused(kind: type[Message], text: str | bytes) -> None:
    with pytest.raises(ProtocolError, match=f"^{kind.__name__}: not JSON"):
        kind.from_json(text)


@pytest.mark.parametrize("text", ["[]", "1", '"text"', "null", "true", "NaN"])
def test_json_that_is_not_an_object_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="not a JSON object"):
        FetchRequest.from_json(text)


def test_fields_of_a_later_version_are_ignored() -> None:
    assert FetchRequest.from_json('{"objects": ["gs://a/b"], "priority": 3}') == FetchRequest(["gs://a/b"])


def test_an_integer_number_of_seconds_is_accepted() -> None:
    assert (
        ReadReport.from_json(
            '{"job":"","reporter":"","number":1,"hits":0,"misses":0,"fallbacks":0,"wait_s":2,"objects":[]}'
        ).wait_s
        == 2
    )


@pytest.mark.parametrize("content", ['{"objects": ["\\ud800"]}', '{"objects": ["gs://a/b", "\\udc00x"]}'])
def test_half_a_character_is_refused(content: str) -> None:
    """JSON can contain one, and then no page, log file or response could be written."""
    with pytest.raises(ProtocolError, match="field 'objects' is not valid Unicode"):
        FetchRequest.from_json(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(MESSAGE_TYPES), st.data())
def test_no_message_raises_anything_but_a_protocol_error(kind: type[Message], data: st.DataObject) -> None:
    names = [field.name for field in fields(kind)]
    content = data.draw(st.dictionaries(st.sampled_from(names), json_values, max_size=len(names)))
    try:
        message = kind.from_json(json.dumps(content))
    except ProtocolError as exc:
        assert str(exc).startswith(f"{kind.__name__}: ")  # noqa: PT017  # most messages raise, some do not
    else:
        assert asdict(message) == {name: content[name] for name in names}


@given(st.sampled_from(MESSAGE_TYPES), st.binary(max_size=200) | st.text(max_size=200))
@example(FetchRequest, b'{"objects": [' + b"[" * 50_000)
def test_no_bytes_raise_anything_but_a_protocol_error(kind: type[Message], text: bytes | str) -> None:
    with pytest.raises(ProtocolError):
        kind.from_json(text)


indices = st.lists(st.integers(0, 2**32 - 1), max_size=50)


@given(indices)
def test_packed_indices_unpack_unchanged(values: list[int]) -> None:
    assert list(unpack_indices(pack_indices(values))) == values
    assert pack_indices(array("I", values)) == pack_indices(values)
    assert len(pack_indices(values)) == 4 * len(values)


def test_indices_are_little_endian() -> None:
    assert pack_indices([1, 0x01020304]) == b"\x01\0\0\0\x04\x03\x02\x01"
    assert list(unpack_indices(b"\x01\0\0\0")) == [1]


@pytest.mark.parametrize("values", [[-1], [2**32]])
def test_an_index_that_does_not_fit_is_an_error(values: list[int]) -> None:
    with pytest.raises(OverflowError):
        pack_indices(values)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("kind", "random", "must be one of listed, shuffled, endless, not 'random'"),
        ("kind", "", "must be one of"),
        ("kind", "x" * 1000, "must be one of"),
        ("world", 0, "must be at least 1, not 0"),
        ("rank", 4, "must be below the world of 4, not 4"),
        ("rank", 2**62, "must be below the world of 4"),
        ("drop_last", 2, "must be 0 or 1, not 2"),
    ],
)
def test_an_invalid_plan_is_refused_and_its_field_named(field: str, value: object, why: str) -> None:
    """By the sender and by the receiver."""
    with pytest.raises(ProtocolError, match=f"^Plan: field '{field}' {why}") as caught:
        replace(PLAN, **{field: value})  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200
    with pytest.raises(ProtocolError, match=f"^Plan: field '{field}' {why}"):
        Plan.from_json(json.dumps(asdict(PLAN) | {field: value}))


@given(plans, indices)
def test_a_plan_is_sent_together_with_its_indices(plan: Plan, values: list[int]) -> None:
    """For any indices: a newline among their bytes does not end the header."""
    assert Plan.from_body(plan.to_body(pack_indices([*values, 0x0A0A0A0A]))) == (plan, pack_indices([*values, 0x0A0A0A0A]))


@pytest.mark.parametrize("body", [b"", b"{}", b"\n", b"{}\n", b"{}\nabcd", b"\n\0\0\0\0", b"[]\n"])
def test_a_body_that_is_not_a_plan_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"^Plan: "):
        Plan.from_body(body)


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_a_truncated_plan_is_refused(cut: int) -> None:
    body = PLAN.to_body(pack_indices([1, 2, 3]))
    with pytest.raises(ProtocolError, match="packed 32-bit indices"):
        Plan.from_body(body[:-cut])


@given(st.binary(max_size=200))
def test_no_body_raises_anything_but_a_protocol_error(body: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"^Plan: "):
        Plan.from_body(body)

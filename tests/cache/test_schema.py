"""What pydantic finds wrong becomes one message of the caller's kind."""

import dataclasses
from typing import Any

import pytest

from threetowers.cache.schema import parse_as


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    tags: list[int] = dataclasses.field(default_factory=list)


class BadOuter(ValueError):
    pass


def parse(data: object, remedy: str = "") -> Outer:
    return parse_as(Outer, data, BadOuter, "x.yaml is not a valid outer", remedy)


@pytest.mark.parametrize("data", [{"name": "a", "inner": {"width": 3}}, b'{"name": "a", "inner": {"width": 3}}'])
def test_trees_and_json_are_read(data: Any) -> None:
    assert parse(data) == Outer("a", Inner(3))


def test_one_fault_is_one_line_with_its_key_and_what_was_found() -> None:
    with pytest.raises(BadOuter) as caught:
        parse({"name": "a", "inner": {"width": "wide"}}, remedy="mend it")
    assert str(caught.value) == (
        "x.yaml is not a valid outer: inner.width: Input should be a valid integer, unable to parse string as an "
        "integer (found 'wide'); mend it"
    )


def test_several_faults_are_a_line_each() -> None:
    with pytest.raises(BadOuter) as caught:
        parse({"inner": {}, "tags": [1, "x" * 500]})
    first, *lines = str(caught.value).splitlines()
    assert first == "x.yaml is not a valid outer:"
    assert lines[:2] == ["  name: Field required", "  inner.width: Field required"]
    assert lines[2].startswith("  tags.1: Input should be a valid integer")
    assert len(lines[2]) < 250


@pytest.mark.parametrize("data", [b"{", b"", "[]", 3])
def test_what_is_no_mapping_at_all(data: object) -> None:
    with pytest.raises(BadOuter, match=r"x\.yaml is not a valid outer: top level: "):
        parse(data)

"""The value of a field as a name: training, galleries, filters and classes use the same ones."""

from typing import Any

import pytest

from threetowers.cache.webdataset.groups import BadField, SampleGroup, field_name, sample_group
from threetowers.cache.webdataset.sample_list import SampleList
from threetowers.cache.webdataset.tar_index import TarIndex

TAR = TarIndex("a.tar", 0, "", SampleList([]), 0)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("boat", "boat"),
        (" boat ", "boat"),
        (0, "0"),
        (1, "1"),
        (1.0, "1"),
        ("1", "1"),
        (-0.5, "-0.5"),
        (1e300, "1e+300"),
        (2**70, str(2**70)),
        (True, "true"),
        (False, "false"),
        ("None", "None"),
        ("\ud800", "\\ud800"),
        (None, None),
        ("", None),
        (" \n", None),
        (float("nan"), None),
        (float("inf"), None),
    ],
)
def test_equal_values_have_equal_names_and_some_have_none(value: Any, name: str | None) -> None:
    assert field_name({"kind": value}, "kind") == name
    expected = SampleGroup("a.tar:3", True) if name is None else SampleGroup(name, False)
    assert sample_group(TAR, 3, {"kind": value}, "kind") == expected


def test_samples_without_a_value_are_groups_of_their_own() -> None:
    alone = [sample_group(TAR, ordinal, {}, "kind") for ordinal in range(3)]
    assert len({group.name for group in alone}) == 3
    assert all(group.without_value for group in alone)
    assert sample_group(TAR, 3, {"kind": "boat"}, None) == SampleGroup("a.tar:3", False)


def test_lists_and_objects_are_no_names() -> None:
    with pytest.raises(BadField, match="field 'kind' holds a list, expected a text, a number, true or false"):
        field_name({"kind": ["boat"]}, "kind")
    with pytest.raises(BadField, match="holds an object"):
        field_name({"kind": {}}, "kind")
    assert field_name({"cls": [4]}, "cls") == "4"
    with pytest.raises(BadField, match="field 'cls' holds a list"):
        field_name({"cls": [4, 7]}, "cls")

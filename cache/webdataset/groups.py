"""The value of a field as a name: of a sample's group, of its gallery, of its class."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from threetowers.cache.webdataset.tar_index import TarIndex

WITHOUT_GROUP = "group_field: no value"  # counts samples that are groups of their own
BAD_GROUP = "group_field: a list or an object"  # counts samples whose field is no name
EXACT_INTEGERS = 2**53  # beyond it a float does not tell one integer from the next


class BadField(ValueError):
    """A field whose value is no name: a list or an object. The message says what it holds."""


class SampleGroup(NamedTuple):
    """The group of a sample: its name, and whether the sample is alone in it for want of a value."""

    name: str
    without_value: bool


def value_name(value: Any) -> str | None:
    """Return a value as a name; None for what is no value: null, a blank text, NaN.

    Equal values have equal names, however they are written: 1, 1.0 and "1" are one name, and so are true and "true".
    White space around a text does not count.

    Raises:
        BadField: The value is a list or an object.
    """
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        raise BadField(f"{kind}, expected a text, a number, true or false")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() and abs(value) < EXACT_INTEGERS else repr(value)
    if value is None:
        return None
    # JSON may hold half a surrogate pair, which can be neither hashed nor printed
    return str(value).strip().encode(errors="backslashreplace").decode() or None


def field_name(fields: Mapping[str, Any], field: str) -> str | None:
    """Return the value of a field as a name; None where the sample has no such field, or no value in it.

    The numbers of a `cls` member count as their value where there is one of them.

    Raises:
        BadField: The value is a list or an object.
    """
    value = fields.get(field)
    if field == "cls" and isinstance(value, list) and len(value) == 1:
        value = value[0]
    try:
        return value_name(value)
    except BadField as error:
        raise BadField(f"field {field!r} holds {error}") from None


def sample_group(tar: TarIndex, ordinal: int, fields: Mapping[str, Any], field: str | None) -> SampleGroup:
    """Return the group of a sample: the name that a field gives it, or one of its own.

    Args:
        tar: Index of the sample's tar.
        ordinal: Its position in the tar.
        fields: Its fields.
        field: The field that names the group; None: each sample is its own group.

    Raises:
        BadField: The value of the field is a list or an object.
    """
    name = None if field is None else field_name(fields, field)
    if name is None:
        return SampleGroup(f"{tar.location}:{ordinal}", field is not None)
    return SampleGroup(name, False)

"""Dataclasses from JSON, YAML and other trees: checked field by field, with one form of message for what is wrong."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
SHOWN_CHARACTERS = 100  # of a value that is found where another is expected


def parse_as(kind: type[T], data: object, error: Callable[[str], Exception], headline: str, remedy: str = "") -> T:
    """Return `data` as a `kind`: a dataclass, or any type that pydantic checks.

    Args:
        kind: The type to return.
        data: JSON as bytes or text, or a tree of dicts, lists and values as YAML gives.
        error: Makes the exception of a message.
        headline: What is wrong as a whole and where, as in "run.yaml is not a valid run config".
        remedy: What to do about it, if it is not obvious.

    Raises:
        error: The data does not fit the type. Its message has the headline, for each key at fault what is expected and
            what was found, and the remedy.
    """
    adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]  # types are hashable
    try:
        if isinstance(data, bytes | str):
            return adapter.validate_json(data)
        return adapter.validate_python(data)
    except ValidationError as problem:
        faults = [_line(fault) for fault in problem.errors()]
        listed = f" {faults[0]}" if len(faults) == 1 else "".join(f"\n  {fault}" for fault in faults)
        raise error(f"{headline}:{listed}{'; ' if remedy else ''}{remedy}") from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _line(fault: Any) -> str:
    """Return the key at fault, what is expected of it, and what was found."""
    key = ".".join(map(str, fault["loc"])) or "top level"
    if fault["type"] in ("missing", "json_invalid"):  # their input is everything around the fault
        return f"{key}: {fault['msg']}"
    found = repr(fault["input"])
    if len(found) > SHOWN_CHARACTERS:
        found = f"{found[:SHOWN_CHARACTERS]} ..."
    return f"{key}: {fault['msg']} (found {found})"

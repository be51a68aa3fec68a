"""The values that keys of a config hold, and what all of its sections have in common."""

import fractions
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

SECTION = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _divided(value: object) -> object:
    """Return the float nearest to a fraction such as "1/3", and everything else as it is."""
    if not isinstance(value, str) or "/" not in value:
        return value
    try:
        return float(fractions.Fraction(value))
    except (ValueError, ZeroDivisionError):
        message = "Input should be a valid number or a fraction of two integers, as in 1/3"
        raise PydanticCustomError("fraction", message) from None


PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
LayerDecay = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, BeforeValidator(_divided)]

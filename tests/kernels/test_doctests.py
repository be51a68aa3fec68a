"""The examples in the docstrings of the public functions run as shown."""

import doctest

import pytest
import torch

from threetowers import kernels
from threetowers.kernels import contrastive, reference


@pytest.mark.parametrize("module", [contrastive, reference], ids=lambda module: module.__name__.split(".")[-1])
def test_examples(module: object) -> None:
    names = {name: getattr(kernels, name) for name in kernels.__all__} | {"torch": torch}
    result = doctest.testmod(module, extraglobs=names)  # type: ignore[arg-type]
    assert result.attempted >= 4
    assert result.failed == 0

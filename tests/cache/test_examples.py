"""The examples in the docstrings of the public interface run as written."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["builder.build", "builder.build_config", "read.embedding_cache"])
def test_docstring_examples_run(name: str) -> None:
    module = importlib.import_module(f"threetowers.cache.{name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0

"""A value that other processes load from a file: equal, with arrays that are mapped and read-only."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import samples_of, write_tar
from threetowers.cache.processes.mapped_pickle import MappedPickle
from threetowers.cache.webdataset.tar_index import index_tar


def test_values_are_equal_and_arrays_are_mapped() -> None:
    value = {"a": np.arange(100_001), "b": [np.ones((3, 5), np.float16), "text"], "empty": np.empty((0, 4))}
    mapped = MappedPickle(value)
    handed_over = pickle.dumps(mapped)
    assert len(handed_over) < 500
    found = pickle.loads(handed_over).load()
    assert np.array_equal(found["a"], value["a"])
    assert np.array_equal(found["b"][0], value["b"][0])
    assert (found["b"][1], found["empty"].shape) == ("text", (0, 4))
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0] = 1
    path = Path(mapped._path)
    assert path.stat().st_size > value["a"].nbytes
    del mapped
    assert not path.exists()
    assert found["a"][-1] == 100_000  # what is mapped stays


def test_the_samples_of_a_tar_are_mapped(tmp_path: Path) -> None:
    tar = index_tar(write_tar(tmp_path / "t.tar", samples_of(0, 30)))
    mapped = MappedPickle(tar)
    found = mapped.load()
    assert list(found.samples) == list(tar.samples)
    arrays = found.samples.to_arrays()
    assert not any(
        arrays[name].flags.owndata or arrays[name].flags.writeable for name in arrays if name != "extensions"
    )

"""How captions are counted before a build, and how they are sorted into batches."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threetowers.cache.builder.embedding.caption_embedder import length_sorted_batches
from threetowers.cache.encoders.tokenizers.tokenizer import Tokens
from threetowers.cache.webdataset.caption_density import MAX_SAMPLES, captions_per_tar
from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.tar_index import TarIndex, index_tar

Pack = Callable[..., Path]


@given(lengths=st.lists(st.integers(1, 77), max_size=200), batch_size=st.integers(1, 40))
def test_the_padding_of_a_tar_is_at_most_one_batch_of_its_longest_caption(lengths: list[int], batch_size: int) -> None:
    tokens = [Tokens(range(length), cut=False) for length in lengths]
    batches = length_sorted_batches(tokens, batch_size)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    padding = sum(max(lengths[i] for i in batch) - lengths[place] for batch in batches for place in batch)
    assert padding <= batch_size * max(lengths, default=0)
    longest = [max(lengths[place] for place in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def tar_of(path: Path, per_sample: list[int], pack: Pack) -> TarIndex:
    return index_tar(pack(path, [(f"{i}", {"txt": b"\n".join([b"a"] * n)}) for i, n in enumerate(per_sample)]))


def test_room_is_that_of_the_largest_tar_if_it_were_as_dense_as_the_densest(pack: Pack, tmp_path: Path) -> None:
    lines = CaptionFormat(caption_per_line=True)
    tars = [tar_of(tmp_path / "0.tar", [1] * 30, pack), tar_of(tmp_path / "1.tar", [0, 3, 8], pack)]
    with ThreadPoolExecutor(2) as pool:
        assert captions_per_tar(tars, lines, pool) == 30 * 11 / 3
        assert captions_per_tar(tars[:1], lines, pool) == 30
        with pytest.raises(BadSample, match=r"none of the samples .* the first: .*0\.tar: sample '0': no caption"):
            captions_per_tar(tars, CaptionFormat({"cap": 1.0}), pool)


def test_only_some_tars_and_samples_are_looked_at(pack: Pack, tmp_path: Path) -> None:
    """Of many tars the first and the last; of a long tar every second sample."""
    lines = CaptionFormat(caption_per_line=True)
    tars = [tar_of(tmp_path / f"{i}.tar", [1 + 4 * (i in (0, 39))], pack) for i in range(40)]
    for i in (1, 2, 4, 37, 38):  # between those that are looked at
        Path(tars[i].location).unlink()
    with ThreadPoolExecutor(2) as pool:
        assert captions_per_tar(tars, lines, pool) == 5
        long = tar_of(tmp_path / "long.tar", [1 + i % 3 for i in range(3 * MAX_SAMPLES)], pack)
        assert captions_per_tar([long], lines, pool) == pytest.approx(6 * MAX_SAMPLES, 0.02)

"""The order of samples under random access: each once, disjoint ranks, the same on any number of ranks, resumed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from threetowers.trainer.data.sampler import EpochIndices, RandomAccessSampler, global_batches, permutation


def every(samples: int) -> EpochIndices:
    """Return the samples of an epoch: all of them in every one."""
    return lambda epoch: np.arange(samples)


@given(st.integers(0, 5), st.integers(1, 97), st.integers(1, 40))
def test_an_epoch_visits_each_sample_once(seed: int, samples: int, batch: int) -> None:
    if samples < batch:
        with pytest.raises(ValueError, match="lower global_batch_size"):
            list(global_batches(seed, every(samples), batch, 0, 1))
        return
    per_epoch = samples // batch
    epochs = list(global_batches(seed, every(samples), batch, 0, 2 * per_epoch))
    for epoch in (0, 1):
        seen = np.concatenate([indices for e, indices in epochs if e == epoch])
        assert len(seen) == per_epoch * batch
        assert len(set(seen.tolist())) == len(seen)
        assert seen.min() >= 0
        assert seen.max() < samples


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_split_the_same_global_batches(ranks: int) -> None:
    batch, samples = 12, 61
    parts = [list(RandomAccessSampler(3, [every(samples)], [batch], rank, ranks, 4, 13)) for rank in range(ranks)]
    for step, (epoch, indices) in enumerate(global_batches(3, every(samples), batch, 4, 13)):
        addresses = [address for part in parts for address in part[step]]
        assert addresses == [(epoch, i) for i in indices.tolist()]


def test_a_resumed_order_is_the_tail_of_the_full_order() -> None:
    full = list(RandomAccessSampler(0, [every(50)], [8], 1, 2, 0, 20))
    assert list(RandomAccessSampler(0, [every(50)], [8], 1, 2, 13, 20)) == full[13:]


def test_epochs_and_seeds_differ() -> None:
    assert not np.array_equal(permutation(0, 0, 50), permutation(0, 1, 50))
    assert not np.array_equal(permutation(0, 0, 50), permutation(1, 0, 50))


def test_a_batch_that_the_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a global batch of 9 is not divisible by 2 ranks; change global_batch_size"):
        RandomAccessSampler(0, [every(50)], [9], 0, 2, 0, 1)


def test_epochs_may_grow() -> None:
    """A cache that is still being built gives each epoch its own samples and length, also after resuming."""
    sets = [np.arange(10, 31), np.arange(50), np.arange(0, 100, 2), np.arange(7)]
    batches = list(global_batches(3, lambda epoch: sets[min(epoch, 3)], 7, 0, 3 + 7 + 7 + 4))
    assert [epoch for epoch, _ in batches] == [0] * 3 + [1] * 7 + [2] * 7 + [3, 4, 5, 6]
    for epoch in range(5):
        seen = np.concatenate([indices for e, indices in batches if e == epoch])
        assert len(set(seen.tolist())) == len(seen)
        assert set(seen.tolist()) <= set(sets[min(epoch, 3)].tolist())
    for start in (0, 2, 3, 9, 11, 20):
        tail = list(global_batches(3, lambda epoch: sets[min(epoch, 3)], 7, start, 21))
        assert all(a[0] == b[0] and (a[1] == b[1]).all() for a, b in zip(tail, batches[start:], strict=True))

"""The order of samples: full cover, disjoint ranks, independence from the layout, resume."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from threetowers.trainer.data.order import RankBatches, global_batches, permutation


@given(st.integers(0, 5), st.integers(1, 97), st.integers(1, 40))
def test_an_epoch_visits_each_sample_once(seed: int, samples: int, batch: int) -> None:
    if samples < batch:
        with pytest.raises(ValueError, match="lower `batch`"):
            list(global_batches(seed, samples, batch, 0, 1))
        return
    per_epoch = samples // batch
    epochs = list(global_batches(seed, samples, batch, 0, 2 * per_epoch))
    for epoch in (0, 1):
        seen = np.concatenate([indices for e, indices in epochs if e == epoch])
        assert len(seen) == per_epoch * batch
        assert len(set(seen.tolist())) == len(seen)
        assert seen.min() >= 0
        assert seen.max() < samples


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_split_the_same_global_batches(ranks: int) -> None:
    batch, samples = 12, 61
    shares = [list(RankBatches(3, samples, batch, rank, ranks, 4, 13)) for rank in range(ranks)]
    for step, (epoch, indices) in enumerate(global_batches(3, samples, batch, 4, 13)):
        joined = [address for share in shares for address in share[step]]
        assert joined == [(epoch, i) for i in indices.tolist()]


def test_a_resumed_order_is_the_tail_of_the_whole() -> None:
    whole = list(RankBatches(0, 50, 8, 1, 2, 0, 20))
    assert list(RankBatches(0, 50, 8, 1, 2, 13, 20)) == whole[13:]


def test_epochs_and_seeds_differ() -> None:
    assert not np.array_equal(permutation(0, 0, 50), permutation(0, 1, 50))
    assert not np.array_equal(permutation(0, 0, 50), permutation(1, 0, 50))


def test_indivisible_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="batch 9 is not divisible by 2 ranks"):
        RankBatches(0, 50, 9, 0, 2, 0, 1)

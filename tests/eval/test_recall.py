"""Recalls, chance levels, duplicates and the flat forms that go into a record."""

import itertools

import numpy as np
import pytest

from threetowers.eval.metrics.recall import (
    chance_recall,
    count_duplicates,
    direction_metrics,
    evaluate_retrieval,
    hit_rate,
)
from threetowers.eval.metrics.retrieval_ranks import RetrievalRanks


def test_metrics_of_known_ranks() -> None:
    ranks = RetrievalRanks(
        optimistic_N=np.array([0, 0, 3, 8, -1]),
        pessimistic_N=np.array([0, 1, 4, 11, -1]),
        positives_N=np.array([1, 2, 1, 1, 0]),
        gallery=20,
    )
    summary = direction_metrics(ranks)
    assert summary.recall == {1: 0.25, 5: 0.75, 10: 0.75}
    assert summary.recall_optimistic == {1: 0.5, 5: 0.75, 10: 1.0}
    assert summary.median_rank == 3.5  # of 1, 2, 5 and 12
    assert summary.mean_reciprocal_rank == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 12) / 4)
    assert (summary.queries, summary.excluded, summary.tied) == (4, 1, 3)
    with pytest.raises(ValueError, match="k >= 1"):
        direction_metrics(ranks, ks=(0, 5))


@pytest.mark.parametrize(("gallery", "positives", "k"), [(6, 1, 1), (6, 2, 3), (5, 4, 2), (4, 2, 9)])
def test_chance_equals_the_mean_over_all_orders(gallery: int, positives: int, k: int) -> None:
    orders = list(itertools.permutations(range(gallery)))
    expected = np.mean([min(order[:positives]) < k for order in orders])  # order[i]: the place item i got
    assert chance_recall(np.array([positives]), gallery, k) == pytest.approx(expected)


def test_chance_averages_over_queries() -> None:
    assert chance_recall(np.array([1, 3, 3]), 10, 1) == pytest.approx((0.1 + 0.3 + 0.3) / 3)


def test_duplicates_are_counted_by_hash() -> None:
    assert count_duplicates("abca", [0, 1, 2, 3]) == {"duplicates": 2, "duplicates_across_groups": 2}
    assert count_duplicates("aabbc", [0, 0, 1, 2, 3]) == {"duplicates": 4, "duplicates_across_groups": 2}
    with pytest.raises(ValueError, match="3 hashes for 2 items"):
        count_duplicates("abc", [0, 1])


def test_a_duplicate_in_another_group_costs_the_pessimistic_rank_only() -> None:
    vectors = np.eye(6, dtype=np.float32)
    vectors[3] = vectors[0]
    groups = np.arange(6)
    result = evaluate_retrieval(vectors, vectors, groups, groups, image_hashes="abcaef", text_hashes="abcdef")
    assert result.text_to_image.recall[1] == pytest.approx(4 / 6)
    assert result.text_to_image.recall_optimistic[1] == 1.0
    counts = result.counts()
    assert counts["image_duplicates_across_groups"] == 2
    assert counts["caption_duplicates"] == 0
    assert counts["text_to_image/tied"] == 2
    metrics = result.metrics()
    assert metrics["text_to_image/recall@1"] == result.text_to_image.recall[1]
    assert metrics["image_to_text/chance@5"] == pytest.approx(5 / 6)
    assert all(type(value) is float for value in metrics.values())
    assert all(type(value) is int for value in counts.values())


def test_hit_rate_ignores_padding_and_refuses_too_few_neighbours() -> None:
    gallery_group = np.array([4, 5])
    found = np.array([[-1, -1], [0, 1], [1, -1]])
    assert hit_rate(found, np.array([5, 5, 6]), gallery_group, ks=(1, 2)) == {1: 0.0, 2: 0.5}
    with pytest.raises(ValueError, match=r"recall@5 of 3 queries needs .* got \(3, 2\)"):
        hit_rate(found, np.array([5, 5, 6]), gallery_group, ks=(1, 5))

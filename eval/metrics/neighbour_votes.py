"""k-nearest-neighbour classification in the embedding space, searched exactly with FAISS."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.metrics.classification import Floats, Ints
from threetowers.eval.search.index import Device, build_index

NEIGHBOUR_KS = (1, 5, 10, 20)
TEMPERATURE = 0.07


def neighbour_votes(
    train_MD: Floats,
    train_label_M: Ints,
    test_ND: Floats,
    classes: int,
    ks: Sequence[int] = NEIGHBOUR_KS,
    *,
    temperature: float = TEMPERATURE,
    device: Device = "auto",
) -> dict[str, Floats]:
    """Return the votes (N, C) of the k nearest training items, by name: `majority@k` and `weighted@k`.

    `majority@k` counts a vote each; classes with equal counts are ordered by the summed cosine of their votes.
    `weighted@k` weights a vote by exp(cosine / temperature) (Wu et al., CVPR 2018, eq. 9), relative to the nearest
    neighbour's weight.

    Args:
        train_MD: Unit-norm embeddings of the training items.
        train_label_M: Their classes, each in 0..C - 1.
        test_ND: Unit-norm embeddings of the items to classify.
        classes: Number of classes C.
        ks: Numbers of neighbours, each in 1..M.
        temperature: Of the weighted votes.
        device: Where FAISS searches.

    Raises:
        ValueError: For a k beyond the training items, and for embeddings that are empty or not finite.
    """
    check_neighbours(ks, len(train_MD))
    neighbours = build_index(train_MD, device=device).search(test_ND, max(ks))
    labels_NK = train_label_M[neighbours.ids_NK]
    cosines_NK = neighbours.scores_NK
    weights_NK = np.exp((cosines_NK - cosines_NK[:, :1]) / temperature)
    votes: dict[str, Floats] = {}
    for k in ks:
        count_NC = _sum_by_class(labels_NK[:, :k], np.ones_like(weights_NK[:, :k]), classes)
        nearness_NC = _sum_by_class(labels_NK[:, :k], cosines_NK[:, :k], classes)
        # Summed cosines of k neighbours differ by less than 2k, so this only decides between equal counts.
        votes[f"majority@{k}"] = count_NC + nearness_NC / np.float32(4 * k)
        votes[f"weighted@{k}"] = _sum_by_class(labels_NK[:, :k], weights_NK[:, :k], classes)
    return votes


def check_neighbours(ks: Sequence[int], count: int) -> None:
    """Check numbers of neighbours against the number of training items.

    Raises:
        ValueError: For no k at all, and for a k outside of 1..count.
    """
    if not ks or not 1 <= min(ks) <= max(ks) <= count:
        raise ValueError(f"k of {tuple(ks)} over {count} training items: expected each from 1 to {count}")


def _sum_by_class(labels_NK: Ints, weights_NK: NDArray[np.float32], classes: int) -> Floats:
    """Return the summed weights (N, C) of each item's neighbours by their class."""
    count = len(labels_NK)
    cells_NK = labels_NK + classes * np.arange(count)[:, None]
    sums = np.bincount(cells_NK.ravel(), weights=weights_NK.ravel(), minlength=count * classes)
    return sums.reshape(count, classes).astype(np.float32)

"""k-nearest-neighbour classification in the embedding space, searched exactly with FAISS."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.metrics.classification import Floats, Ints
from threetowers.eval.search.index import build_index

KS = (1, 5, 10, 20)
TEMPERATURE = 0.07


def neighbour_votes(
    train_MD: Floats,
    train_label_M: Ints,
    test_ND: Floats,
    classes: int,
    ks: Sequence[int] = KS,
    *,
    temperature: float = TEMPERATURE,
) -> dict[str, Floats]:
    """Return votes (N, classes) by name: `majority@k`, and `weighted@k` by exp(cosine / temperature).

    Both embeddings are unit-norm. A majority that is tied goes to the class whose votes are nearer, by summed cosine;
    weights as in Wu et al. (CVPR 2018), eq. 9, divided by the nearest one's. Raises ValueError for a k beyond the
    training items and for what the index refuses.
    """
    check_neighbours(ks, len(train_MD))
    found = build_index(train_MD).search(test_ND, max(ks))
    labels_NK = train_label_M[found.ids_NK]
    weights_NK = np.exp((found.scores_NK - found.scores_NK[:, :1]) / temperature)
    votes: dict[str, Floats] = {}
    for k in ks:
        nearness_NC = _added(labels_NK[:, :k], found.scores_NK[:, :k], classes)
        # Cosines of k neighbours differ by less than 2k in sum, so this decides between equal counts only.
        count_NC = _added(labels_NK[:, :k], np.ones_like(weights_NK[:, :k]), classes)
        votes[f"majority@{k}"] = count_NC + nearness_NC / np.float32(4 * k)
        votes[f"weighted@{k}"] = _added(labels_NK[:, :k], weights_NK[:, :k], classes)
    return votes


def check_neighbours(ks: Sequence[int], count: int) -> None:
    """Raises ValueError for a k that is not in 1..count."""
    if not ks or not 1 <= min(ks) <= max(ks) <= count:
        raise ValueError(f"k of {tuple(ks)} over {count} training items: choose each from 1 to that many")


def _added(labels_NK: Ints, weights_NK: NDArray[np.float32], classes: int) -> Floats:
    count = len(labels_NK)
    cells = labels_NK + classes * np.arange(count)[:, None]
    sums = np.bincount(cells.ravel(), weights=weights_NK.ravel(), minlength=count * classes)
    return sums.reshape(count, classes).astype(np.float32)

"""Image-text retrieval metrics: recall@k, median rank and mean reciprocal rank, from exact ranks."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from threetowers.eval.metrics.retrieval_ranks import NO_POSITIVE, RetrievalRanks, group_ids, two_way_ranks

RECALL_KS = (1, 5, 10)


@dataclass(frozen=True)
class DirectionMetrics:
    """Metrics of one retrieval direction.

    `recall`, `median_rank`, `mean_reciprocal_rank` and `rank_N` use the pessimistic rank: ties count against the model,
    so that one which gives all pairs the same score has no recall.

    Attributes:
        recall: Recall@k by k, in 0..1.
        recall_optimistic: The same with every tie won.
        chance: Expected recall@k of a uniformly random order.
        median_rank: Counted from 1.
        mean_reciprocal_rank: Mean of 1 / rank, in 0..1.
        queries: How many queries have a match in the gallery; the means are over these.
        excluded: How many have none.
        tied: How many have an optimistic rank that differs from the pessimistic one.
        rank_N: Rank of each query, counted from 0; `NO_POSITIVE` where it is excluded.
    """

    recall: Mapping[int, float]
    recall_optimistic: Mapping[int, float]
    chance: Mapping[int, float]
    median_rank: float
    mean_reciprocal_rank: float
    queries: int
    excluded: int
    tied: int
    rank_N: NDArray[np.int64] = field(compare=False, repr=False)

    def items(self) -> dict[str, NDArray[np.float32]]:
        """Return the values (N,) that the metrics are means of, NaN for an excluded query; `rank` counts from 1."""
        rank_N = np.where(self.rank_N == NO_POSITIVE, np.nan, self.rank_N + 1).astype(np.float32)
        excluded_N = np.isnan(rank_N)
        items: dict[str, NDArray[np.float32]] = {}
        for k in self.recall:
            items[f"recall@{k}"] = np.where(excluded_N, np.nan, rank_N <= k).astype(np.float32)
        items["mean_reciprocal_rank"] = np.reciprocal(rank_N)
        items["rank"] = rank_N
        return items

    def metrics(self) -> dict[str, float]:
        """Return the metrics as one flat mapping, for example `recall@5`, `recall@5_optimistic`, `chance@5`."""
        flat = {f"recall@{k}": value for k, value in self.recall.items()}
        flat |= {f"recall@{k}_optimistic": value for k, value in self.recall_optimistic.items()}
        flat |= {f"chance@{k}": value for k, value in self.chance.items()}
        return flat | {"median_rank": self.median_rank, "mean_reciprocal_rank": self.mean_reciprocal_rank}


@dataclass(frozen=True)
class RetrievalMetrics:
    """Both directions over one gallery, with the sizes of what was compared.

    Attributes:
        image_to_text: Images as queries, captions as the gallery.
        text_to_image: Captions as queries, images as the gallery.
        images: Number of images.
        captions: Number of captions.
        groups: Number of distinct groups on either side.
        duplicates: Counts of exact duplicates by name, where hashes were given (see `count_duplicates`).
        image_group_N: Group id of each image.
        text_group_M: Group id of each caption.
    """

    image_to_text: DirectionMetrics
    text_to_image: DirectionMetrics
    images: int
    captions: int
    groups: int
    duplicates: Mapping[str, int]
    image_group_N: NDArray[np.int64] = field(compare=False, repr=False)
    text_group_M: NDArray[np.int64] = field(compare=False, repr=False)

    def directions(self) -> dict[str, DirectionMetrics]:
        """Return the metrics of each direction by its name."""
        return {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}

    def items(self) -> dict[str, NDArray[Any]]:
        """Return the values of each query, `image_to_text/recall@1` and so on, and `<direction>/group`, its group."""
        items: dict[str, NDArray[Any]] = {}
        for name, direction in self.directions().items():
            for key, value_N in direction.items().items():
                items[f"{name}/{key}"] = value_N
        items["image_to_text/group"] = self.image_group_N
        items["text_to_image/group"] = self.text_group_M
        return items

    def metrics(self) -> dict[str, float]:
        """Return `image_to_text/recall@1`, `text_to_image/median_rank` and so on, as a record holds them."""
        metrics = {}
        for name, direction in self.directions().items():
            for key, value in direction.metrics().items():
                metrics[f"{name}/{key}"] = value
        return metrics

    def counts(self) -> dict[str, int]:
        """Return images, captions, groups, duplicates, and each direction's scored, excluded and tied queries."""
        counts = {"images": self.images, "captions": self.captions, "groups": self.groups, **self.duplicates}
        for name, direction in self.directions().items():
            counts[f"{name}/queries"] = direction.queries
            counts[f"{name}/excluded"] = direction.excluded
            counts[f"{name}/tied"] = direction.tied
        return counts


def evaluate_retrieval(
    image_ND: ArrayLike | Tensor,
    text_MD: ArrayLike | Tensor,
    image_group_N: ArrayLike | Tensor,
    text_group_M: ArrayLike | Tensor,
    *,
    image_hashes: Sequence[Hashable] | None = None,
    text_hashes: Sequence[Hashable] | None = None,
    ks: Sequence[int] = RECALL_KS,
    chunk: int = 2048,
    device: str | torch.device = "cpu",
) -> RetrievalMetrics:
    """Evaluate retrieval in both directions; an image and a caption match iff their group ids are equal.

    Image → text counts a hit if any caption of the image's group is among the k best captions; text → image averages
    over captions.

    Args:
        image_ND: Unit-norm image embeddings.
        text_MD: Unit-norm caption embeddings.
        image_group_N: Group id of each image.
        text_group_M: Group id of each caption.
        image_hashes: Of the bytes of each image; adds counts of exact duplicates.
        text_hashes: Of each caption; likewise.
        ks: Each k of the recalls.
        chunk: Rows and columns of a tile of scores (see `two_way_ranks`).
        device: Where scores are computed.

    Raises:
        ValueError: For what `two_way_ranks` refuses, for hash lists of the wrong length, and if no query of a direction
            has a match.
    """
    image_ranks, text_ranks = two_way_ranks(image_ND, text_MD, image_group_N, text_group_M, chunk=chunk, device=device)
    image_groups = group_ids(image_group_N, "image").numpy()
    text_groups = group_ids(text_group_M, "text").numpy()
    duplicates: dict[str, int] = {}
    for name, hashes, groups in (("image", image_hashes, image_groups), ("caption", text_hashes, text_groups)):
        if hashes is not None:
            for key, count in count_duplicates(hashes, groups.tolist()).items():
                duplicates[f"{name}_{key}"] = count
    return RetrievalMetrics(
        image_to_text=direction_metrics(image_ranks, ks),
        text_to_image=direction_metrics(text_ranks, ks),
        images=len(image_groups),
        captions=len(text_groups),
        groups=len(np.union1d(image_groups, text_groups)),
        duplicates=duplicates,
        image_group_N=image_groups,
        text_group_M=text_groups,
    )


def direction_metrics(ranks: RetrievalRanks, ks: Sequence[int] = RECALL_KS) -> DirectionMetrics:
    """Return the metrics of one direction over the queries that have a match.

    Raises:
        ValueError: If none has, or for a k below 1.
    """
    answerable_N = ranks.answerable_N
    queries = int(answerable_N.sum())
    if queries == 0:
        raise ValueError(
            f"none of {len(answerable_N)} queries has a match among {ranks.gallery} gallery items: "
            "images and captions must share group ids"
        )
    if not ks or min(ks) < 1:
        raise ValueError(f"recall@k needs k >= 1, got ks={tuple(ks)}")
    optimistic_n = ranks.optimistic_N[answerable_N]
    pessimistic_n = ranks.pessimistic_N[answerable_N]
    positives_n = ranks.positives_N[answerable_N]
    return DirectionMetrics(
        recall={k: float((pessimistic_n < k).mean()) for k in ks},
        recall_optimistic={k: float((optimistic_n < k).mean()) for k in ks},
        chance={k: chance_recall(positives_n, ranks.gallery, k) for k in ks},
        median_rank=float(np.median(pessimistic_n)) + 1,
        mean_reciprocal_rank=float((1 / (1 + pessimistic_n)).mean()),
        queries=queries,
        excluded=len(answerable_N) - queries,
        tied=int((optimistic_n != pessimistic_n).sum()),
        rank_N=ranks.pessimistic_N,
    )


def chance_recall(positives_N: NDArray[np.int64], gallery: int, k: int) -> float:
    """Return the expected recall@k of a uniformly random order.

    It is the mean over queries of 1 - C(gallery - p, k) / C(gallery, k), with p the positives of a query.
    """
    drawn = np.arange(min(k, gallery))
    counts, weights = np.unique(positives_N, return_counts=True)
    miss = np.prod(np.clip(gallery - counts[:, None] - drawn, 0, None) / (gallery - drawn), axis=1)
    return float(1 - np.average(miss, weights=weights))


def hit_rate(
    neighbours_NK: NDArray[np.int64],
    query_group_N: ArrayLike,
    gallery_group_M: ArrayLike,
    ks: Sequence[int] = RECALL_KS,
) -> dict[int, float]:
    """Return recall@k by k of the neighbours that a search index found, over the queries that have a match.

    For an exact index, and where no scores tie, this equals the recall of `evaluate_retrieval`; for an approximate one
    the difference is the cost of the approximation.

    Args:
        neighbours_NK: Gallery rows found for each query, best first, -1 for none.
        query_group_N: Group id of each query.
        gallery_group_M: Group id of each gallery item.
        ks: Each k, at most K.

    Raises:
        ValueError: If `neighbours_NK` holds fewer than max(ks) columns.
    """
    query_groups = np.asarray(query_group_N)
    gallery_groups = np.asarray(gallery_group_M)
    if neighbours_NK.ndim != 2 or len(neighbours_NK) != len(query_groups) or neighbours_NK.shape[1] < max(ks):
        raise ValueError(
            f"recall@{max(ks)} of {len(query_groups)} queries needs neighbours of shape "
            f"({len(query_groups)}, >= {max(ks)}), got {neighbours_NK.shape}: search with a larger k"
        )
    found_NK = (neighbours_NK >= 0) & (gallery_groups[neighbours_NK] == query_groups[:, None])
    found_NK = found_NK[np.isin(query_groups, gallery_groups)]
    return {k: float(found_NK[:, :k].any(axis=1).mean()) for k in ks}


def count_duplicates(hashes: Sequence[Hashable], groups: Sequence[int]) -> dict[str, int]:
    """Count the items that equal another item: `duplicates` in any group, `duplicates_across_groups` in another one.

    Even a perfect model cannot tell a copy in another group from a match.

    Raises:
        ValueError: If there is not one hash per item.
    """
    if len(hashes) != len(groups):
        raise ValueError(f"got {len(hashes)} hashes for {len(groups)} items: expected one per item, in the same order")
    copies = Counter(hashes)
    groups_of = Counter(item_hash for item_hash, _ in set(zip(hashes, groups, strict=True)))
    duplicates = 0
    across_groups = 0
    for item_hash, count in copies.items():
        if count > 1:
            duplicates += count
        if groups_of[item_hash] > 1:
            across_groups += count
    return {"duplicates": duplicates, "duplicates_across_groups": across_groups}

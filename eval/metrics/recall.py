"""Cross-modal retrieval: recalls, medians and counts computed from exact ranks."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from threetowers.eval.metrics.retrieval_ranks import NO_POSITIVE, RetrievalRanks, group_ids, two_way_ranks

KS = (1, 5, 10)


@dataclass(frozen=True)
class Direction:
    """Metrics of one retrieval direction; recalls are fractions in 0..1, keyed by k.

    `recall` (the headline), `median_rank` (1-based) and `mean_reciprocal_rank` use the pessimistic rank, so a model
    that scores everything alike scores nothing. `chance` is the expected recall of a random order. `queries` were
    scored; `excluded` had no match in the gallery; `tied` have a different optimistic and pessimistic rank.
    """

    recall: Mapping[int, float]
    recall_optimistic: Mapping[int, float]
    chance: Mapping[int, float]
    median_rank: float
    mean_reciprocal_rank: float
    queries: int
    excluded: int
    tied: int
    rank_N: NDArray[np.int64] = field(compare=False, repr=False)  # 0-based, pessimistic; `NO_POSITIVE` where excluded

    def items(self) -> dict[str, NDArray[np.float32]]:
        """Per query what the means are of, NaN where it is excluded; `rank` counts from 1."""
        rank_N = np.where(self.rank_N == NO_POSITIVE, np.nan, self.rank_N + 1).astype(np.float32)
        excluded_N = np.isnan(rank_N)
        found: dict[str, NDArray[np.float32]] = {
            f"recall@{k}": np.where(excluded_N, np.nan, rank_N <= k).astype(np.float32) for k in self.recall
        }
        found["mean_reciprocal_rank"] = np.reciprocal(rank_N)
        found["rank"] = rank_N
        return found

    def metrics(self) -> dict[str, float]:
        """The numbers as one flat mapping, e.g. `recall@5`, `recall@5_optimistic`, `chance@5`."""
        flat = {f"recall@{k}": value for k, value in self.recall.items()}
        flat |= {f"recall@{k}_optimistic": value for k, value in self.recall_optimistic.items()}
        flat |= {f"chance@{k}": value for k, value in self.chance.items()}
        return flat | {"median_rank": self.median_rank, "mean_reciprocal_rank": self.mean_reciprocal_rank}


@dataclass(frozen=True)
class Retrieval:
    """Both directions over one gallery, with the counts that say what was compared."""

    image_to_text: Direction
    text_to_image: Direction
    images: int
    captions: int
    groups: int
    duplicates: Mapping[str, int]
    image_group_N: NDArray[np.int64] = field(compare=False, repr=False)
    text_group_M: NDArray[np.int64] = field(compare=False, repr=False)

    def items(self) -> dict[str, NDArray[Any]]:
        """`image_to_text/recall@1` and so on for each query, ready for an answer's items; a group is a unit."""
        sides = (("image_to_text", self.image_to_text), ("text_to_image", self.text_to_image))
        found: dict[str, NDArray[Any]] = {f"{n}/{key}": x for n, side in sides for key, x in side.items().items()}
        return found | {"image_to_text/group": self.image_group_N, "text_to_image/group": self.text_group_M}

    def metrics(self) -> dict[str, float]:
        """`image_to_text/recall@1`, `text_to_image/median_rank` and so on, ready for a result record."""
        return {
            f"{name}/{key}": value
            for name, direction in (("image_to_text", self.image_to_text), ("text_to_image", self.text_to_image))
            for key, value in direction.metrics().items()
        }

    def counts(self) -> dict[str, int]:
        """Images, captions, groups, duplicates, and each direction's scored, excluded and tied queries."""
        counts = {"images": self.images, "captions": self.captions, "groups": self.groups, **self.duplicates}
        for name, direction in (("image_to_text", self.image_to_text), ("text_to_image", self.text_to_image)):
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
    ks: Sequence[int] = KS,
    chunk: int = 2048,
    device: str | torch.device = "cpu",
) -> Retrieval:
    """Retrieval both ways with unit-norm embeddings; an image and a caption match iff their group ids are equal.

    Image→text counts a hit if any caption of the image's group is among the k best captions; text→image averages over
    captions. `image_hashes` and `text_hashes` (of the bytes, of the strings) add counts of exact duplicates, and of
    those with a copy in another group, which even a perfect model cannot tell from a match.

    Raises ValueError for what `ranks` refuses and for hash lists of the wrong length.
    """
    image_ranks, text_ranks = two_way_ranks(image_ND, text_MD, image_group_N, text_group_M, chunk=chunk, device=device)
    image_groups, text_groups = group_ids(image_group_N, "image").numpy(), group_ids(text_group_M, "text").numpy()
    duplicates: dict[str, int] = {}
    for name, hashes, groups in (("image", image_hashes, image_groups), ("caption", text_hashes, text_groups)):
        if hashes is not None:
            duplicates |= {f"{name}_{key}": count for key, count in count_duplicates(hashes, groups.tolist()).items()}
    return Retrieval(
        image_to_text=summarise(image_ranks, ks),
        text_to_image=summarise(text_ranks, ks),
        images=len(image_groups),
        captions=len(text_groups),
        groups=len(np.union1d(image_groups, text_groups)),
        duplicates=duplicates,
        image_group_N=image_groups,
        text_group_M=text_groups,
    )


def summarise(ranks: RetrievalRanks, ks: Sequence[int] = KS) -> Direction:
    """Recalls, median and mean reciprocal rank over the queries that have a match. Raises ValueError if none has."""
    answerable_N = ranks.answerable_N
    queries = int(answerable_N.sum())
    if queries == 0:
        raise ValueError(
            f"none of {len(answerable_N)} queries has a match among {ranks.gallery} gallery items: "
            "images and captions must share group ids"
        )
    if not ks or min(ks) < 1:
        raise ValueError(f"recall@k needs k >= 1, got ks={tuple(ks)}")
    optimistic, pessimistic = ranks.optimistic_N[answerable_N], ranks.pessimistic_N[answerable_N]
    return Direction(
        recall={k: float((pessimistic < k).mean()) for k in ks},
        recall_optimistic={k: float((optimistic < k).mean()) for k in ks},
        chance={k: chance_recall(ranks.positives_N[answerable_N], ranks.gallery, k) for k in ks},
        median_rank=float(np.median(pessimistic)) + 1,
        mean_reciprocal_rank=float((1 / (1 + pessimistic)).mean()),
        queries=queries,
        excluded=len(answerable_N) - queries,
        tied=int((optimistic != pessimistic).sum()),
        rank_N=ranks.pessimistic_N,
    )


def chance_recall(positives_N: NDArray[np.int64], gallery: int, k: int) -> float:
    """Expected recall@k of a uniformly random order: the mean of 1 - C(gallery - p, k) / C(gallery, k) over queries."""
    drawn = np.arange(min(k, gallery))
    counts, weights = np.unique(positives_N, return_counts=True)
    miss = np.prod(np.clip(gallery - counts[:, None] - drawn, 0, None) / (gallery - drawn), axis=1)
    return float(1 - np.average(miss, weights=weights))


def hit_rate(
    neighbours_NK: NDArray[np.int64], query_group_N: ArrayLike, gallery_group_M: ArrayLike, ks: Sequence[int] = KS
) -> dict[int, float]:
    """Recall@k of a search index's neighbour ids (best first, -1 for none), over the queries that have a match.

    Where no scores tie this equals the recall from `ranks` for an exact index; for an approximate one the difference is
    what the approximation costs. Raises ValueError if `neighbours_NK` holds fewer than max(ks) columns.
    """
    query_groups, gallery_groups = np.asarray(query_group_N), np.asarray(gallery_group_M)
    if neighbours_NK.ndim != 2 or len(neighbours_NK) != len(query_groups) or neighbours_NK.shape[1] < max(ks):
        raise ValueError(
            f"recall@{max(ks)} of {len(query_groups)} queries needs neighbours of shape "
            f"({len(query_groups)}, >= {max(ks)}), got {neighbours_NK.shape}: search with a larger k"
        )
    found_NK = (neighbours_NK >= 0) & (gallery_groups[neighbours_NK] == query_groups[:, None])
    found_NK = found_NK[np.isin(query_groups, gallery_groups)]
    return {k: float(found_NK[:, :k].any(axis=1).mean()) for k in ks}


def count_duplicates(hashes: Sequence[Hashable], groups: Sequence[int]) -> dict[str, int]:
    """Items that equal another item: `duplicates` in any group, `duplicates_across_groups` with a copy in another one.

    Raises ValueError if there is not one hash per item.
    """
    if len(hashes) != len(groups):
        raise ValueError(f"got {len(hashes)} hashes for {len(groups)} items: pass one hash per item, in the same order")
    copies = Counter(hashes)
    groups_holding = Counter(hash_ for hash_, _ in set(zip(hashes, groups, strict=True)))
    return {
        "duplicates": sum(count for count in copies.values() if count > 1),
        "duplicates_across_groups": sum(copies[hash_] for hash_, held in groups_holding.items() if held > 1),
    }

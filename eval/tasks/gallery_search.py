"""The retrieval task: one model's embeddings of a gallery, their recalls both ways, and examples to look at."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from threetowers.eval.datasets.evaluation_set import EvaluationSet, Floats
from threetowers.eval.datasets.gallery import Gallery, Ids, encoded
from threetowers.eval.metrics.recall import RECALL_KS, evaluate_retrieval, hit_rate
from threetowers.eval.record import EvalResult, Example, Shown
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.search.index import VectorIndex, build_index, recall_against_exact

NEIGHBOURS = max(RECALL_KS)
SHOWN = 5
MAPPED = 1000  # points of each kind in an embedding map
TO_IMAGES, TO_TEXTS = "Caption → images", "Image → captions"
MISSED = "Missed most: "


class GallerySearch:
    """One model's embeddings of a gallery, indexed both ways."""

    def __init__(self, gallery: Gallery, image_ND: Floats, text_MD: Floats, spec: str, parameters: str = "") -> None:
        self.gallery = gallery
        self.image_ND, self.text_MD = image_ND, text_MD
        self.images = build_index(image_ND, spec, parameters=parameters)
        self.texts = build_index(text_MD, spec, parameters=parameters)

    def answer(self, data: EvaluationSet, thumbnails: ThumbnailStore, examples: int, seed: int) -> EvalResult:
        """Recalls from exact ranks, and beside them what the index finds; per query its rank and hits.

        `examples` queries of each direction are the same for every model; as many again are its own worst.
        """
        gallery = self.gallery
        groups = gallery.image_group_N, gallery.text_group_M
        image_hashes = [xxhash.xxh3_64_intdigest(encoded(data, picture)) for picture in gallery.pictures]
        exact = evaluate_retrieval(
            self.image_ND, self.text_MD, *groups, image_hashes=image_hashes, text_hashes=gallery.captions
        )
        items = dict(exact.items()) | embedding_map(self.image_ND, self.text_MD, seed)
        # One concept's pictures and captions are no independent evidence, in this gallery or in another of the set.
        names = {number: p.group for p, number in zip(gallery.pictures, groups[0].tolist(), strict=True)}
        unit = {number: xxhash.xxh3_64_intdigest(name.encode()) >> 1 for number, name in names.items()}
        for direction, group_N in (("image_to_text", groups[0]), ("text_to_image", groups[1])):
            items[f"{direction}/group"] = np.array([unit[number] for number in group_N.tolist()], dtype=np.int64)
        chosen: list[Example] = []
        for heading, direction, count, show in (
            (TO_IMAGES, "text_to_image", len(gallery.captions), self._text_example),
            (TO_TEXTS, "image_to_text", len(gallery.pictures), self._image_example),
        ):
            rank_N = items[f"{direction}/rank"]
            common = _choose(count, examples, seed + (heading == TO_TEXTS))
            worst = [row for row in np.argsort(-rank_N, kind="stable").tolist() if rank_N[row] > 1][:examples]
            show_: Callable[[str, int, float, EvaluationSet, ThumbnailStore], Example] = show
            for name, rows in ((heading, common), (MISSED + heading.lower(), worst)):
                chosen += [show_(name, row, float(rank_N[row]), data, thumbnails) for row in rows]
        return EvalResult(exact.metrics() | self._by_index(), exact.counts(), items, chosen)

    def _by_index(self) -> dict[str, float]:
        """What the index finds: its recall@k of matches and, if it is approximate, of the exact neighbours."""
        gallery, metrics = self.gallery, {}
        sides: list[tuple[str, VectorIndex, Floats, Floats, Ids, Ids]] = [
            ("image_to_text", self.texts, self.text_MD, self.image_ND, gallery.image_group_N, gallery.text_group_M),
            ("text_to_image", self.images, self.image_ND, self.text_MD, gallery.text_group_M, gallery.image_group_N),
        ]
        for name, index, vectors, queries, query_groups, gallery_groups in sides:
            k = min(NEIGHBOURS, index.size)
            found = index.search(queries, k).ids_NK
            if not index.exact:
                metrics[f"{name}/index_finds@{k}"] = recall_against_exact(index, vectors, queries, k)
            hits = hit_rate(found, query_groups, gallery_groups, [k_ for k_ in RECALL_KS if k_ <= k])
            metrics |= {f"{name}/recall@{k_}_index": value for k_, value in hits.items()}
        return metrics

    def _text_example(
        self, heading: str, row: int, rank: float, data: EvaluationSet, thumbnails: ThumbnailStore
    ) -> Example:
        gallery = self.gallery
        found = self.images.search(self.text_MD[row : row + 1], min(SHOWN, self.images.size))
        hits = gallery.image_group_N == gallery.text_group_M[row]
        answers = tuple(
            Shown(
                gallery.pictures[i].key, thumbnails.add(encoded(data, gallery.pictures[i])), float(score), bool(hits[i])
            )
            for i, score in zip(found.ids_NK[0], found.scores_NK[0], strict=True)
            if i >= 0
        )
        return Example(heading, Shown(gallery.captions[row]), answers, _whole(rank))

    def _image_example(
        self, heading: str, row: int, rank: float, data: EvaluationSet, thumbnails: ThumbnailStore
    ) -> Example:
        gallery = self.gallery
        found = self.texts.search(self.image_ND[row : row + 1], min(SHOWN, self.texts.size))
        hits = gallery.text_group_M == gallery.image_group_N[row]
        answers = tuple(
            Shown(gallery.captions[i], None, float(score), bool(hits[i]))
            for i, score in zip(found.ids_NK[0], found.scores_NK[0], strict=True)
            if i >= 0
        )
        picture = gallery.pictures[row]
        return Example(heading, Shown(picture.key, thumbnails.add(encoded(data, picture))), answers, _whole(rank))


def embedding_map(image_ND: Floats, text_MD: Floats, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Places of some images and captions on the two main axes of both (PCA): `map/images`, `map/texts` (n, 2).

    `map/explained` (2,) is the share of the variance each axis carries.
    """
    rng = np.random.default_rng(seed)
    parts = [np.asarray(x[np.sort(rng.permutation(len(x))[:MAPPED])], dtype=np.float64) for x in (image_ND, text_MD)]
    joint_ND = np.concatenate(parts)
    centred_ND = joint_ND - joint_ND.mean(axis=0)
    _, lengths, axes = np.linalg.svd(centred_ND, full_matrices=False)
    axes = axes[:2] if len(axes) > 1 else np.concatenate([axes, np.zeros_like(axes)])
    # The sign of an axis is arbitrary: its largest entry shall be positive.
    axes = axes * np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)] + 1e-300)[:, None]
    places = (centred_ND @ axes.T).astype(np.float32)
    share = np.pad(lengths**2, (0, 2))[:2] / max(float((lengths**2).sum()), 1e-300)
    return {
        "map/images": places[: len(parts[0])],
        "map/texts": places[len(parts[0]) :],
        "map/explained": share.astype(np.float32),
    }


def _whole(rank: float) -> int | None:
    return None if np.isnan(rank) else int(rank)


def _choose(count: int, wanted: int, seed: int) -> Sequence[int]:
    chosen: list[int] = np.random.default_rng(seed).permutation(count)[:wanted].tolist()
    return chosen

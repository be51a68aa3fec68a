"""One model's embeddings of a gallery, indexed both ways: recalls, and examples to look at."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from threetowers.eval.embed import EvaluationSet, Floats
from threetowers.eval.gallery import Gallery, Ids, encoded
from threetowers.eval.index import VectorIndex, build_index, recall_against_exact
from threetowers.eval.report import ImageExample, RetrievedCaption, RetrievedImage, TextExample
from threetowers.eval.retrieval import KS, evaluate_retrieval, hit_rate

NEIGHBOURS = max(KS)
SHOWN = 5


class GallerySearch:
    """One model's embeddings of a gallery, indexed both ways."""

    def __init__(self, gallery: Gallery, image_ND: Floats, text_MD: Floats, spec: str) -> None:
        self.gallery = gallery
        self.image_ND, self.text_MD = image_ND, text_MD
        self.images, self.texts = build_index(image_ND, spec), build_index(text_MD, spec)

    def metrics(
        self, image_hashes: Sequence[int], text_hashes: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, int]]:
        """Recalls from exact ranks, and beside them what the index finds."""
        groups = self.gallery.image_group_N, self.gallery.text_group_M
        exact = evaluate_retrieval(
            self.image_ND, self.text_MD, *groups, image_hashes=image_hashes, text_hashes=text_hashes
        )
        metrics = exact.metrics()
        sides: list[tuple[str, VectorIndex, Floats, Ids, Ids]] = [
            ("image_to_text", self.texts, self.image_ND, groups[0], groups[1]),
            ("text_to_image", self.images, self.text_MD, groups[1], groups[0]),
        ]
        for name, index, queries, query_groups, gallery_groups in sides:
            k = min(NEIGHBOURS, index.size)
            found = index.search(queries, k).ids_NK
            if not index.exact:
                vectors = self.text_MD if index is self.texts else self.image_ND
                metrics[f"{name}/index_finds@{k}"] = recall_against_exact(index, vectors, queries, k)
            ks = [k_ for k_ in KS if k_ <= k]
            for k_, value in hit_rate(found, query_groups, gallery_groups, ks).items():
                metrics[f"{name}/recall@{k_}_index"] = value
        return metrics, exact.counts()

    def text_examples(self, data: EvaluationSet, count: int, seed: int) -> list[TextExample]:
        """Some captions, the same for every model, with the images they retrieve."""
        gallery, examples = self.gallery, []
        for row in _choose(len(gallery.captions), count, seed):
            found = self.images.search(self.text_MD[row : row + 1], min(SHOWN, self.images.size))
            hits = gallery.image_group_N == gallery.text_group_M[row]
            retrieved = [
                RetrievedImage(encoded(data, gallery.pictures[i]), float(score), bool(hits[i]), gallery.pictures[i].key)
                for i, score in zip(found.ids_NK[0], found.scores_NK[0], strict=True)
                if i >= 0
            ]
            rank = _rank(self.image_ND @ self.text_MD[row], hits)
            examples.append(TextExample(gallery.captions[row], gallery.name, retrieved, rank))
        return examples

    def image_examples(self, data: EvaluationSet, count: int, seed: int) -> list[ImageExample]:
        """Some images, the same for every model, with the captions they retrieve."""
        gallery, examples = self.gallery, []
        for row in _choose(len(gallery.pictures), count, seed + 1):
            found = self.texts.search(self.image_ND[row : row + 1], min(SHOWN, self.texts.size))
            hits = gallery.text_group_M == gallery.image_group_N[row]
            retrieved = [
                RetrievedCaption(gallery.captions[i], float(score), bool(hits[i]))
                for i, score in zip(found.ids_NK[0], found.scores_NK[0], strict=True)
                if i >= 0
            ]
            picture = gallery.pictures[row]
            rank = _rank(self.text_MD @ self.image_ND[row], hits)
            examples.append(ImageExample(encoded(data, picture), gallery.name, retrieved, picture.key, rank))
        return examples


def _rank(scores: Floats, hits: npt.NDArray[np.bool_]) -> int | None:
    """The place of the best match, from 1; ties are lost."""
    if not hits.any():
        return None
    return 1 + int((scores[~hits] >= scores[hits].max()).sum())


def _choose(count: int, wanted: int, seed: int) -> list[int]:
    chosen: list[int] = np.random.default_rng(seed).permutation(count)[:wanted].tolist()
    return chosen

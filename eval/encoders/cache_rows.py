"""The rows of a cache as embeddings, images only: what the teacher alone is worth."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.eval.datasets.evaluation_set import EvaluationSet, Floats, Picture
from threetowers.eval.encoders.encoder import LoadOptions, ModelInfo, NoTextTower
from threetowers.eval.encoders.forward import RowView, forward_pictures
from threetowers.eval.encoders.image_source import teacher_view
from threetowers.trainer.data.cache_join import CacheJoin


class CachedRows:
    """A cached teacher: nothing is computed, each picture's row is read."""

    sees_text = False
    logit_scale = 1.0

    def __init__(self, path: str, loading: LoadOptions) -> None:
        """Raises ContractError where there is no cache."""
        self.path, self.loading = path, loading
        manifest = EmbeddingCache.open(path).manifest
        self.dim = manifest.dim
        self.facts = ModelInfo(
            name=f"cache:{Path(path).name}",
            digest=manifest.weights_digest,
            step=None,
            precision=manifest.dtype,
            preprocessing=teacher_view(manifest.preprocessing),
            cache_manifest=manifest.digest,
        )

    def image_batches(self, data: EvaluationSet, pictures: Sequence[Picture], raw: bool) -> Iterator[Floats]:
        join = CacheJoin(self.path, data.tars)
        return forward_pictures(pictures, RowView(join), lambda rows: rows, self.loading.batch_size, 0)

    def text_batches(self, captions: Sequence[str]) -> Iterator[Floats]:
        raise NoTextTower(f"{self.facts.name} sees images only: leave it out of tasks with captions or prompts")

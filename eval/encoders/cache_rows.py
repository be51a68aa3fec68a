"""The rows of a cache as embeddings, images only: a baseline of the teacher alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.eval.datasets.image_set import EvalImage, ImageSet
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.eval.encoders.encoder import Encoder, LoadOptions, ModelInfo
from threetowers.eval.encoders.fingerprint import model_fingerprint
from threetowers.eval.encoders.forward import RowView, forward_images
from threetowers.eval.encoders.image_source import describe_preprocessing
from threetowers.trainer.data.joins.image_join import ImageJoin


class CacheEncoder(Encoder):
    """A cached teacher: nothing is computed, the row of each image is read."""

    sees_text = False

    def __init__(self, path: str, options: LoadOptions) -> None:
        """Open the cache at `path`. Raises ManifestError where there is none, or one of text."""
        self.path = path
        self.options = options
        manifest = EmbeddingCache.open(path).manifest
        if manifest.of == "text":
            raise ManifestError(
                f"cache:{path}: expected a cache of images, found one of text: every task embeds images, so evaluate "
                f"its encoder ({manifest.encoder}), or a run that stands on it"
            )
        self.dim = manifest.dim
        self.info = ModelInfo(
            name=f"cache:{Path(path).name}",
            digest=manifest.weights_digest,
            step=None,
            precision=manifest.dtype,
            preprocessing=describe_preprocessing(manifest.image_preprocessing),
            fingerprint=model_fingerprint(kind="cache rows", manifest=manifest.digest),
            cache_manifest=manifest.digest,
        )

    def raw_image_batches(self, data: ImageSet, images: Sequence[EvalImage], features: bool) -> Iterator[Embeddings]:
        """Yield the stored rows of images, which are both embeddings and features."""
        join = ImageJoin(self.path, data.tars)
        return forward_images(images, RowView(join), lambda rows: rows, self.options.batch_size, 0)

    def raw_text_batches(self, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Raise NoTextTower."""
        raise self.no_text_tower()

"""timm's models, by name or folder, images only: the features before the classifier."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from threetowers.cache.encoders.names import EncoderName, EncoderOptions, load_frozen_encoder
from threetowers.cache.encoders.timm_models import SOURCES
from threetowers.cache.format.manifest import EncoderPrecision
from threetowers.eval.datasets.image_set import EvalImage, ImageSet
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.eval.encoders.encoder import Encoder, LoadOptions, ModelInfo
from threetowers.eval.encoders.fingerprint import model_fingerprint
from threetowers.eval.encoders.forward import PixelView, TeacherTransform, forward_images
from threetowers.eval.encoders.image_source import describe_preprocessing


class TimmEncoder(Encoder):
    """A timm model, run as the teacher of a cache is. Its embeddings are its features."""

    sees_text = False

    def __init__(self, name: str, weights: str | None, options: LoadOptions) -> None:
        """Load a model by name or folder.

        Args:
            name: A timm model, `hf-hub:ORG/NAME`, or a folder it saved; it may end in @SIZE, the side of the input in
                pixels.
            weights: As of `cache build --weights`; None: timm's pretrained weights.
            options: How to run it.

        Raises:
            ValueError: The name, size, precision or runtime is not usable, or `load_timm_encoder` refuses the weights.
        """
        spec = f"timm:{name}"
        before, at, after = name.rpartition("@")
        size = None
        if at and after.isdecimal():
            name, size = before, int(after)
        elif at and not name.startswith(SOURCES) and not Path(name).is_dir():  # a revision on the hub follows an @ too
            raise ValueError(f"{spec}: expected the side of the input in pixels after '@'")
        if options.precision == "float16":
            raise ValueError(f"{spec}: timm models are run in float32 or bfloat16, not in float16")
        self.options = options
        # A teacher's bfloat16 is autocast over float32 weights, which is what mixed means.
        precision: EncoderPrecision = "bfloat16" if options.precision in ("mixed", "bfloat16") else "float32"
        encoder = load_frozen_encoder(
            EncoderName("timm", name, size, weights),
            EncoderOptions(device=options.torch_device(), precision=precision, runtime=options.runtime),
        )
        self.encoder = encoder.side("image")
        self.encoder.prepare()
        self.dim = self.encoder.width()
        self.info = ModelInfo(
            name=f"timm:{Path(encoder.name.rpartition(':')[2]).name}",
            digest=encoder.weights_digest,
            step=None,
            precision=precision,
            preprocessing=describe_preprocessing(self.encoder.preprocessing),
            fingerprint=model_fingerprint(
                kind="timm",
                weights=encoder.weights_digest,
                model=self.encoder.model,
                preprocessing=self.encoder.preprocessing,
                transform=self.encoder.transform,
                precision=precision,
                runtime=options.runtime,
            ),
        )

    def raw_image_batches(self, data: ImageSet, images: Sequence[EvalImage], features: bool) -> Iterator[Embeddings]:
        """Yield the model's features of images, which are also its embeddings."""
        view = PixelView(data.tars, TeacherTransform(self.encoder.transform), self.options.max_pixels)
        return forward_images(images, view, self.encoder.embed, self.options.batch_size, self.options.workers)

    def raw_text_batches(self, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Raise NoTextTower."""
        raise self.no_text_tower()

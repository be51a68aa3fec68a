"""Any frozen encoder as a model that is evaluated: its joint space of images and text, or its images alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from threetowers.cache.encoders.encoder import FrozenEncoder, ImageEncoder, TextEncoder
from threetowers.cache.encoders.names import PREFIXES, EncoderName, EncoderOptions, load_frozen_encoder
from threetowers.cache.encoders.weights_file import split_part
from threetowers.cache.format.manifest import EncoderPrecision
from threetowers.eval.datasets.image_set import EvalImage, ImageSet
from threetowers.eval.encoders.arithmetic import PrecisionName, weight_dtype
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.eval.encoders.encoder import Encoder, LoadOptions, ModelInfo
from threetowers.eval.encoders.fingerprint import model_fingerprint
from threetowers.eval.encoders.forward import PixelView, TeacherTransform, forward_captions, forward_images
from threetowers.eval.encoders.image_source import describe_preprocessing

JOINT, POOLED = "projected", "pooled"


class FrozenModel(Encoder):
    """A frozen encoder in evaluation.

    With a joint space its embeddings are those in it, and its features are the image side's `pooled`. Without one it
    sees images only, and both are the image side's default feature.
    """

    by_runtime = True

    def __init__(self, name: EncoderName, options: LoadOptions) -> None:
        """Load a model by name.

        Raises:
            ValueError: It cannot be loaded, or not be run as the options say, or it sees no images.
        """
        precision = options.precision or "float32"
        encoder = load_frozen_encoder(
            name,
            EncoderOptions(device=options.torch_device(), precision=_arithmetic(precision), runtime=options.runtime),
        )
        if encoder.image is None:
            raise ValueError(f"{name}: reads text only, and all tasks need images: evaluate an encoder of both")
        if (dtype := weight_dtype(precision)) != torch.float32:
            if options.runtime != "torch":
                raise ValueError(f"{name}: --runtime onnx: expected --precision float32, found {precision}")
            encoder = encoder.with_weights(dtype)
        joint = _has_joint_space(encoder)
        self.options = options
        self.image: ImageEncoder = encoder.side("image")
        self.text: TextEncoder | None = encoder.text if joint else None
        self.feature = JOINT if joint else self.image.features[0]
        self.probed = POOLED if joint and POOLED in self.image.features else self.feature
        self.sees_text = joint
        self.dim = self.image.width(self.feature)
        self.image.prepare([self.feature])
        if joint and encoder.logit_scale is not None:
            self.logit_scale = encoder.logit_scale
        self.info = ModelInfo(
            name=short_name(name),
            digest=encoder.weights_digest,
            step=None,
            precision=precision,
            preprocessing=describe_preprocessing(self.image.preprocessing),
            fingerprint=model_fingerprint(
                kind=name.kind,
                weights=encoder.weights_digest,
                image=[self.image.model, self.image.preprocessing, self.image.transform],
                text=[self.text.model, self.text.processing] if self.text else None,
                features=[self.feature, self.probed],
                precision=precision,
                runtime=options.runtime,
            ),
        )

    def raw_image_batches(self, data: ImageSet, images: Sequence[EvalImage], features: bool) -> Iterator[Embeddings]:
        """Yield embeddings of images, or with `features` what probes take."""
        feature = self.probed if features else self.feature
        view = PixelView(data.tars, TeacherTransform(self.image.transform), self.options.max_pixels)

        def forward(views: Tensor) -> Tensor:
            return self.image.embed(views, feature)

        return forward_images(images, view, forward, self.options.batch_size, self.options.workers)

    def raw_text_batches(self, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Yield embeddings of captions. Raises NoTextTower."""
        text = self.text
        if text is None:
            raise self.no_text_tower()

        def forward(batch: Sequence[str]) -> Tensor:
            return text.embed(batch, JOINT)

        return forward_captions(captions, forward, self.options.batch_size)


def short_name(name: EncoderName) -> str:
    """Return the name of a model in records and tables: without folders, without where weights lie."""
    model = name.name
    for prefix in PREFIXES:
        model = model.removeprefix(prefix)
    weights = (name.weights or "").removeprefix("package:").rpartition("=")[2]
    stem = Path(split_part(weights)[0]).stem if weights else ""
    return f"{name.kind}:{Path(model).name}" + (f":{stem}" if stem else "")


def _arithmetic(precision: PrecisionName) -> EncoderPrecision:
    """Return the arithmetic of an encoder with float32 weights: autocast to bfloat16 is what mixed means."""
    return "bfloat16" if precision == "mixed" else "float32"


def _has_joint_space(encoder: FrozenEncoder) -> bool:
    return all(side is not None and JOINT in side.features for side in (encoder.image, encoder.text))

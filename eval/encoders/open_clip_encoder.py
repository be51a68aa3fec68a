"""open_clip's models, by name or folder, with local weights, a pretrained tag or random weights."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from threetowers.cache.encoders.encoder import state_digest
from threetowers.cache.encoders.timm_models import pooled_features
from threetowers.eval.datasets.image_set import EvalImage, ImageSet
from threetowers.eval.encoders.arithmetic import PrecisionName, arithmetic, weight_dtype
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.eval.encoders.encoder import Encoder, LoadOptions, ModelInfo
from threetowers.eval.encoders.fingerprint import model_fingerprint
from threetowers.eval.encoders.forward import PixelView, forward_captions, forward_images
from threetowers.eval.encoders.open_clip_model import load_open_clip_model


class OpenClipEncoder(Encoder):
    """An open_clip model with its own evaluation transform and tokenizer."""

    def __init__(self, name: str, weights: str | None, options: LoadOptions) -> None:
        """Load a model by name or folder.

        Args:
            name: As of `load_open_clip_model`.
            weights: As of `load_open_clip_model`.
            options: How to run it.

        Raises:
            ValueError: It cannot be loaded.
        """
        loaded = load_open_clip_model(name, weights)
        model, transform = loaded.model, loaded.transform
        self.options = options
        self.device = options.torch_device()
        self.precision: PrecisionName = options.precision or "float32"
        digest = state_digest(model.state_dict())
        fingerprint = model_fingerprint(
            kind="open_clip",
            weights=digest,
            model=model,
            transform=transform,
            tokenizer=loaded.tokenize,
            precision=self.precision,
        )
        self.dtype = weight_dtype(self.precision)
        self.model = model.to(self.device, self.dtype).eval()
        self.transform = transform
        self.tokenizer = loaded.tokenize
        self.logit_scale = float(model.logit_scale.detach().float().exp())
        self.dim = self._embed_text(["a"]).shape[1]
        self.info = ModelInfo(
            name=f"open_clip:{loaded.name}",
            digest=digest,
            step=None,
            precision=self.precision,
            preprocessing="open_clip's: "
            + ", ".join(str(step) for step in transform.transforms if "<" not in str(step)),
            fingerprint=fingerprint,
        )

    def raw_image_batches(self, data: ImageSet, images: Sequence[EvalImage], features: bool) -> Iterator[Embeddings]:
        """Yield embeddings, or with `features` the image tower's output before its projection."""
        view = PixelView(data.tars, self.transform, self.options.max_pixels)
        return forward_images(
            images, view, self._features if features else self._embed, self.options.batch_size, self.options.workers
        )

    def raw_text_batches(self, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Yield embeddings of captions."""
        return forward_captions(captions, self._embed_text, self.options.batch_size)

    @torch.inference_mode()
    def _embed(self, views: Tensor) -> Tensor:
        with arithmetic(self.precision, self.device):
            x_bD: Tensor = self.model.encode_image(views.to(self.device, self.dtype))
        return x_bD

    @torch.inference_mode()
    def _features(self, views: Tensor) -> Tensor:
        with arithmetic(self.precision, self.device):
            return self._tower_output(views.to(self.device, self.dtype))

    def _tower_output(self, pixels: Tensor) -> Tensor:
        visual = self.model.visual
        trunk = getattr(visual, "trunk", None)  # a timm model inside open_clip
        if trunk is not None:
            features = pooled_features(trunk, pixels)
            # Attention pooling is in open_clip's head, and projects as it pools.
            return features if features.ndim == 2 else visual.head.pool(features)
        # Otherwise the tower's last step is its projection, which open_clip keeps as one matrix.
        projection = getattr(visual, "proj", None)
        visual.proj = None
        try:
            unprojected: Tensor | tuple[Tensor, Tensor] = visual(pixels)
        finally:
            visual.proj = projection
        # CoCa's tower gives its tokens too.
        return unprojected[0] if isinstance(unprojected, tuple) else unprojected

    @torch.inference_mode()
    def _embed_text(self, captions: Sequence[str]) -> Tensor:
        with arithmetic(self.precision, self.device):
            x_bD: Tensor = self.model.encode_text(self.tokenizer(list(captions)).to(self.device))
        return x_bD

"""open_clip's models, by name or folder, with local weights, a pretrained tag or random weights."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threetowers.cache.encoders.teacher import state_digest
from threetowers.eval.datasets.image_set import EvalImage, ImageSet
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.eval.encoders.encoder import Encoder, LoadOptions, ModelInfo
from threetowers.eval.encoders.fingerprint import model_fingerprint
from threetowers.eval.encoders.forward import PixelView, forward_captions, forward_images
from threetowers.trainer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class OpenClipEncoder(Encoder):
    """An open_clip model with its own evaluation transform and tokenizer."""

    def __init__(self, name: str, weights: str | None, options: LoadOptions) -> None:
        """Load a model by name or folder.

        Args:
            name: Name of an open_clip model, or a folder it saved.
            weights: A file of weights, one of its pretrained tags, or None for random weights.
            options: How to run it.

        Raises:
            ValueError: open_clip is not installed, or has no such model or weights, or cannot load them.
        """
        try:
            import open_clip
        except ImportError as error:
            raise ValueError(f"open_clip:{name}: run `pip install open_clip_torch` first") from error
        folder = Path(name)
        known = f"local-dir:{name}" if folder.is_dir() else name
        if known == name and weights is None:
            logger.warning(
                "open_clip:%s has random weights; give a file or a pretrained tag as open_clip:NAME:WEIGHTS", name
            )
        try:
            model, _, transform = open_clip.create_model_and_transforms(known, pretrained=weights)
            tokenizer = _tokenizer(known, folder, model)
        except (RuntimeError, OSError, KeyError) as error:
            raise ValueError(f"open_clip:{name}: weights {weights!r} cannot be loaded: {error}") from error
        self.options = options
        self.device = options.torch_device()
        digest = state_digest(model.state_dict())
        fingerprint = model_fingerprint(
            kind="open_clip",
            weights=digest,
            model=model,
            transform=transform,
            tokenizer=tokenizer,
            precision=options.precision,
        )
        self.dtype = getattr(torch, options.precision)
        self.model = model.to(self.device, self.dtype).eval()
        self.transform = transform
        self.tokenizer = tokenizer
        self.logit_scale = float(model.logit_scale.detach().float().exp())
        self.dim = self._embed_text(["a"]).shape[1]
        self.info = ModelInfo(
            name=f"open_clip:{folder.name}" + (f":{Path(weights).stem}" if weights else ""),
            digest=digest,
            step=None,
            precision=options.precision,
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
        x_bD: Tensor = self.model.encode_image(views.to(self.device, self.dtype))
        return x_bD

    @torch.inference_mode()
    def _features(self, views: Tensor) -> Tensor:
        visual = self.model.visual
        trunk = getattr(visual, "trunk", None)  # a timm model inside open_clip
        if trunk is not None:
            features: Tensor = trunk(views.to(self.device, self.dtype))
            return features
        # Otherwise the tower's last step is its projection, which open_clip keeps as one matrix.
        projection = getattr(visual, "proj", None)
        visual.proj = None
        try:
            unprojected: Tensor = visual(views.to(self.device, self.dtype))
            return unprojected
        finally:
            visual.proj = projection

    @torch.inference_mode()
    def _embed_text(self, captions: Sequence[str]) -> Tensor:
        x_bD: Tensor = self.model.encode_text(self.tokenizer(list(captions)).to(self.device))
        return x_bD


def _tokenizer(known: str, folder: Path, model: Any) -> Callable[[list[str]], Tensor]:
    """Return open_clip's tokenizer of the model; our own where the folder is one of our exports, which contain it."""
    own = folder / "tokenizer.model"
    if own.is_file():
        return partial(Tokenizer.load(own).encode, context_length=model.context_length)
    import open_clip

    theirs: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(known)
    return theirs

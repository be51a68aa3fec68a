"""The text towers of open_clip: tokens to what comes before their projection, and after it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.encoder import TextModel, require_offered
from threetowers.cache.encoders.openclip.projection import Projection
from threetowers.cache.encoders.tokenizers.open_clip_tokenizer import OpenClipTokenizer
from threetowers.cache.encoders.tokenizers.tokenizer import Tokens
from threetowers.cache.format.manifest import TextProcessing

SHORTEST = 3  # a start token, an end token, and one between


class OpenClipText(TextModel):
    """The text tower of an open_clip model.

    - `projected`: its embedding in the joint space of images and text, not normalised.
    - `pooled`: the tower's output before the projection.

    Rows are padded to the longest of a batch where the padding then has no part in the result: behind the pooled token
    under a causal mask, or masked. Otherwise they are padded to the model's length, as open_clip does.
    """

    features = ("projected", "pooled")

    def __init__(
        self, model: nn.Module, tokenizer: OpenClipTokenizer, prompt: str | None, max_length: int | None, name: str
    ) -> None:
        """Take the text side out of a model.

        Args:
            model: Of open_clip, in evaluation mode. Afterwards it does not project text.
            tokenizer: Its tokenizer.
            prompt: Put before each caption.
            max_length: Tokens to which captions are cut; None: the model's own.
            name: Of the model, for messages.

        Raises:
            ValueError: The model does not take such a length.
        """
        super().__init__()
        self.tower = _tower(model)
        self._tokenizer = tokenizer
        self._name = name
        length = tokenizer.context_length if max_length is None else max_length
        if not SHORTEST <= length <= tokenizer.context_length:
            raise ValueError(
                f"{name}: --max-length: expected {SHORTEST} to {tokenizer.context_length}, the model's own, found "
                f"{length}"
            )
        self.processing = TextProcessing(tokenizer.digest, prompt or "", length, self.tower.pooling, normalize=False)

    def tokenize(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each caption, without padding."""
        texts = [self.processing.prompt + caption for caption in captions]
        return self._tokenizer.tokenize(texts, self.processing.max_length)

    def collate(self, tokens: Sequence[Tokens]) -> Mapping[str, Tensor]:
        """Return `ids` (b, L)."""
        pad, context = self._tokenizer.pad_id, self._tokenizer.context_length
        trimmed = not self._tokenizer.pads_left and all(row.ids and self.tower.can_trim(row.ids, pad) for row in tokens)
        length = max(len(row.ids) for row in tokens) if trimmed else context
        ids_bL = torch.full((len(tokens), length), pad)
        for ids_L, row in zip(ids_bL, tokens, strict=True):
            first = length - len(row.ids) if self._tokenizer.pads_left else 0
            ids_L[first : first + len(row.ids)] = torch.tensor(row.ids)
        return {"ids": ids_bL}

    def forward(self, inputs: Mapping[str, Tensor], features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each."""
        for feature in features:
            require_offered(feature, self.features, self._name)
        pooled_bD = self.tower(inputs["ids"])
        found = {"pooled": pooled_bD}
        if "projected" in features:
            found["projected"] = self.tower.projection(pooled_bD)
        return tuple(found[feature] for feature in features)


class _Tower(nn.Module):
    """A text tower without its projection: ids (b, L) to (b, D)."""

    pooling: str

    def __init__(self, projection: nn.Parameter | nn.Module | None) -> None:
        super().__init__()
        self.projection = Projection(projection)

    def can_trim(self, ids: Sequence[int], pad: int) -> bool:
        """Return whether a caption gives the same without the padding behind it."""
        return False


class _Transformer(_Tower):
    """The text transformer of open_clip, and the one that its plain CLIP models hold as parts of their own."""

    mask: Tensor | None

    def __init__(self, parts: Any, pooling: str, eos_id: int | None) -> None:
        super().__init__(parts.text_projection)
        self.token_embedding = parts.token_embedding
        self.positional_embedding = parts.positional_embedding
        self.transformer = parts.transformer
        self.ln_final = parts.ln_final
        self.pooling = pooling
        self.eos_id = eos_id
        self.register_buffer("mask", parts.attn_mask, persistent=False)

    def forward(self, ids_bL: Tensor) -> Tensor:
        from open_clip.transformer import text_global_pool

        length = ids_bL.shape[1]
        mask_LL = None if self.mask is None else self.mask[:length, :length]
        x_bLD = self.token_embedding(ids_bL) + self.positional_embedding[:length]
        x_bLD = self.ln_final(self.transformer(x_bLD, attn_mask=mask_LL))
        pooled_bD: Tensor = text_global_pool(x_bLD, ids_bL, self.pooling, eos_token_id=self.eos_id)
        return pooled_bD

    def can_trim(self, ids: Sequence[int], pad: int) -> bool:
        """Return whether the pooled token is one of the caption's, and sees none behind it."""
        if self.mask is None:
            return False
        if self.pooling == "argmax":  # the first of the largest
            return pad <= max(ids)
        return self.pooling == "first" or (self.pooling == "eos" and self.eos_id in ids)


class _WholeTower(_Tower):
    """A text transformer with a class token behind the padding (CoCa), or with a mask of its own."""

    def __init__(self, text: Any) -> None:
        super().__init__(text.text_projection)
        text.text_projection = None
        self.text = text
        self.pooling = text.pool_type if text.cls_emb is None else "cls_emb"

    def forward(self, ids_bL: Tensor) -> Tensor:
        return _first(self.text(ids_bL))


class _MaskedTower(_Tower):
    """A model of transformers, which sees no padding."""

    def __init__(self, text: Any) -> None:
        super().__init__(text.proj)
        text.proj = nn.Identity()
        self.text = text
        self.pooling = type(text.pooler).__name__

    def forward(self, ids_bL: Tensor) -> Tensor:
        return _first(self.text(ids_bL))

    def can_trim(self, ids: Sequence[int], pad: int) -> bool:
        """Return whether padding is masked."""
        return bool(pad == self.text.config.pad_token_id)


def _tower(model: Any) -> _Tower:
    """Return the text tower of a model as what it is, known by its parts."""
    text = getattr(model, "text", None)
    if text is None:  # CLIP, whose text tower is no module of its own
        return _Transformer(model, model.text_pool_type, model.text_eos_id)
    if hasattr(text, "pooler"):
        return _MaskedTower(text)
    if text.cls_emb is not None or getattr(text, "use_pad_mask", False):
        return _WholeTower(text)
    return _Transformer(text, text.pool_type, getattr(text, "eos_id", None))


def _first(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return what is pooled: some towers give their tokens too."""
    return output[0] if isinstance(output, tuple) else output

"""Models of sentence-transformers as encoders of text: pooling, normalisation and prompts as their files say."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threetowers.cache.encoders.encoder import (
    FrozenEncoder,
    TextEncoder,
    TextModel,
    require_offered,
    state_digest,
)
from threetowers.cache.encoders.huggingface.loading import ModelFiles, quiet, require
from threetowers.cache.encoders.huggingface.tokenizer import (
    UNBOUNDED,
    chosen_length,
    length_limit,
    tokenizer_digest,
)
from threetowers.cache.encoders.names import EncoderName, EncoderOptions
from threetowers.cache.encoders.packaged_weights import PACKAGE, packaged_sentence_encoder
from threetowers.cache.encoders.tokenizers.tokenizer import Tokens
from threetowers.cache.encoders.weights_file import require_finite
from threetowers.cache.format.manifest import TextProcessing

KIND = "st"
TOKENIZED_TOGETHER = 1024  # captions: the library pads what it tokenises together


class SentenceModel(TextModel):
    """A model of sentence-transformers whose first module is a transformer. Its one feature is its `pooled` output."""

    features = ("pooled",)

    def __init__(self, model: Any, prompt: str, max_length: int, name: str) -> None:
        """Take over a model, in evaluation mode, on its device. `name`: of the encoder, for messages."""
        super().__init__()
        self.model = model
        self._name = name
        with quiet():
            probe = model.preprocess(["a"], prompt=prompt or None)
        self._modality = probe.get("modality", "text")
        excluded = not all(getattr(module, "include_prompt", True) for module in model)
        self._prompt_length: int | None = probe.get("prompt_length") if excluded else None
        self.processing = TextProcessing(
            tokenizer_digest=tokenizer_digest(model.tokenizer),
            prompt=prompt,
            max_length=max_length,
            pooling=_pooling(model),
            normalize=_normalizes(model),
        )

    def tokenize(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each caption as the library makes them, prompt included."""
        return [
            token
            for start in range(0, len(captions), TOKENIZED_TOGETHER)
            for token in self._tokenize(list(captions[start : start + TOKENIZED_TOGETHER]))
        ]

    def _tokenize(self, captions: list[str]) -> list[Tokens]:
        with quiet():
            inputs = self.model.preprocess(captions, prompt=self.processing.prompt or None)
            rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
            ids = [row[mask].tolist() for row, mask in rows]
            full = [i for i, tokens in enumerate(ids) if len(tokens) >= self.processing.max_length]
            cut = set()
            if full:  # what fills the length may have been cut, or just fits
                texts = [self.processing.prompt + captions[i] for i in full]
                whole = self.model.tokenizer(texts, truncation=False, padding=False).input_ids
                cut = {i for i, tokens in zip(full, whole, strict=True) if len(tokens) > len(ids[i])}
        return [Tokens(tokens, i in cut) for i, tokens in enumerate(ids)]

    def collate(self, tokens: Sequence[Tokens]) -> Mapping[str, Tensor]:
        """Return ids and mask, (b, L) int64 each, padded on the right, and the length of a prompt that is left out."""
        length = max(len(caption.ids) for caption in tokens)
        ids_bL = torch.full((len(tokens), length), self.model.tokenizer.pad_token_id or 0)
        mask_bL = torch.zeros_like(ids_bL)
        for row, caption in enumerate(tokens):
            ids_bL[row, : len(caption.ids)] = torch.tensor(caption.ids, dtype=torch.long)
            mask_bL[row, : len(caption.ids)] = 1
        inputs = {"input_ids": ids_bL, "attention_mask": mask_bL}
        if self._prompt_length is not None:
            inputs["prompt_length"] = torch.tensor([self._prompt_length])
        return inputs

    def forward(self, inputs: Mapping[str, Tensor], features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each."""
        for feature in features:
            require_offered(feature, self.features, self._name)
        x_bD = self.model({**inputs, "modality": self._modality})["sentence_embedding"]
        return tuple(x_bD for _ in features)


def load_sentence_encoder(name: EncoderName, options: EncoderOptions) -> FrozenEncoder:
    """Load a model of sentence-transformers as an encoder of text.

    Args:
        name: A folder that sentence-transformers saved, a name on the hub, perhaps with @REVISION, or
            `package:all-minilm-l6-v2`, the one inside a pip package. Its weights are a folder with a copy of the files.
        options: How it is loaded and run. The prompt is the name of one of the model's own prompts, or else the text
            itself; None: the prompt that the model names as its default, if any.

    Raises:
        ValueError: sentence-transformers is not installed; the files cannot be loaded; the first module is not a
            transformer; it has no such prompt; a length that it does not take.
    """
    require("sentence_transformers", "sentence-transformers", KIND)
    full_name = f"{KIND}:{name.name}"
    if name.size is not None:
        raise ValueError(f"{name}: a model of text has no size: leave out @{name.size}")
    if name.name.startswith(PACKAGE) and name.weights is None:
        files = ModelFiles(str(packaged_sentence_encoder(name.name.removeprefix(PACKAGE))))
        source = name.name
    else:
        files = ModelFiles.of(name)
        source = str(files.folder) if files.folder is not None else "pretrained"
    model = _load(files, torch.device(options.device))
    require_finite(model, files.source)
    first = model[0]
    if not hasattr(first, "auto_model"):
        raise ValueError(
            f"{full_name}: expected a transformer as its first module, found {type(first).__name__}: choose a model "
            "that begins with one"
        )
    tokenizer = model.tokenizer
    limit = length_limit(None, first.auto_model.config, first.auto_model)
    own = [length for length in (model.max_seq_length, limit) if length is not None and length < UNBOUNDED]
    special = tokenizer.num_special_tokens_to_add()
    max_length = chosen_length(options.max_length or min(own, default=None), limit, special, full_name)
    model.max_seq_length = max_length
    sentence_model = SentenceModel(model, _prompt(model, options.prompt, full_name), max_length, full_name)
    return FrozenEncoder(
        full_name,
        source,
        state_digest(model.state_dict()),
        text=TextEncoder(full_name, sentence_model, torch.device(options.device), options.precision),
        packages=("torch", "sentence-transformers", "transformers", "tokenizers"),
    )


def _load(files: ModelFiles, device: torch.device) -> Any:
    from sentence_transformers import SentenceTransformer

    if files.folder is not None and not (Path(files.source) / "modules.json").is_file():
        raise ValueError(
            f"{files.source!r}: expected a folder of sentence-transformers, found no modules.json in it; a model of "
            "transformers alone is of the kind hf"
        )
    model: Any = files.load(
        "sentence encoder",
        SentenceTransformer,
        device=str(device),
        model_kwargs={"dtype": torch.float32},
    )
    return model.eval().requires_grad_(False)


def _prompt(model: Any, prompt: str | None, name: str) -> str:
    """Return the text of a prompt: a named one of the model, or the text itself."""
    if prompt is None:
        return str(model.prompts.get(model.default_prompt_name) or "")
    if prompt not in model.prompts:
        return prompt
    if not any(model.prompts.values()):
        raise ValueError(f"{name}: --prompt {prompt!r}: the model has no prompts of its own: give the prompt's text")
    return str(model.prompts[prompt])


def _pooling(model: Any) -> str:
    """Return how states become a vector, in the library's words, with the layers behind it."""
    steps = []
    for module in list(model)[1:]:
        kind = type(module).__name__
        if kind == "Pooling":
            modes = module.pooling_mode if isinstance(module.pooling_mode, tuple) else (module.pooling_mode,)
            steps.append("+".join(modes) + ("" if module.include_prompt else " without the prompt"))
        elif kind == "Dense":
            steps.append(f"Dense({module.in_features}, {module.out_features})")
        elif kind != "Normalize":
            steps.append(kind)
    return ", ".join(steps) or type(model[0]).__name__


def _normalizes(model: Any) -> bool:
    return type(list(model)[-1]).__name__ == "Normalize"

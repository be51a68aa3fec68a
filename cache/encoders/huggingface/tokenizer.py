"""Tokenizers of transformers: captions to ids, how long a caption may be, and what identifies a tokenizer."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from threetowers.cache.encoders.huggingface.loading import ModelFiles, quiet
from threetowers.cache.encoders.tokenizers.tokenizer import Tokens

DEFAULT_LENGTH = 512  # where neither tokenizer nor model has a limit
UNBOUNDED = 10**6  # what tokenizers without a limit name is larger
POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


@dataclass(frozen=True, eq=False)
class CaptionTokenizer:
    """A tokenizer of transformers, as an encoder uses it.

    Attributes:
        tokenizer: The tokenizer.
        max_length: Tokens that a caption is cut to, special ones included.
        prompt: Put before each caption.
        rows: Rows of the model's token embedding.
    """

    tokenizer: Any
    max_length: int
    prompt: str
    rows: int

    def tokenize(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each caption, at least one. Raises ValueError for ids that the model does not know."""
        texts = [self.prompt + caption for caption in captions]
        if not texts:
            return []
        rows = tokens_of(self.tokenizer, texts, self.max_length)
        largest = max(max(row.ids, default=0) for row in rows)
        if largest >= self.rows:
            raise ValueError(
                f"the tokenizer gives the id {largest}, but the model has {self.rows} token embeddings: the tokenizer "
                "is another model's"
            )
        return [Tokens(row.ids or [self.pad_id], row.cut) for row in rows]

    @property
    def pad_id(self) -> int:
        """An id for padding, which the model is told to ignore."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in candidates if i is not None and i < self.rows)


def tokens_of(tokenizer: Any, texts: list[str], max_length: int) -> list[Tokens]:
    """Return the ids that a tokenizer of transformers gives for texts, cut to `max_length` as it does it."""
    if not texts:
        return []

    def ids_of(some: list[str], **arguments: Any) -> list[list[int]]:
        found: list[list[int]] = tokenizer(
            some, add_special_tokens=True, padding=False, return_attention_mask=False, **arguments
        ).input_ids
        return found

    with quiet():  # it warns of long captions, which are cut below
        ids = ids_of(texts)
        long = [i for i, tokens in enumerate(ids) if len(tokens) > max_length]
        cut = ids_of([texts[i] for i in long], truncation=True, max_length=max_length) if long else []
    for i, tokens in zip(long, cut, strict=True):
        ids[i] = tokens
    were_cut = set(long)
    return [Tokens(tokens, i in were_cut) for i, tokens in enumerate(ids)]


def load_tokenizer(files: ModelFiles) -> Any:
    """Return the tokenizer of a model. Raises ValueError where there is none."""
    from transformers import AutoTokenizer

    tokenizer = files.load("tokenizer", AutoTokenizer.from_pretrained)
    # Without its files transformers makes an empty one of many kinds, and says nothing.
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - set(tokenizer.get_added_vocab())
    if len(words) < 2:
        raise ValueError(
            f"{files.source!r}: expected a tokenizer with its vocabulary (tokenizer.json), found none: add its files"
        )
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the sha256 of what decides the ids of a tokenizer of transformers or tokenizers.

    That is the serialised tokenizer of tokenizers (vocabulary, merges, normalisation, special tokens) without the
    padding and truncation that the last call left in it; for one in Python its class, special tokens and vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
    side = getattr(tokenizer, "truncation_side", "right")
    if hasattr(backend, "to_str"):
        state = json.loads(backend.to_str()) | {"padding": None, "truncation": None, "truncation_side": side}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    added = {token: int(i) for token, i in tokenizer.get_added_vocab().items()}
    digest.update(json.dumps([special, added, side], sort_keys=True).encode())
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(tokenizer.save_vocabulary(folder)):
            digest.update(Path(file).name.encode() + Path(file).read_bytes())
    return digest.hexdigest()


def length_limit(tokenizer: Any, config: Any, model: nn.Module) -> int | None:
    """Return how many tokens a model takes, special ones included; None where nothing limits them.

    It is the least of the tokenizer's limit, the config's positions and the rows of a table of positions, of which
    RoBERTa and its like leave the first ones free.
    """
    text_config = config.get_text_config()
    limits = [getattr(text_config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits.append(getattr(tokenizer, "model_max_length", None))
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            free = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - free)
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < UNBOUNDED]
    return min(known, default=None)


def chosen_length(wanted: int | None, limit: int | None, special: int, name: str) -> int:
    """Return the length that captions are cut to: the wanted one, else the model's limit.

    Args:
        wanted: By the user; None: the limit, or `DEFAULT_LENGTH` where there is none.
        limit: The model's.
        special: Tokens of it that are special.
        name: Of the encoder, for messages.

    Raises:
        ValueError: The wanted length is more than the model takes, or leaves no room for a caption.
    """
    if wanted is None:
        return limit or DEFAULT_LENGTH
    if wanted <= special or (limit is not None and wanted > limit):
        most = f" to {limit}" if limit is not None else " or more"
        raise ValueError(
            f"{name}: --max-length: found {wanted}, expected {special + 1}{most} tokens, of which {special} are special"
        )
    return wanted

"""Captions to the tokens of open_clip's models, by each of the tokenizers that they have."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from threetowers.cache.encoders.encoder import Tokens
from threetowers.cache.encoders.huggingface.tokenizer import tokenizer_digest
from threetowers.cache.encoders.sentencepiece_tokenizer import END, PAD, Tokenizer


class OpenClipTokenizer(ABC):
    """A tokenizer as open_clip uses it, without its padding.

    Attributes:
        context_length: Tokens that a model takes, special ones included.
        pad_id: The token that fills up a row.
        pads_left: Whether it is put before a caption.
        packages: Names of the packages whose versions decide what it gives.
    """

    context_length: int
    pad_id: int = 0
    pads_left: bool = False
    packages: tuple[str, ...] = ()

    @abstractmethod
    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return the tokens of each text, cut to `max_length`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return all that decides the tokens, as JSON."""

    @property
    def digest(self) -> str:
        """The sha256 of all that decides the tokens."""
        state = self.describe() | {"context": self.context_length, "pad": self.pad_id, "left": self.pads_left}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


class ClipTokenizer(OpenClipTokenizer):
    """CLIP's own byte pairs (open_clip's `SimpleTokenizer`)."""

    def __init__(self, tokenizer: Any) -> None:
        """Use a tokenizer of open_clip. Raises ValueError for one that leaves out tokens of long captions at random."""
        if tokenizer.reduction_fn is not None:
            raise ValueError(
                "tokenizer_kwargs.reduction_mask: expected none, as it is for training, found one: leave it out of "
                "open_clip_config.json"
            )
        self._tokenizer = tokenizer
        self.context_length = tokenizer.context_length

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return the tokens of each text, cut before its end token."""
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        pieces = (self._tokenizer.encode(text) for text in texts)
        return [Tokens([start, *ids[: max_length - 2], end], len(ids) > max_length - 2) for ids in pieces]

    def describe(self) -> dict[str, Any]:
        """Return vocabulary, merges, pattern and cleaning."""
        merges = sorted(self._tokenizer.bpe_ranks, key=self._tokenizer.bpe_ranks.get)
        return {
            "vocabulary": self._tokenizer.encoder,
            "merges": [list(pair) for pair in merges],
            "pattern": self._tokenizer.pat.pattern,
            "clean": _name(self._tokenizer.clean_fn),
        }


class TransformersTokenizer(OpenClipTokenizer):
    """A tokenizer of transformers inside open_clip (`HFTokenizer`, `SigLipTokenizer`)."""

    packages = ("transformers",)

    def __init__(self, tokenizer: Any) -> None:
        """Use a tokenizer of open_clip."""
        self._tokenizer = tokenizer.tokenizer
        self._clean: Callable[[str], str] = getattr(tokenizer, "clean_fn", None) or _siglip_clean
        self._strip = bool(getattr(tokenizer, "strip_sep_token", False))
        self.context_length = tokenizer.context_length
        self.pad_id = self._tokenizer.pad_token_id
        if self._strip and self.pad_id == self._tokenizer.sep_token_id:
            self.pad_id = 0
        self.pads_left = self._tokenizer.padding_side == "left"

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return the tokens of each text, cut as the tokenizer does it."""
        if not texts:
            return []
        cleaned = [self._clean(text) for text in texts]
        rows = self._ids(cleaned, verbose=False)
        long = [i for i, ids in enumerate(rows) if len(ids) > max_length]
        if long:
            cut = self._ids([cleaned[i] for i in long], truncation=True, max_length=max_length)
            for i, ids in zip(long, cut, strict=True):
                rows[i] = ids
        were_cut = set(long)
        return [Tokens(ids, i in were_cut) for i, ids in enumerate(rows)]

    def _ids(self, texts: list[str], **arguments: Any) -> list[list[int]]:
        rows: list[list[int]] = self._tokenizer(
            texts, padding=False, return_attention_mask=False, **arguments
        ).input_ids
        if not self._strip:
            return rows
        separator = self._tokenizer.sep_token_id
        return [[0 if token == separator else token for token in ids] for ids in rows]

    def describe(self) -> dict[str, Any]:
        """Return the tokenizer's digest, and what open_clip does before and after it."""
        return {"tokenizer": tokenizer_digest(self._tokenizer), "clean": _name(self._clean), "strip": self._strip}


class ClipsTokenizer(OpenClipTokenizer):
    """A tokenizer of transformers in the mode of CLIPS: a class token ends each row, behind the padding."""

    packages = ("transformers",)

    def __init__(self, tokenizer: Any) -> None:
        """Use a tokenizer of open_clip."""
        self._clips = tokenizer
        self.context_length = tokenizer.context_length

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return the row of each text, padding included, as no token is at its end."""
        if not texts:
            return []
        rows = self._clips(list(texts), max_length).tolist()
        cleaned = [self._clips.clean_fn(text) for text in texts]
        pieces = self._clips.tokenizer(cleaned, add_special_tokens=False, verbose=False).input_ids
        return [Tokens(row, len(ids) > max_length - 3) for row, ids in zip(rows, pieces, strict=True)]

    def describe(self) -> dict[str, Any]:
        """Return the tokenizer's digest, and what open_clip does before and after it."""
        return {
            "tokenizer": tokenizer_digest(self._clips.tokenizer),
            "clean": _name(self._clips.clean_fn),
            "mode": "clips",
        }


class SentencePieceTokenizer(OpenClipTokenizer):
    """The tokenizer of a model that this package exported."""

    pad_id = PAD
    packages = ("sentencepiece",)

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        """Use a tokenizer of this package."""
        self._tokenizer = tokenizer
        self.context_length = context_length

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return the tokens of each text, cut before its end token."""
        room = max_length - 1
        return [Tokens([*ids[:room], END], len(ids) > room) for ids in self._tokenizer.pieces(texts)]

    def describe(self) -> dict[str, Any]:
        """Return the digest of the SentencePiece model."""
        return {"sentencepiece": hashlib.sha256(self._tokenizer.model).hexdigest()}


def open_clip_tokenizer(tokenizer: Any) -> OpenClipTokenizer:
    """Return one of open_clip's tokenizers as what it is, known by its parts. Raises ValueError for other ones."""
    if hasattr(tokenizer, "bpe_ranks"):
        return ClipTokenizer(tokenizer)
    mode = getattr(tokenizer, "tokenizer_mode", "")
    if hasattr(tokenizer, "tokenizer") and mode in ("", "clips"):
        return ClipsTokenizer(tokenizer) if mode else TransformersTokenizer(tokenizer)
    raise ValueError(f"expected CLIP's tokenizer or one of transformers, found {type(tokenizer).__name__} {mode!r}")


def _siglip_clean(text: str) -> str:
    from open_clip.tokenizer import basic_clean, canonicalize_text

    cleaned: str = canonicalize_text(basic_clean(text))
    return cleaned


def _name(function: Callable[[str], str]) -> str:
    return getattr(function, "__name__", str(function))

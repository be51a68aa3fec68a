"""SentencePiece models as tokenizers: those that this package trains, T5's, SigLIP's, and others."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import sentencepiece

from threetowers.cache.encoders.tokenizers.tokenizer import MissingTokenizer, SpecialTokens, Tokenizer, Tokens

PAD, UNKNOWN, END = 0, 1, 2  # ids of the special tokens in models that this package trains
FILE = "tokenizer.model"  # of a run folder


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model: the pieces of a caption, and the model's end token.

    Ids are those of the model, wherever it has its special tokens; there is no start token. A model without padding is
    padded with its end token.

    Attributes:
        model: The bytes of the `.model` file.
    """

    packages = ("sentencepiece",)

    def __init__(self, model: bytes, name: str = FILE) -> None:
        """Load a tokenizer from the bytes of its model; `name` is for messages.

        Raises:
            ValueError: The bytes are not a SentencePiece model, or it has no end token.
        """
        self.model = model
        self.name = name
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{name} is not a SentencePiece model: {error}") from error
        end, pad, unknown = self._processor.eos_id(), self._processor.pad_id(), self._processor.unk_id()
        if end < 0:
            raise ValueError(
                f"{name}: found no end token (eos_id -1), expected one, at which captions end; train the model with one"
            )
        self._special = SpecialTokens(end, pad if pad >= 0 else end, None, unknown)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the tokenizer of a `.model` file.

        Raises:
            MissingTokenizer: There is no such file.
            ValueError: It is not a tokenizer. The message names it.
        """
        try:
            return cls(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise MissingTokenizer(
                f"{path}: no such tokenizer; make one with `threetowers tokenizer train`, or name one as "
                "hf:FOLDER_OR_FILE or open_clip:NAME"
            ) from error

    def __reduce__(self) -> tuple[type["SentencePieceTokenizer"], tuple[bytes, str]]:
        """Pickle as the bytes of the model."""
        return SentencePieceTokenizer, (self.model, self.name)

    @property
    def special(self) -> SpecialTokens:
        """The model's special tokens."""
        return self._special

    @property
    def vocab_size(self) -> int:
        """Number of pieces, special tokens included."""
        return int(self._processor.vocab_size())

    @property
    def digest(self) -> str:
        """The sha256 of the model."""
        return hashlib.sha256(self.model).hexdigest()

    def files(self) -> Mapping[str, bytes]:
        """Return the model."""
        return {FILE: self.model}

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return the pieces of each text and an end token; a long text is cut before it."""
        room, end = max_length - 1, self._special.end
        pieces: list[list[int]] = self._processor.encode(list(texts))
        return [Tokens([*ids[:room], end], len(ids) > room) for ids in pieces]

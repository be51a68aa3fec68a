"""SentencePiece tokenizers as this package trains them: captions to rows of tokens of equal length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import sentencepiece
import torch
from torch import Tensor

PAD, UNKNOWN, END = 0, 1, 2  # ids of the special tokens


class Tokenizer:
    """A SentencePiece model that turns captions into rows of tokens.

    It is pickled as the bytes of its model, so that data workers can have a copy.

    Attributes:
        model: The bytes of the `.model` file.
    """

    def __init__(self, model: bytes) -> None:
        """Load a tokenizer from the bytes of its model.

        Raises:
            RuntimeError: The bytes are not a SentencePiece model.
            ValueError: Its special tokens are not those of `train_tokenizer`.
        """
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        found = (self._processor.pad_id(), self._processor.unk_id(), self._processor.eos_id())
        if found != (PAD, UNKNOWN, END):
            raise ValueError(
                f"tokenizer has pad, unknown, end ids {found}, expected {(PAD, UNKNOWN, END)}; "
                "train one with `threetowers tokenizer train`"
            )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the tokenizer of a `.model` file.

        Raises:
            ValueError: The file is missing or is not a tokenizer. The message names it.
        """
        try:
            return cls(Path(path).read_bytes())
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such tokenizer; make one with `threetowers tokenizer train`") from error
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from error

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        """Pickle as the bytes of the model."""
        return Tokenizer, (self.model,)

    @property
    def vocab_size(self) -> int:
        """Number of pieces, special tokens included."""
        return int(self._processor.vocab_size())

    def embedding_rows(self, vocab_size: int | None) -> int:
        """Return the number of rows of a token embedding: `data.vocab_size`, or one row per piece where it is None.

        Raises:
            ValueError: `vocab_size` is less than the number of pieces.
        """
        if vocab_size is None:
            return self.vocab_size
        if vocab_size < self.vocab_size:
            raise ValueError(
                f"data.vocab_size: found {vocab_size}, expected at least {self.vocab_size}, one row for each piece of "
                "the tokenizer; raise it"
            )
        return vocab_size

    def encode(self, captions: Sequence[str], context_length: int) -> Tensor:
        """Return the tokens of captions: (b, context_length) int64.

        A row holds the pieces of a caption, one end token, and padding. A long caption is cut before its end token.
        """
        tokens_bL = torch.full((len(captions), context_length), PAD)
        for row, pieces in enumerate(self.pieces(captions)):
            tokens = [*pieces[: context_length - 1], END]
            tokens_bL[row, : len(tokens)] = torch.tensor(tokens)
        return tokens_bL

    def pieces(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the ids of the pieces of each caption, all of them, without an end token."""
        pieces: list[list[int]] = self._processor.encode(list(captions))
        return pieces

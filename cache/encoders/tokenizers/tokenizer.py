"""What every tokenizer gives, whatever library it is of."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Padding = Literal["longest", "context_length"]
PADDED_TO = 8  # lengths of batches are multiples: sizes that GPUs multiply fastest, and few for torch.compile


class Tokens(NamedTuple):
    """A caption as a text model takes it: its token ids, special ones included, and whether it was cut to fit."""

    ids: Sequence[int]
    cut: bool


class MissingTokenizer(ValueError):
    """There is no tokenizer where one was named."""


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of special tokens, as the tokenizer says.

    Attributes:
        end: Ends each caption.
        pad: Fills up a row behind the end token. It may be the end token itself (SigLIP), or that of a word (CLIP).
        start: Begins each caption; None: nothing does.
        unknown: Stands for what has no token; None: everything has one.
    """

    end: int
    pad: int
    start: int | None = None
    unknown: int | None = None


class Tokenizer(ABC):
    """Captions to the ids of their tokens.

    It can be pickled, so that data workers have a copy.

    Attributes:
        name: As a config names it.
        packages: Names of the packages whose versions decide what it gives.
    """

    name: str
    packages: tuple[str, ...] = ()

    @abstractmethod
    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return the tokens of each text, special ones included, cut to `max_length` without losing these."""

    @property
    @abstractmethod
    def special(self) -> SpecialTokens:
        """The special tokens. Raises ValueError for a tokenizer that a text tower cannot be trained on."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: all are below it."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """The sha256 of all that decides the tokens."""

    @abstractmethod
    def files(self) -> Mapping[str, bytes]:
        """Return the files by which a run folder keeps it, by relative path."""

    def embedding_rows(self, vocab_size: int | None) -> int:
        """Return the number of rows of a token embedding: `data.vocab_size`, or one row per id where it is None.

        Raises:
            ValueError: `vocab_size` is less than the number of ids.
        """
        if vocab_size is None:
            return self.vocab_size
        if vocab_size < self.vocab_size:
            raise ValueError(
                f"data.vocab_size: found {vocab_size}, expected at least {self.vocab_size}, one row for each piece of "
                "the tokenizer; raise it"
            )
        return vocab_size

    def encode(self, captions: Sequence[str], context_length: int, padding: Padding = "context_length") -> Tensor:
        """Return the tokens of captions: (b, L) int64.

        A row holds the tokens of a caption, which end in one end token, and padding. A long caption is cut before its
        end token.

        Args:
            captions: The captions.
            context_length: The length of rows, or the most that it can be.
            padding: `context_length`: rows are of this length. `longest`: they are as long as the longest caption, up
                to a multiple of `PADDED_TO`.
        """
        rows = [caption.ids for caption in self.tokenize(captions, context_length)]
        length = context_length
        if padding == "longest":
            longest = max(map(len, rows), default=0)
            length = min(context_length, -(-longest // PADDED_TO) * PADDED_TO)
        tokens_bL = torch.full((len(rows), length), self.special.pad)
        for tokens_L, ids in zip(tokens_bL, rows, strict=True):
            tokens_L[: len(ids)] = torch.tensor(ids)
        return tokens_bL

    def __str__(self) -> str:
        """Return its name, vocabulary and special tokens, for the start-up page."""
        special = self.special
        ids = {"start": special.start, "end": special.end, "padding": special.pad, "unknown": special.unknown}
        named = ", ".join(f"{what} {i}" for what, i in ids.items() if i is not None)
        return f"{self.name}, {self.vocab_size:,} ids ({named}), sha256 {self.digest[:12]}"

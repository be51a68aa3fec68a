"""The SentencePiece tokenizer: train it on captions, encode captions as rows of tokens of equal length."""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import sentencepiece
import torch
from torch import Tensor

PAD, UNKNOWN, END = 0, 1, 2  # ids of the special tokens
CHARACTER_COVERAGE = 0.9995  # SentencePiece's default
SENTENCE_BYTES = 4192  # SentencePiece's default for the longest caption that is used
RESERVED = "\u2585"


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
        for row, pieces in enumerate(self._processor.encode(list(captions))):
            tokens = [*pieces[: context_length - 1], END]
            tokens_bL[row, : len(tokens)] = torch.tensor(tokens)
        return tokens_bL


def train_tokenizer(captions: Iterable[str], vocab_size: int, character_coverage: float = CHARACTER_COVERAGE) -> bytes:
    """Train a SentencePiece unigram model on lower-cased captions, normalised by NFKC. Deterministic.

    Args:
        captions: The captions, in a fixed order.
        vocab_size: At most so many pieces; a small corpus gives fewer.
        character_coverage: Share of the characters of the captions that have a piece, 0.98 to 1.

    Returns:
        The bytes of the model, for `Tokenizer` or a `.model` file.

    Raises:
        ValueError: There are no captions, or `vocab_size` is too small for their characters.
    """
    # SentencePiece would drop, without a word, each caption that holds the character it keeps for unknown ones.
    texts = [caption.replace(RESERVED, " ") for caption in captions]
    if not texts:
        raise ValueError("cannot train a tokenizer: the tars hold no captions")
    if vocab_size <= len((PAD, UNKNOWN, END)):
        raise ValueError(f"--vocab-size: found {vocab_size}, expected at least 4, as three pieces are special tokens")
    if not 0.98 <= character_coverage <= 1:
        raise ValueError(f"--character-coverage: found {character_coverage}, expected 0.98 to 1")

    # What differs from SentencePiece's defaults alone: the model file lists whatever is given.
    options: dict[str, Any] = {}
    if character_coverage != CHARACTER_COVERAGE:
        options["character_coverage"] = character_coverage
    longest = max(len(text.encode()) for text in texts)
    if longest > SENTENCE_BYTES:
        options["max_sentence_length"] = longest
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            normalization_rule_name="nmt_nfkc_cf",
            hard_vocab_limit=False,  # a small corpus yields a smaller vocabulary, not an error
            pad_id=PAD,
            unk_id=UNKNOWN,
            eos_id=END,
            bos_id=-1,
            num_threads=1,  # several threads change the order of sums, and with it the model
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise ValueError(_training_fault(str(error), vocab_size, character_coverage)) from error
    return model.getvalue()


def _training_fault(message: str, vocab_size: int, character_coverage: float) -> str:
    """Return what is wrong with the captions, by SentencePiece's own message, in the words of our flags."""
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"cannot train a tokenizer of {vocab_size:,} pieces: the characters of the captions need "
            f"{int(needed[1]):,}; raise --vocab-size to at least that, or lower --character-coverage (it is "
            f"{character_coverage:g})"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return f"cannot train a tokenizer of {vocab_size:,} pieces: the captions hold no characters that can be seen"
    return f"cannot train a tokenizer of {vocab_size:,} pieces: {message}"

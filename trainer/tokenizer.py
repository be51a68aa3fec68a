"""SentencePiece tokens: train a model from the captions in tars, encode captions to fixed-length rows."""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

PAD, UNKNOWN, END = 0, 1, 2


class Tokenizer:
    """Captions to token rows. Pickles by its model bytes, so that data workers can hold one."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        found = (self._processor.pad_id(), self._processor.unk_id(), self._processor.eos_id())
        if found != (PAD, UNKNOWN, END):
            raise ValueError(
                f"tokenizer has pad, unknown, end ids {found}, expected {(PAD, UNKNOWN, END)}; "
                "train one with `threetowers tokenizer train`"
            )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Return the tokenizer of a `.model` file. Raises ValueError naming the file if it is none."""
        try:
            return cls(Path(path).read_bytes())
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such tokenizer; make one with `threetowers tokenizer train`") from error
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from error

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self.model,)

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    def embedding_rows(self, stated: int | None) -> int:
        """Return the rows of a token embedding: as many as stated, or one a piece. Raises ValueError if too few."""
        if stated is not None and stated < self.vocab_size:
            raise ValueError(
                f"data.vocab_size: {stated} rows for the tokenizer's {self.vocab_size} pieces; give at least as many"
            )
        return self.vocab_size if stated is None else stated

    def encode(self, captions: Sequence[str], context: int) -> Tensor:
        """Return int64 tokens (len(captions), context): pieces, one end token, padding; long captions are cut."""
        tokens_bL = torch.full((len(captions), context), PAD)
        for row, pieces in enumerate(self._processor.encode(list(captions))):
            ids = [*pieces[: context - 1], END]
            tokens_bL[row, : len(ids)] = torch.tensor(ids)
        return tokens_bL


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> bytes:
    """Return a SentencePiece unigram model (lower-cased, NFKC) of at most `vocab_size` pieces. Deterministic.

    Raises ValueError when there are no captions or too few to tell `vocab_size` pieces apart from nothing.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_not_empty(captions),
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
        )
    except RuntimeError as error:
        raise ValueError(f"cannot train a tokenizer of {vocab_size} pieces: {error}") from error
    return model.getvalue()


def _not_empty(captions: Iterable[str]) -> Iterator[str]:
    empty = True
    for caption in captions:
        empty = False
        yield caption
    if empty:
        raise ValueError("cannot train a tokenizer: the tars hold no captions")

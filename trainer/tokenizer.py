"""Training of SentencePiece tokenizers on captions."""

import io
import re
from collections.abc import Iterable
from typing import Any

import sentencepiece

from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import END, PAD, UNKNOWN

CHARACTER_COVERAGE = 0.9995  # SentencePiece's default
SENTENCE_BYTES = 4192  # SentencePiece's default for the longest caption that is used
RESERVED = "\u2585"


def train_tokenizer(captions: Iterable[str], vocab_size: int, character_coverage: float = CHARACTER_COVERAGE) -> bytes:
    """Train a SentencePiece unigram model on lower-cased captions, normalised by NFKC. Deterministic.

    Args:
        captions: The captions, in a fixed order.
        vocab_size: At most so many pieces; a small corpus gives fewer.
        character_coverage: Share of the characters of the captions that have a piece, 0.98 to 1.

    Returns:
        The bytes of the model, for `SentencePieceTokenizer` or a `.model` file.

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

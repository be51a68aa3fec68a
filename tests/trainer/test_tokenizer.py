"""The tokenizer: end tokens, padding, cutting, determinism, and files that are not a tokenizer."""

import pickle
from pathlib import Path

import pytest

from threetowers.trainer.tokenizer import END, PAD, Tokenizer, train_tokenizer

CAPTIONS = ["a red apple", "A green apple", "the back of an envelope", "thumbs up: light skin tone", "café au lait"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(CAPTIONS, 60))


def test_rows_have_one_end_token_and_are_padded(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(["apple", "the back of an envelope and much more that does not fit", ""], 8)
    assert tokens.shape == (3, 8)
    for row in tokens.tolist():
        end = row.index(END)
        assert all(t not in (PAD, END) for t in row[:end])
        assert row[end + 1 :] == [PAD] * (7 - end)
    assert tokens[1, 7] == END
    assert tokens[2].tolist() == [END] + [PAD] * 7


def test_case_is_ignored(tokenizer: Tokenizer) -> None:
    a, b, c = tokenizer.encode(["a RED apple", "a red apple", "a green apple"], 16)
    assert a.equal(b)
    assert not a.equal(c)


def test_training_is_deterministic_and_a_pickled_tokenizer_encodes_the_same(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(iter(CAPTIONS), 60) == tokenizer.model
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(CAPTIONS, 9).equal(tokenizer.encode(CAPTIONS, 9))


def test_missing_captions_and_broken_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold no captions"):
        train_tokenizer([], 60)
    with pytest.raises(ValueError, match="cannot train a tokenizer of 3 pieces"):
        train_tokenizer(CAPTIONS, 3)
    with pytest.raises(ValueError, match="no such tokenizer"):
        Tokenizer.load(tmp_path / "missing.model")
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.model is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "junk.model")

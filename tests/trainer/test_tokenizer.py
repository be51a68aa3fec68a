"""The tokenizer: end tokens, padding, cutting, determinism, and files that are not a tokenizer."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import write_tar
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import END, PAD, SentencePieceTokenizer
from threetowers.cache.webdataset.captions import DEFAULT_CAPTIONS
from threetowers.cache.webdataset.sample import BadSample
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.trainer import cli
from threetowers.trainer.data.caption_corpus import LONGEST, DistinctSample, read_corpus
from threetowers.trainer.tokenizer import train_tokenizer

CAPTIONS = ["a red apple", "A green apple", "the back of an envelope", "thumbs up: light skin tone", "café au lait"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_tokenizer(CAPTIONS, 60))


def test_rows_have_one_end_token_and_are_padded(tokenizer: SentencePieceTokenizer) -> None:
    tokens = tokenizer.encode(["apple", "the back of an envelope and much more that does not fit", ""], 8)
    assert tokens.shape == (3, 8)
    for row in tokens.tolist():
        end = row.index(END)
        assert all(t not in (PAD, END) for t in row[:end])
        assert row[end + 1 :] == [PAD] * (7 - end)
    assert tokens[1, 7] == END
    assert tokens[2].tolist() == [END] + [PAD] * 7


def test_case_is_ignored(tokenizer: SentencePieceTokenizer) -> None:
    a, b, c = tokenizer.encode(["a RED apple", "a red apple", "a green apple"], 16)
    assert a.equal(b)
    assert not a.equal(c)


def test_training_is_deterministic_and_a_pickled_tokenizer_encodes_the_same(tokenizer: SentencePieceTokenizer) -> None:
    assert train_tokenizer(iter(CAPTIONS), 60) == tokenizer.model
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(CAPTIONS, 9).equal(tokenizer.encode(CAPTIONS, 9))


def test_missing_captions_and_broken_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold no captions"):
        train_tokenizer([], 60)
    with pytest.raises(ValueError, match="--vocab-size: found 3, expected at least 4"):
        train_tokenizer(CAPTIONS, 3)
    with pytest.raises(ValueError, match="no such tokenizer"):
        SentencePieceTokenizer.load(tmp_path / "missing.model")
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.model is not a SentencePiece model"):
        SentencePieceTokenizer.load(tmp_path / "junk.model")


def test_long_captions_and_reserved_characters_are_used() -> None:
    """SentencePiece drops captions of more than 4,192 bytes, and those that hold its sign for unknown ones."""
    long = " ".join(f"zyxgrob{number % 7}" for number in range(600))
    for caption in (long, "\u2585 zyxgrob zyxgrob"):
        pieces = SentencePieceTokenizer(train_tokenizer([*CAPTIONS, *[caption] * 9], 80))._processor
        assert any(
            "zyxgrob".startswith(piece.strip("▁")[:4])
            for piece in map(pieces.id_to_piece, range(3, 70))
            if "z" in piece
        )
    assert SentencePieceTokenizer(train_tokenizer([long] * 4, 40)).vocab_size > 10


@pytest.mark.parametrize(
    ("captions", "settings", "message"),
    [
        (
            ["".join(map(chr, range(0x4E00, 0x4E00 + 200)))],
            (100,),
            "need 204; raise --vocab-size .*--character-coverage",
        ),
        (["\u200b"], (100,), "hold no characters that can be seen"),
        (CAPTIONS, (100, 0.5), "--character-coverage: found 0.5, expected 0.98 to 1"),
    ],
)
def test_captions_that_do_not_fit_are_refused_in_words_of_our_flags(
    captions: list[str], settings: tuple[int, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        train_tokenizer(captions, *settings)
    assert "src/trainer_interface" not in str(raised.value)


def test_character_coverage_leaves_out_the_rarest() -> None:
    captions = ["common words only"] * 100 + ["ж"]
    for coverage, known in ((1.0, True), (0.999, False)):
        encoder = SentencePieceTokenizer(train_tokenizer(captions, 40, coverage))._processor
        assert (encoder.unk_id() not in encoder.encode("ж")) == known


def test_a_sample_of_distinct_texts_is_bounded_seeded_and_fair() -> None:
    texts = [f"caption {number}" for number in range(1000)]
    first = DistinctSample(100, seed=1)
    for text in texts * 2:
        first.add(text)
    backwards = DistinctSample(100, seed=1)
    for text in reversed(texts):
        backwards.add(text)
    assert len(first.texts()) == 100
    assert not first.complete
    assert set(first.texts()) == set(backwards.texts())  # repeats and order do not matter
    assert first.texts() == sorted(first.texts(), key=texts.index)
    chosen = [texts.index(text) for text in first.texts()]
    assert abs(sum(chosen) / 100 - 500) < 4 * 29  # four deviations of the mean of 100 numbers below 1,000
    small = DistinctSample(1000)
    for text in texts:
        small.add(text)
    assert (small.texts(), small.complete) == (texts, True)


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    """A tar of which some samples have no usable caption, and a file that is no tar."""
    members: list[Mapping[str, bytes]] = [
        {"txt": b"a red disc"},
        {"txt": b""},
        {"txt": b"the cat\x92s hat"},
        {"txt": "a blue bar".encode("utf-16")},
        {"txt": b"a red disc", "json": json.dumps({"caption": None}).encode()},
        {"txt": b"word " * (LONGEST // 4)},
    ]
    good = write_tar(tmp_path / "good.tar", [(f"s{n}", {"png": b""} | one) for n, one in enumerate(members)])
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    return [str(good), str(tmp_path / "broken.tar")]


def test_bad_captions_are_left_out_and_counted(mixed: list[str]) -> None:
    corpus = read_corpus(mixed[:1], DEFAULT_CAPTIONS, limit=9)
    assert corpus.captions[:2] == ["a red disc", "a blue bar"]
    assert len(corpus.captions[2]) == LONGEST
    assert corpus.bad_samples == {
        "no caption (txt: empty)": 1,
        "no caption (txt: neither UTF-8 nor UTF-16)": 1,
    }
    assert corpus.notes == {"json.caption: null": 1, "caption: cut to 65,536 bytes": 1}
    assert corpus.lines()[0] == "captions: 3 distinct of 4, in 4 samples of 1 tars"
    assert read_corpus(mixed[:1], DEFAULT_CAPTIONS, limit=2).lines()[0].startswith("captions: a sample of 2 of 4, in")
    with pytest.raises(BadSample, match=r"good\.tar: sample 's1': no caption .*--on-bad skip"):
        read_corpus(mixed[:1], DEFAULT_CAPTIONS, limit=9, on_bad="error")
    with pytest.raises(BadTar, match=r"(?s)broken\.tar.*--on-bad skip_tars"):
        read_corpus(mixed, DEFAULT_CAPTIONS, limit=9)
    with_tars = read_corpus(mixed, DEFAULT_CAPTIONS, limit=9, on_bad="skip_tars")
    assert with_tars.captions == corpus.captions
    assert [problem.partition(" ")[0] for problem in with_tars.left_out.bad] == [mixed[1]]


def test_tars_without_captions_are_refused_by_what_they_have(mixed: list[str], tmp_path: Path) -> None:
    other = write_tar(
        tmp_path / "other.tar", [("s0", {"png": b"", "npy": b"", "json": b'{"TEXT": "a boat", "url": "u"}'})]
    )
    empty = write_tar(tmp_path / "empty.tar", [])
    expected = (
        r"(?s)hold no captions.*left out: 1, no caption.*the first: .*other\.tar: sample 's0'.*'json', 'npy', "
        r"'png'\], json fields \['TEXT', 'url'\], expected a caption in txt, .*--captions.*"
        r"1 tars hold no samples: .*empty\.tar\nmembers that are not read: 1 \.npy in samples"
    )
    with pytest.raises(ValueError, match=expected):
        cli.train_tokenizer((str(other), str(empty)), tmp_path / "t.model")
    with pytest.raises(BadTar, match=r"none of 2 tars can be used; the first: .*broken"):
        read_corpus([mixed[1], str(empty)], DEFAULT_CAPTIONS, limit=9, on_bad="skip_tars")


def test_the_command_prints_what_it_left_out(
    mixed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.train_tokenizer((mixed[0],), tmp_path / "t.model", 30, captions=("txt",))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 't.model'}: ")
    assert "left out: 1, no caption (txt: empty)" in lines
    assert "noted: caption: cut to 65,536 bytes, in 1 samples" in lines
    with pytest.raises(ValueError, match="--input-sentences: found 0, expected at least 1"):
        cli.train_tokenizer((mixed[0],), tmp_path / "t.model", input_sentences=0)

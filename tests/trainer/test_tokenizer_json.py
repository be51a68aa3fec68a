"""A SentencePiece model as tokenizer.json: the same ids as the model itself, in tokenizers, transformers, open_clip."""

import io
import json
import random
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from tests.emoji_samples import ROOT
from threetowers.cache.encoders.tokenizers.hf_tokenizer import load_hf_tokenizer
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer as Tokenizer
from threetowers.trainer.export.tokenizer_json import write_tokenizer_json
from threetowers.trainer.tokenizer import train_tokenizer

LENGTH = 12
ODD = [
    "",
    "   ",
    "  many   spaces\t and\r\nlines ",
    "a\u00a0no-break space, a zero\u200bwidth one, \u3000 an ideographic one",
    "</s> is <pad> no <unk>token</s>",
    "\uff26\uff35\uff2c\uff2c width, ﬁne ½ cup Ⅷ ① ㏈ ｶﾞ ﷺ",
    "e\u0301te\u0301 C\u0301 Q\u0308 q\u0308\u0323 z\u0301\u0302\u0303 \u0301a",
    "❤️ 👩‍👩‍👧 🇩🇪 👍🏽",
    "日本語のテキスト привет мир مرحبا हिन्दी ไทย 한국어 \u1112\u1161\u11ab",
    "STRASSE ß ẞ İstanbul Å \u212b \u2581sign",
    "\x00control\x01 \x85 \ufeffmark",
    "word " * 50,
    "x" * 500,
]


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """Every caption of the emoji set once."""
    found: set[str] = set()
    for path in sorted((ROOT / "data/emoji").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found.update(json.loads(tar.extractfile(member).read())["captions"])  # type: ignore[union-attr]
    assert len(found) > 7000
    return sorted(found)


@pytest.fixture(scope="module")
def tokenizer(captions: list[str]) -> Tokenizer:
    return Tokenizer(train_tokenizer(captions[::3], 1500))


@pytest.fixture
def theirs(tokenizer: Tokenizer, tmp_path: Path) -> Any:
    import tokenizers

    write_tokenizer_json(tokenizer, LENGTH, tmp_path)
    return tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def ids(theirs: Any, texts: list[str]) -> torch.Tensor:
    return torch.tensor([row.ids for row in theirs.encode_batch(texts)])


def test_every_caption_and_odd_ones_get_the_same_ids(tokenizer: Tokenizer, theirs: Any, captions: list[str]) -> None:
    texts = captions + ODD
    assert ids(theirs, texts).equal(tokenizer.encode(texts, LENGTH))


def test_every_character_gets_the_same_ids(tokenizer: Tokenizer, theirs: Any) -> None:
    assigned = [chr(c) for c in range(0x30000) if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]
    generator = random.Random(0)
    generator.shuffle(assigned)
    texts = ["".join(assigned[start : start + 9]) for start in range(0, len(assigned), 9)]
    assert ids(theirs, texts).equal(tokenizer.encode(texts, LENGTH))


def test_open_clip_and_transformers_read_the_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    import open_clip
    import transformers

    write_tokenizer_json(tokenizer, LENGTH, tmp_path)
    text = {"context_length": LENGTH, "hf_tokenizer_name": "tokenizer.json"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": text}}))
    expected = tokenizer.encode(ODD, LENGTH)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rows = loaded(ODD, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
    assert rows.equal(expected)
    # open_clip cleans a caption before any tokenizer sees it: what ftfy and HTML would change is no case for us.
    same = [text for text in ODD if open_clip.tokenizer.whitespace_clean(text) == open_clip.tokenizer.basic_clean(text)]
    assert open_clip.get_tokenizer(f"local-dir:{tmp_path}")(same).equal(tokenizer.encode(same, LENGTH))


def test_a_tokenizer_of_transformers_is_written_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    import tokenizers

    for folder in ("first", "again"):
        (tmp_path / folder).mkdir()
    write_tokenizer_json(tokenizer, LENGTH, tmp_path / "first")
    run = load_hf_tokenizer(str(tmp_path / "first"))
    write_tokenizer_json(run, LENGTH - 3, tmp_path / "again")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "again/tokenizer.json"))
    assert ids(again, ODD).equal(run.encode(ODD, LENGTH - 3))
    assert ids(again, ODD).equal(tokenizer.encode(ODD, LENGTH - 3))


def test_an_end_token_that_the_file_does_not_add_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer_json(tokenizer, LENGTH, tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    with pytest.raises(ValueError, match=r"tokenizer.json cannot express hf:.* gets the ids"):
        write_tokenizer_json(load_hf_tokenizer(str(tmp_path)), LENGTH, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "bpe"}, "it is a bpe model"),
        ({"user_defined_symbols": ["<x>"]}, "user-defined symbols or bytes"),
        ({"byte_fallback": True, "vocab_size": 300}, "user-defined symbols or bytes"),
        ({"treat_whitespace_as_suffix": True}, "before the word"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = io.BytesIO()
    settings: dict[str, Any] = {"vocab_size": 40, "pad_id": 0, "unk_id": 1, "eos_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red disc", "a blue bar", "dot, green"] * 3),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **(settings | options),
    )
    with pytest.raises(ValueError, match=message):
        write_tokenizer_json(Tokenizer(model.getvalue()), LENGTH, tmp_path)


@pytest.mark.parametrize("rules", ["identity", "nfkc"])
def test_rules_of_other_models(tmp_path: Path, rules: str) -> None:
    import tokenizers

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["A red disc", "a  blue bar", "dot, green"] * 3),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        unk_id=1,
        eos_id=2,
        bos_id=-1,
        normalization_rule_name=rules,
        remove_extra_whitespaces=rules == "nfkc",
        add_dummy_prefix=rules == "nfkc",
        minloglevel=2,
    )
    tokenizer = Tokenizer(model.getvalue())
    write_tokenizer_json(tokenizer, LENGTH, tmp_path)
    texts = ["A red  disc", " a ", "Blue ﬁ bar", "", "  "]
    found = ids(tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), texts)
    assert found.equal(tokenizer.encode(texts, LENGTH))

"""Tokenizers give what their own packages give, survive pickling and a run folder, and refuse what is none."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from tests.cache.tiny_transformers import byte_tokenizer, word_tokenizer
from threetowers.cache.encoders.tokenizers.names import load_kept_tokenizer, load_named_tokenizer
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from threetowers.cache.encoders.tokenizers.tokenizer import MissingTokenizer, SpecialTokens, Tokenizer
from threetowers.cache.webdataset.captions import DEFAULT_CAPTIONS
from threetowers.trainer.data.caption_corpus import read_corpus
from threetowers.trainer.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
LANGUAGES = [
    "",
    "   ",
    "ein Fußgänger überquert die Straße",
    "красный мяч на траве",
    "草地上的红球",
    "芝生の上の赤いボール、ﾊﾝｶｸ",
    "كرة حمراء على العشب",
    "घास पर लाल गेंद",
    "빨간 공",
    "\uff21 ﬁne   café\u0301 — naïve\tco-op\n№ 5",
    "👩🏽‍🚀 🇺🇸 &amp; <b>it's</b> 1,234.5",
    "word " * 100,
]
LAYOUTS = {  # (pad, unknown, start, end): of T5, of big_vision's models, of Llama's, and of ours
    "t5": (0, 2, -1, 1),
    "unknown behind": (3, 4, -1, 2),
    "llama": (-1, 0, 1, 2),
    "ours": (0, 1, -1, 2),
}


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """Every caption of the data set in the repository, and some in other languages."""
    tars = sorted(map(str, (ROOT / "data" / "emoji").glob("*.tar")))
    corpus = read_corpus(tars, DEFAULT_CAPTIONS, limit=10**6).captions
    assert len(corpus) > 500
    return [*corpus, *LANGUAGES]


def sentencepiece_model(pad: int, unknown: int, start: int, end: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LANGUAGES[2:] * 3),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        pad_id=pad,
        unk_id=unknown,
        bos_id=start,
        eos_id=end,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def unigram_tokenizer() -> Any:
    """Like T5's: pieces of words, an end token behind them, no start."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False, max_piece_length=6
    )
    backend.train_from_iterator(LANGUAGES[2:] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sentencepiece_of_any_layout(layout: str, captions: list[str], tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(sentencepiece_model(*LAYOUTS[layout]))
    pad, unknown, _, end = LAYOUTS[layout]
    found = load_named_tokenizer(str(tmp_path / "spiece.model"))
    assert found.special == SpecialTokens(end, end if pad < 0 else pad, None, unknown)
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert found.vocab_size == original.vocab_size()
    expected = original.encode(captions, add_eos=True)
    assert [list(row.ids) for row in found.tokenize(captions, 1000)] == expected
    for row, ids in zip(found.encode(captions, 9).tolist(), expected, strict=True):
        assert row == ([*ids[:8], end] if len(ids) > 9 else ids + [found.special.pad] * (9 - len(ids)))
    _check_copies(found, tmp_path / "run")


@pytest.mark.parametrize(
    ("make", "special"),
    [(word_tokenizer, SpecialTokens(3, 0, 2, 1)), (unigram_tokenizer, SpecialTokens(1, 0, None, 2))],
)
def test_a_tokenizer_json(make: Callable[[], Any], special: SpecialTokens, captions: list[str], tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from transformers import AutoTokenizer

    make().save_pretrained(tmp_path / "hf")
    found = load_named_tokenizer(f"hf:{tmp_path / 'hf'}")
    assert found.special == special
    original = AutoTokenizer.from_pretrained(tmp_path / "hf")
    backend = Backend.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    backend.no_padding()
    backend.no_truncation()
    rows = [list(row.ids) for row in found.tokenize(captions, 1000)]
    assert rows == original(captions, verbose=False).input_ids
    assert rows == [encoding.ids for encoding in backend.encode_batch(captions)]
    cut = original(captions, truncation=True, max_length=9, padding="max_length").input_ids
    assert found.encode(captions, 9).tolist() == cut
    assert found.vocab_size == len(original)
    by_file = load_named_tokenizer(f"hf:{tmp_path / 'hf' / 'tokenizer.json'}")
    assert (by_file.digest, by_file.special) == (found.digest, special)
    alone = tmp_path / "alone.json"
    alone.write_bytes((tmp_path / "hf" / "tokenizer.json").read_bytes())
    by_name = load_named_tokenizer(f"hf:{alone}")  # its end and padding are known by their names
    assert by_name.encode(captions, 9).equal(found.encode(captions, 9))
    _check_copies(found, tmp_path / "run")


def test_a_tokenizer_without_an_end_token_gets_one(captions: list[str], tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "hf")
    found = load_named_tokenizer(f"hf:{tmp_path / 'hf'}")
    original = byte_tokenizer()
    end = original.eos_token_id
    assert [list(row.ids) for row in found.tokenize(captions, 1000)] == [
        [*ids, end] for ids in original(captions, verbose=False).input_ids
    ]
    assert all(row.ids[-1] == end and len(row.ids) <= 5 for row in found.tokenize(captions, 5))
    _check_copies(found, tmp_path / "run")


def test_open_clip_has_clips_tokenizer_in_its_package(captions: list[str], tmp_path: Path) -> None:
    import open_clip

    found = load_named_tokenizer("open_clip:ViT-B-32")
    for length in (77, 9):
        assert found.encode(captions, length).equal(open_clip.get_tokenizer("ViT-B-32")(captions, length))
    assert found.special == SpecialTokens(end=49407, pad=0, start=49406)
    assert found.vocab_size == 49408
    _check_copies(found, tmp_path / "run")
    kept = tmp_path / "run" / "tokenizer" / "open_clip.json"
    kept.write_text(kept.read_text().replace(found.digest, "0" * 64))
    with pytest.raises(
        ValueError, match=r"had the sha256 000000000000 in training, and has .* now: install the version"
    ):
        load_kept_tokenizer(tmp_path / "run")


def test_open_clip_reads_a_tokenizer_of_transformers(captions: list[str], tmp_path: Path) -> None:
    import open_clip

    folder = tmp_path / "model"
    unigram_tokenizer().save_pretrained(folder)
    text = {"context_length": 12, "hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"clean": "canonicalize"}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": text}}))
    found = load_named_tokenizer(f"open_clip:{folder}")
    original = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert found.encode(captions, 12).equal(original(captions))
    assert found.special == SpecialTokens(1, 0, None, 2)
    _check_copies(found, tmp_path / "run")


def test_rows_are_as_long_as_the_longest_caption() -> None:
    tokenizer = SentencePieceTokenizer(sentencepiece_model(*LAYOUTS["t5"]))
    captions = ["a", "красный мяч", ""]
    longest = max(len(row.ids) for row in tokenizer.tokenize(captions, 100))
    short, full = (tokenizer.encode(captions, 77, padding) for padding in ("longest", "context_length"))  # type: ignore[arg-type]
    assert short.shape[1] % 8 == 0
    assert longest <= short.shape[1] < longest + 8
    assert full.shape == (3, 77)
    assert full[:, : short.shape[1]].equal(short)
    assert (full[:, short.shape[1] :] == 0).all()
    assert tokenizer.encode(captions, 5, "longest").shape == (3, 5)  # no longer than the limit
    assert tokenizer.encode([], 5, "longest").shape == (0, 0)


def _json(folder: Path, name: str, **content: Any) -> str:
    (folder / name).write_text(json.dumps(content))
    return f"hf:{folder / name}"


def _without_end(folder: Path) -> str:
    path = folder / "endless.model"
    path.write_bytes(sentencepiece_model(-1, 0, -1, -1))
    return str(path)


def _nameless(folder: Path) -> str:
    tokenizer = word_tokenizer()
    text = tokenizer.backend_tokenizer.to_str().replace("</s>", "<stop>")
    (folder / "nameless.json").write_text(text)
    return f"hf:{folder / 'nameless.json'}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            lambda folder: str(folder / "none.model"),
            r"none\.model: no such tokenizer; make one with .* hf:FOLDER_OR_FILE",
        ),
        (lambda folder: f"hf:{folder / 'none'}", r"hf:.*none: no such file or folder; name a tokenizer\.json"),
        (lambda folder: _json(folder, "config.json", a=1)[3:], r"config\.json is not a SentencePiece model"),
        (
            lambda folder: _json(folder, "junk.json", a=1),
            r"junk\.json: expected a tokenizer\.json of tokenizers, found",
        ),
        (lambda folder: f"hf:{folder}", "cannot load the tokenizer of"),
        (_without_end, r"endless\.model: found no end token \(eos_id -1\), expected one"),
        (
            _nameless,
            r"nameless\.json: found no end token, expected an eos_token or a sep_token: name it in tokenizer_c",
        ),
        (lambda folder: f"open_clip:{folder}/nowhere", r"nowhere: no such folder; name one that a model was saved to"),
        (lambda folder: "open_clip:ViT-Z-99", "open_clip:ViT-Z-99: found no such model in open_clip, expected one of"),
    ],
)
def test_what_is_no_tokenizer_is_one_message(name: Callable[[Path], str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_named_tokenizer(name(tmp_path))
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, MissingTokenizer) == ("no such" in message and "open_clip" not in message)


def test_a_vocabulary_that_does_not_fit_is_refused() -> None:
    tokenizer = SentencePieceTokenizer(train_tokenizer(["a red disc"] * 3, 20))
    assert tokenizer.embedding_rows(None) == tokenizer.vocab_size
    assert tokenizer.embedding_rows(100) == 100
    with pytest.raises(ValueError, match=r"data\.vocab_size: found 3, expected at least"):
        tokenizer.embedding_rows(3)


def _check_copies(tokenizer: Tokenizer, folder: Path) -> None:
    """A pickled copy, and the one in a run folder, are the same."""
    for name, content in tokenizer.files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    expected = tokenizer.encode(LANGUAGES, 11)
    for copy in (pickle.loads(pickle.dumps(tokenizer)), load_kept_tokenizer(folder)):
        assert copy.digest == tokenizer.digest
        assert copy.special == tokenizer.special
        assert copy.vocab_size == tokenizer.vocab_size
        torch.testing.assert_close(copy.encode(LANGUAGES, 11), expected, rtol=0, atol=0)

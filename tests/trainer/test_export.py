"""The exported model: bit-identical without the third tower, and equal when open_clip and timm load it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F

from tests.emoji_samples import ROOT
from tests.trainer.cached_runs import both_cached, cached_text, pair_caches
from tests.trainer.finished_runs import finished_run
from threetowers.cache.encoders.names import EncoderOptions, load_frozen_encoder
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from threetowers.trainer.export.export import export, probe_inputs
from threetowers.trainer.export.expressible import beginnings_table, formats_table
from threetowers.trainer.export.trained_model import load_model

CAPTIONS = ["a caption", "another one"]  # of model cards
CAUSAL = {"kind": "text", "width": 16, "depth": 2, "heads": 2, "causal": True, "norm_eps": 1e-5}


def test_the_deployed_model_gives_the_same_embeddings_to_the_bit(three: dict[str, Any], tmp_path: Path) -> None:
    three["heads"]["f"] |= {"kind": "mlp", "norm": "batch", "activation": "relu", "dropout": 0.2}
    three["heads"]["g"] |= {"kind": "mlp", "input_norm": "layer", "gated": True, "activation": "relu6"}
    folder = finished_run(three)
    done = export(folder, tmp_path / "export", results={"retrieval, all": {"recall@1": 0.25}})
    before, after = load_model(folder), load_model(tmp_path / "export")
    assert set(after.model.towers) == {"image", "text"}
    assert set(after.model.heads) == {"f", "g"}
    assert after.manifests == {}
    images, _ = probe_inputs(before)
    captions = ["a red disc", "cross, blue", ""]
    assert after.encode_images(images).equal(before.encode_images(images))
    assert after.encode_texts(captions).equal(before.encode_texts(captions))
    assert after.model.log_scales["scale"].equal(before.model.log_scales["scale"])
    gone = sum(p.numel() for name in ("f_h", "g_h", "h_f", "h_g") for p in before.model.heads[name].parameters())
    assert done.left_out == gone > 0
    assert done.difference == 0
    card = (tmp_path / "export" / "README.md").read_text()
    for fact in (
        "test_resnet",
        "image-third: 1 x contrastive of (f_h, h_f)",
        three["data"]["tars"][0],
        "encode_texts",
        "recall@1: 0.25",
    ):
        assert fact in card
    again = export(tmp_path / "export", tmp_path / "again")  # an export can be exported again
    assert again.left_out == 0


def test_a_lit_export_keeps_its_cached_tower(lit: dict[str, Any], tmp_path: Path) -> None:
    folder = finished_run(lit)
    assert export(folder, tmp_path / "export").difference == 0
    exported = load_model(tmp_path / "export")
    assert exported.sees_cached_rows
    assert exported.manifests == load_model(folder).manifests
    for form in ("open_clip", "timm"):
        with pytest.raises(ValueError, match=r"cannot express .* cached teacher"):
            export(folder, tmp_path / form, form)  # type: ignore[arg-type]
        assert not (tmp_path / form).exists()


@pytest.mark.parametrize("kind", [cached_text, both_cached])
def test_an_export_names_the_encoder_of_its_cached_text(
    kind: Callable[..., dict[str, Any]], clip: dict[str, Any], tars: list[Path], tmp_path: Path
) -> None:
    folder = finished_run(kind(clip, pair_caches(tars, tmp_path, prompt="see: "), tmp_path))
    done = export(folder, tmp_path / "export")
    assert done.difference == 0
    exported = load_model(tmp_path / "export")
    assert exported.reads_cached_text
    assert exported.tokenizer is None
    assert exported.manifests == load_model(folder).manifests
    card = (tmp_path / "export" / "README.md").read_text()
    words = "cached rows of test:pair, pooled: captions of up to 8 tokens, prompt 'see: ', pooled by mean"
    assert f"- text: {words}" in card
    assert exported.manifests["words"].weights_digest in card
    _run_the_lines(card, tmp_path / "export")
    with pytest.raises(ValueError, match=r"open_clip cannot express .* its text tower is a cached teacher"):
        export(folder, tmp_path / "open_clip", "open_clip")
    if kind is cached_text:
        assert export(folder, tmp_path / "timm", "timm").difference == 0
    else:
        with pytest.raises(ValueError, match=r"timm cannot express .* cached teacher"):
            export(folder, tmp_path / "timm", "timm")


def _run_the_lines(card: str, folder: Path) -> None:
    """Run all Python lines of a model card, one after the other."""
    model = load_model(folder)
    pixels, text_rows = probe_inputs(model)
    names: dict[str, Any] = {"pixels": pixels, "image_rows": pixels, "text_rows": text_rows}
    direct, composed = (block.partition("```")[0] for block in card.split("```python\n")[1:])
    exec(direct.replace("this folder", str(folder)), names)
    assert names["cosines"].shape == (len(pixels), len(text_rows))
    side = 16 if model.sees_cached_rows else 32
    names["pixels"] = torch.zeros(3, 3, side, side, dtype=torch.uint8)
    exec(composed.replace("this folder", str(folder)), names)
    assert (names["images"].shape, names["texts"].shape) == ((3, 16), (2, 16))
    rows = load_frozen_encoder("test:pair", EncoderOptions(prompt="see: ")).side("text").embed(CAPTIONS)
    torch.testing.assert_close(F.normalize(names["texts"], dim=-1), model.encode_tokens(rows))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "text",
    [
        CAUSAL,
        CAUSAL | {"causal": False, "mask_padding": False, "pool": "last"},
        CAUSAL | {"activation": "quick_gelu", "norm_eps": 1e-6, "mlp_ratio": 2.0},
    ],
    ids=["causal", "bidirectional", "quick gelu"],
)
def test_open_clip_gives_the_same_embeddings(
    three: dict[str, Any], tmp_path: Path, text: dict[str, Any], kind: str
) -> None:
    three["towers"] |= {"image": {"kind": "timm", "model": "test_resnet"}, "text": text}
    three["heads"]["g"] |= {"bias": kind == "softmax"}
    three |= {"loss": {"kind": kind}}
    folder = finished_run(three)
    done = export(folder, tmp_path / "export", "open_clip")
    assert done.difference <= 1e-5
    config = json.loads((tmp_path / "export" / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["size"] == [32, 32]
    import open_clip

    ours, theirs = load_model(folder), open_clip.create_model(f"local-dir:{tmp_path / 'export'}")
    assert theirs.logit_scale.item() == pytest.approx(ours.model.log_scales["scale"].item())
    assert (theirs.logit_bias is None) == (kind == "softmax")
    tokenizer = SentencePieceTokenizer.load(tmp_path / "export" / "tokenizer.model")
    tokens = tokenizer.encode(["a red disc", "bar"], 8)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval().encode_text(tokens, normalize=True), ours.encode_tokens(tokens))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_open_clip_has_the_image_head_of_timms_mlp(clip: dict[str, Any], tmp_path: Path, dropout: float) -> None:
    clip["towers"] |= {"image": {"kind": "timm", "model": "test_resnet"}, "text": CAUSAL}
    clip["heads"]["f"] |= {"kind": "mlp", "hidden": 32, "dropout": dropout}
    assert export(finished_run(clip), tmp_path / "export", "open_clip").difference <= 1e-5


def test_the_docs_say_what_can_begin_from_what_and_leave_to_what() -> None:
    page = (ROOT / "docs/exports.md").read_text(encoding="utf-8")
    assert formats_table() in page
    assert beginnings_table() in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers": {"text": CAUSAL | {"pool": "mean"}}}, "pools by the mean"),
        ({"towers": {"text": CAUSAL | {"causal": False}}}, "is bidirectional and masks padding"),
        ({"towers": {"text": CAUSAL | {"pool": "last"}}}, "does not pool at the end token"),
        ({"heads": {"g": {"of": "text", "kind": "mlp"}}}, "its text head is not one linear map"),
        ({"heads": {"f": {"of": "image", "input_norm": "layer"}}}, "its image head is not one linear map"),
        ({"towers": {"image": {"kind": "timm", "model": "test_vit", "args": {"img_size": 32}}}}, "has args"),
    ],
)
def test_open_clip_cannot_express(clip: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tree = clip | {"towers": clip["towers"] | {"text": CAUSAL}}
    for key, change in changes.items():
        tree[key] = tree[key] | change
    with pytest.raises(ValueError, match=message):
        export(finished_run(tree), tmp_path / "export", "open_clip")
    assert list(tmp_path.glob("*export*")) == []


@pytest.mark.parametrize("image", [{"model": "test_resnet"}, {"model": "test_vit", "args": {"img_size": 32}}])
def test_timm_gives_the_same_features_to_the_bit(clip: dict[str, Any], tmp_path: Path, image: dict[str, Any]) -> None:
    import timm

    folder = finished_run(clip | {"towers": clip["towers"] | {"image": {"kind": "timm"} | image}})
    assert export(folder, tmp_path / "export", "timm").difference == 0
    theirs, ours = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True), load_model(folder)
    for name, tensor in ours.model.towers["image"].model.state_dict().items():  # type: ignore[union-attr]
        assert theirs.state_dict()[name].equal(tensor), name
    assert theirs.pretrained_cfg["input_size"] == (3, 32, 32)


def test_an_existing_folder_and_an_unfinished_run_are_refused(clip: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished run"):
        export(tmp_path / "nothing", tmp_path / "export")
    folder = finished_run(clip)
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        export(folder, folder)


@pytest.mark.distributed
def test_the_command(clip: dict[str, Any], tmp_path: Path) -> None:
    folder = finished_run(clip)
    command = [sys.executable, "-m", "threetowers", "export", str(folder), str(tmp_path / "export")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "differ by at most 0.0e+00" in done.stdout, done.stderr
    assert yaml.safe_load((tmp_path / "export" / "config.yaml").read_text())["towers"].keys() == {"image", "text"}

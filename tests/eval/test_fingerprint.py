"""Fingerprints: whatever decides an embedding is in them, for every kind of model; paths and processes are not."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import COLOURS, THINGS
from tests.eval.runs import finished
from threetowers.cache.webdataset.sample_list import SampleList
from threetowers.cache.webdataset.tar_headers import Member
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.datasets.image_set import ImageSet, read_images
from threetowers.eval.encoders.embedding_store import images_digest
from threetowers.eval.encoders.encoder import LoadOptions, ModelInfo
from threetowers.eval.encoders.ensemble import EnsembleOptions
from threetowers.eval.encoders.load import load_encoder
from threetowers.trainer.tokenizer import train_tokenizer

PLAIN = LoadOptions(workers=0)


def merge(tree: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A copy of a tree with some leaves changed."""
    merged = dict(tree)
    for key, value in change.items():
        merged[key] = merge(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


@pytest.mark.parametrize(
    "change",
    [
        {"towers": {"text": {"activation": "quick_gelu"}}},
        {"towers": {"text": {"pool": "mean"}}},
        {"towers": {"text": {"causal": True}}},
        {"towers": {"text": {"mask_padding": False}}},
        {"towers": {"text": {"norm_eps": 1e-3}}},
        {"towers": {"image": {"args": {"act_layer": "relu"}}}},
        {"loss": {"scale_max": 5.0}},
        {"data": {"image_size": 48}, "towers": {"image": {"model": "test_resnet"}}},
        {"data": {"tokenizer": "other.model"}},
    ],
    ids=str,
)
def test_runs_of_equal_weights(clip: dict[str, Any], tmp_path: Path, change: dict[str, Any]) -> None:
    if "tokenizer" in change.get("data", {}):
        captions = [f"{thing} {colour}, the" for colour in COLOURS for thing in THINGS] * 2
        (tmp_path / "other.model").write_bytes(train_tokenizer(captions, 48))
        clip["data"]["vocab_size"] = 64  # so that both have the same weights
        change = {"data": {"tokenizer": str(tmp_path / "other.model")}}
    if "model" in change.get("towers", {}).get("image", {}):
        clip["towers"]["image"] = {"kind": "timm", "model": "test_resnet"}
    one, other = (load_encoder(finished(merge(clip, c)), PLAIN).info for c in ({}, change))
    assert one.digest == other.digest
    assert one.fingerprint != other.fingerprint


def test_runs_of_other_heads_precision_or_place(clip: dict[str, Any], tmp_path: Path) -> None:
    clip["heads"] |= {"f2": {"of": "image"}}
    clip["terms"] |= {"second": {"x": "f2", "y": "g"}}
    path = finished(clip)
    base = load_encoder(path, PLAIN).info
    moved = shutil.copytree(path, tmp_path / "moved")
    assert load_encoder(moved, PLAIN).info.fingerprint == base.fingerprint
    half = load_encoder(path, LoadOptions(precision="bfloat16")).info
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace("  image: f\n", "  image: f2\n"))
    assert len({base.fingerprint, half.fingerprint, load_encoder(moved, PLAIN).info.fingerprint}) == 3


def edited_cache(cache: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a cache whose manifest says something else."""
    shutil.copytree(cache, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(merge(manifest, changes)))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"precision": "bfloat16"},
        {"encoder": "timm:test_resnet.other"},
        {"feature": "cls"},
        {"preprocessing": {"interpolation": "nearest"}},
        {"preprocessing": {"mean": [0.1, 0.2, 0.3]}},
        {"preprocessing": {"crop_pct": 0.5}},
    ],
    ids=str,
)
def test_rows_of_caches(cache: Path, lit: dict[str, Any], tmp_path: Path, change: dict[str, Any]) -> None:
    other = edited_cache(cache, tmp_path / "other", **change)
    same = edited_cache(cache, tmp_path / "same")
    base = load_encoder(f"cache:{cache}").info
    assert load_encoder(f"cache:{same}").info.fingerprint == base.fingerprint
    assert load_encoder(f"cache:{other}").info.fingerprint != base.fingerprint
    # A LiT run is named by the cache that it reads, not by the one that it was trained on.
    run = finished(lit)
    found = [load_encoder(run, LoadOptions(caches={"third": path})).info for path in (cache, same, other)]
    assert found[0].fingerprint == found[1].fingerprint != found[2].fingerprint
    assert found[2].cache_manifest != found[0].cache_manifest


def test_ensembles(three: dict[str, Any]) -> None:
    path = finished(three)
    options = [EnsembleOptions("third", 0.1), EnsembleOptions("third", 0.2), EnsembleOptions("third", 0.1, "logit")]
    found = [load_encoder(path, PLAIN, one).info.fingerprint for one in (None, *options)]
    assert len(set(found)) == 4
    assert load_encoder(path, PLAIN, options[0]).info.fingerprint == found[1]


OPEN_CLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"size": [32, 32]},
}


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """Folders as open_clip saves them, all with the same weights."""
    import open_clip

    root = tmp_path_factory.mktemp("open_clip")

    def make(change: dict[str, Any]) -> Path:
        folder = root / str(len(list(root.iterdir())))
        folder.mkdir()
        (folder / "open_clip_config.json").write_text(json.dumps(merge(OPEN_CLIP, change)))
        weights = root / "0" / "open_clip_model.safetensors"
        if weights.exists():
            os.link(weights, folder / weights.name)
        else:
            torch.manual_seed(0)
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
            save_file({name: 3 * tensor.clone() for name, tensor in model.state_dict().items()}, weights)
        return folder

    return make


@pytest.fixture(scope="module")
def plain_open_clip(open_clip_folder: Callable[[dict[str, Any]], Path]) -> ModelInfo:
    return load_encoder(f"open_clip:{open_clip_folder({})}", PLAIN).info


@pytest.mark.parametrize(
    "change",
    [
        {"model_cfg": {"quick_gelu": True}},
        {"model_cfg": {"text_cfg": {"pool_type": "first"}}},
        {"model_cfg": {"text_cfg": {"no_causal_mask": True}}},
        {"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"clean": "whitespace"}}}},
        {"model_cfg": {"vision_cfg": {"pool_type": "avg"}}},
        {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}},
        {"preprocess_cfg": {"std": [0.5, 0.5, 0.5]}},
        {"preprocess_cfg": {"interpolation": "bilinear"}},
        {"preprocess_cfg": {"resize_mode": "squash"}},
    ],
    ids=str,
)
def test_open_clip_models_of_equal_weights(
    open_clip_folder: Callable[[dict[str, Any]], Path], plain_open_clip: ModelInfo, change: dict[str, Any]
) -> None:
    other = load_encoder(f"open_clip:{open_clip_folder(change)}", PLAIN).info
    assert other.digest == plain_open_clip.digest
    assert other.fingerprint != plain_open_clip.fingerprint


def test_models_of_equal_weights_share_no_embeddings(
    open_clip_folder: Callable[[dict[str, Any]], Path], tars: list[Path], tmp_path: Path
) -> None:
    data = read_images([index_tar(tars[0])])
    quick = open_clip_folder({"model_cfg": {"quick_gelu": True}})
    alone = load_encoder(f"open_clip:{quick}", PLAIN)
    expected = alone.images(data, data.images), alone.texts(["a red disc"])
    kept = LoadOptions(workers=0, embeddings=tmp_path)
    for model in (open_clip_folder({}), quick):
        encoder = load_encoder(f"open_clip:{model}", kept)
        found = encoder.images(data, data.images), encoder.texts(["a red disc"])
    assert len(list(tmp_path.glob("images-*.npy"))) == 2
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "change",
    [
        {"model_args": {"act_layer": "gelu"}},
        {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}},
        {"pretrained_cfg": {"std": [0.1, 0.2, 0.3]}},
        {"pretrained_cfg": {"interpolation": "nearest"}},
        {"pretrained_cfg": {"crop_pct": 0.5}},
        {"pretrained_cfg": {"input_size": [3, 64, 64]}},
    ],
    ids=str,
)
def test_timm_models_of_equal_weights(cache: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    state = load_file(cache.parent / "teacher.safetensors")
    found = []
    for number, one in enumerate(({}, {}, change)):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 32, 32]}}
        (folder / "config.json").write_text(json.dumps(merge(config, one)))
        save_file(state, folder / "model.safetensors")
        found.append(load_encoder(f"timm:{folder}", PLAIN).info)
    assert found[0].digest == found[2].digest
    assert found[0].fingerprint == found[1].fingerprint != found[2].fingerprint
    half = load_encoder(f"timm:{tmp_path / '0'}", LoadOptions(precision="bfloat16")).info
    assert half.fingerprint != found[0].fingerprint


def test_another_process_finds_the_same(
    clip: dict[str, Any], open_clip_folder: Callable[[dict[str, Any]], Path], plain_open_clip: ModelInfo
) -> None:
    models = [str(finished(clip)), f"open_clip:{open_clip_folder({})}"]
    code = (
        "import sys; from threetowers.eval.encoders.load import load_encoder; "
        "print(*(load_encoder(model).info.fingerprint for model in sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code, *models], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [load_encoder(models[0], PLAIN).info.fingerprint, plain_open_clip.fingerprint]


def test_embeddings_are_named_by_the_image_member(tars: list[Path]) -> None:
    tar = index_tar(tars[0])
    other = dataclasses.replace(
        tar, samples=SampleList([(sample.key, {"jpg": Member(0, 1)}) for sample in tar.samples])
    )
    images = read_images([tar]).images
    digests = {images_digest(ImageSet([index], images, []), images) for index in (tar, other)}
    assert len(digests) == 2

"""Weights as people have them: wrapped, averaged, sharded, for other classes; and files that are not what they seem."""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from threetowers.cache.encoders.encoder import state_digest
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.encoders.weights_file import read_state, split_part

State = dict[str, Tensor]
LEVIT = "levit_128s"


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(3)
    return dict(timm.create_model("test_resnet", pretrained=False).state_dict())


@pytest.fixture(scope="module")
def averaged(state: State) -> State:
    return {name: value * 1.5 if value.is_floating_point() else value for name, value in state.items()}


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def digest_of(source: object) -> str:
    return load_frozen_encoder(f"timm:test_resnet@32:{source}").weights_digest


WRAPPERS: dict[str, Callable[[State], Any]] = {
    "": lambda state: state | {"num_updates": 5},
    "module": lambda state: under("module.", state),
    "state_dict": lambda state: {
        "state_dict": state,
        "epoch": 3,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
    },
    "state_dict.module": lambda state: {"state_dict": under("module.", state)},
    "model._orig_mod": lambda state: {"model": under("_orig_mod.", state), "args": argparse.Namespace(lr=0.1)},
    "module._orig_mod": lambda state: under("module._orig_mod.", state),
    "state_dict.model": lambda state: {
        "state_dict": under("model.", state) | {"criterion.weight": torch.ones(2)},
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 0.1},
    },
    "visual.trunk": lambda state: under("visual.trunk.", state) | {"logit_scale": torch.ones(())},
}


@pytest.mark.parametrize("part", WRAPPERS)
def test_a_model_is_found_in_what_is_wrapped_around_it(part: str, state: State, tmp_path: Path) -> None:
    torch.save(WRAPPERS[part](state), tmp_path / "checkpoint.pth.tar")
    teacher = load_frozen_encoder(f"timm:test_resnet@32:{tmp_path}/checkpoint.pth.tar")
    assert teacher.weights_digest == state_digest(state)
    assert teacher.weights == "file:checkpoint.pth.tar" + (f"#{part}" if part else "")


@pytest.mark.parametrize(("raw", "ema"), [("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_averaged_weights_come_first_as_in_timm(
    raw: str, ema: str, state: State, averaged: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "last.pth.tar"
    torch.save({raw: state, ema: averaged, "args": argparse.Namespace(model="test_resnet"), "metric": 0.5}, path)
    expected = timm.models.load_state_dict(str(path), weights_only=True)
    with caplog.at_level(logging.INFO, "threetowers"):
        teacher = load_frozen_encoder(f"timm:test_resnet@32:{path}")
    assert teacher.weights_digest == state_digest(expected) == state_digest(averaged)
    assert teacher.weights == f"file:last.pth.tar#{ema}"
    assert f"{ema!r}, are taken; the others are {path}#{raw}" in caplog.text
    assert digest_of(f"{path}#{raw}") == state_digest(state)


def test_several_models_in_a_file_must_be_told_apart(state: State, averaged: State, tmp_path: Path) -> None:
    path = tmp_path / "dino.pth"
    torch.save({"student": under("module.", state), "teacher": averaged}, path)
    with pytest.raises(
        ValueError, match=r"several models that fit: name one, as .*dino\.pth#student\.module or .*#teacher"
    ):
        digest_of(path)
    assert digest_of(f"{path}#teacher") == state_digest(averaged)
    assert digest_of(f"{path}#student") == state_digest(state)
    with pytest.raises(ValueError, match=r"no tensor named queen\.\*; known prefixes: student, .*teacher"):
        digest_of(f"{path}#queen")


def test_a_file_with_a_hash_in_its_name_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a#b.pth").touch()
    assert split_part(f"{tmp_path}/a#b.pth") == (tmp_path / "a#b.pth", "")
    assert split_part("c.pth#x.y.") == (Path("c.pth"), "x.y")


@pytest.mark.parametrize("classes", [0, 37])
@pytest.mark.parametrize("model", ["test_resnet", LEVIT])
def test_any_number_of_classes_loads(model: str, classes: int, tmp_path: Path) -> None:
    state = timm.create_model(model, pretrained=False, num_classes=classes).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    assert load_frozen_encoder(f"timm:{model}:{tmp_path}/weights.safetensors").weights_digest == state_digest(state)


def test_half_precision_loads_in_float32(state: State, tmp_path: Path) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    wide = {name: value.float() if value.is_floating_point() else value for name, value in half.items()}
    assert digest_of(tmp_path / "half.safetensors") == state_digest(wide)


def test_batch_counters_may_be_missing_as_in_old_files(state: State, tmp_path: Path) -> None:
    old = {name: value for name, value in state.items() if "num_batches_tracked" not in name}
    torch.save({"state_dict": under("module.", old)}, tmp_path / "old.pth")
    assert digest_of(tmp_path / "old.pth") == state_digest(state)


def test_folders_and_shards(state: State, averaged: State, tmp_path: Path) -> None:
    names = list(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    with pytest.raises(ValueError, match=r"a folder; found the files a\.safetensors, b\.safetensors: name one"):
        digest_of(tmp_path)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert digest_of(tmp_path) == state_digest(state)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 shards are missing \(b\.safetensors\)"):
        digest_of(tmp_path)
    save_file(averaged, tmp_path / "model.safetensors")  # what timm looks for first
    assert digest_of(tmp_path) == state_digest(averaged)


class Pickled:
    """What a training script may save beside its weights, and nobody may run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


def make(kind: str, path: Path, state: State) -> None:
    """Write a file that does not fit `test_resnet`, or is none."""
    whole = path.with_name("whole.pth")
    torch.save(state, whole)
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(whole.read_bytes()[:100_000])
        case "page":
            path.write_text("<html>not found</html>")
        case "pointer":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
        case "module":
            torch.save(timm.create_model("test_resnet", pretrained=False), path)
        case "code":
            torch.save({"state_dict": state, "extra": Pickled()}, path)
        case "numbers":
            torch.save({"epoch": 3}, path)
        case "nan":
            name = "layer1.0.conv1.weight"
            torch.save(state | {name: torch.full_like(state[name], torch.nan)}, path)
        case "gray":
            torch.save(timm.create_model("test_resnet", pretrained=False, in_chans=1).state_dict(), path)
        case "other":
            torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), path)
        case "part":
            torch.save({"state_dict": {name: value for name, value in state.items() if "layer4" not in name}}, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "the file is empty"),
        ("cut", r"not a readable state dict \(100,000 bytes\): .*; expected a complete file of torch or safetensors"),
        ("page", r"not a readable state dict \(22 bytes\): it is none of torch's"),
        ("pointer", "a pointer of Git LFS, not the weights"),
        ("module", r"objects that are not unpickled \(.*; save the weights alone: torch\.save\(model\.state_dict"),
        ("code", r"objects that are not unpickled \(builtins\.exec\)"),
        ("numbers", "found no tensors in it"),
        ("nan", r"NaN or infinity in 1 of its tensors \(layer1\.0\.conv1\.weight\)"),
        ("gray", r"1 of another shape \(conv1\.0\.weight \(\d+, 1, 3, 3\) instead of \(\d+, 3, 3, 3\)\)"),
        ("other", r"does not fit timm:test_resnet: of its tensors \d+ of \d+ missing \(.*unexpected \("),
        (
            "part",
            r"does not fit timm:test_resnet: of its tensors \d+ of \d+ missing \(layer4\..*, \.\.\.\)\. Name",
        ),
    ],
)
def test_a_file_that_is_not_the_model_is_refused_in_one_line(
    kind: str, message: str, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    make(kind, path, state)
    with pytest.raises(ValueError, match=message) as error:
        digest_of(path)
    text = str(error.value).replace(str(tmp_path), "")
    assert str(path) in str(error.value)
    assert len(text) < 450
    assert "\n" not in text
    assert "\x1b" not in text


def test_a_damaged_safetensors_file_is_refused(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut\.safetensors: not a readable state dict"):
        read_state(tmp_path / "cut.safetensors")
    assert load_file(tmp_path / "whole.safetensors").keys() == read_state(tmp_path / "whole.safetensors").keys()

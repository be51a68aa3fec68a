"""Complete runs with real processes: layouts agree, bad input is one message, no teacher is in memory."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from tests.conftest import samples_of, write_tar
from tests.trainer.launches import (
    ENVIRONMENT,
    RUN_CONFIGS,
    TRAIN,
    losses,
    metric,
    read_metrics,
    run_command,
    run_jobs,
    same_weights,
    torchrun,
    write_config,
)
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.webdataset.sample import read_image
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.data.joins.image_join import ImageJoin
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.running_moments import NAMES
from threetowers.trainer.run.run_folder import RunFolder
from threetowers.trainer.train import ONE_VALUE


@pytest.mark.distributed
def test_layouts_agree_and_hold_no_teacher(three: dict[str, Any], tmp_path: Path) -> None:
    """ZeRO 0 to 3 on two ranks and one process alone: the same losses, accuracies and weights."""
    two = [write_config(three, tmp_path, f"zero{stage}", zero_stage=stage) for stage in range(4)]
    half = write_config(three, tmp_path, "half", zero_stage=2, precision="bfloat16")
    one = write_config(three, tmp_path, "one")
    output = run_command([*torchrun(2), RUN_CONFIGS, *(file for file, _ in [*two, half])]).stdout
    run_command([sys.executable, RUN_CONFIGS, one[0]])
    expected, weights = np.array(losses(one[1])), load_file(one[1] / "model.safetensors")
    assert expected.shape == (6, 4)
    for _, out in two:
        np.testing.assert_allclose(np.array(losses(out)), expected, rtol=2e-4)
        found = load_file(out / "model.safetensors")
        assert found.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    np.testing.assert_allclose(np.array(losses(half[1])), expected, rtol=2e-2)
    seen = [json.loads(line) for line in output.splitlines() if line.startswith('{"models"')]
    assert len(seen) == 5
    for memory in seen:
        assert not memory["encoder imported"]
        assert "timm.models.vision_transformer" in memory["models"]  # the image tower
        assert not any("resnet" in kind for kind in memory["models"])  # the teacher's kind


@pytest.mark.distributed
def test_running_moments_on_two_ranks(clip: dict[str, Any], tmp_path: Path) -> None:
    """Recomputed activations count once, to the bit; skipped steps not at all; ranks evaluate by what is saved."""
    clip["towers"]["image"] = {"kind": "timm", "model": "test_resnet"}
    clip["heads"]["g"] |= {"kind": "mlp", "norm": "batch", "gated": True, "dropout": 0.2}
    plain = write_config(clip, tmp_path, "plain", zero_stage=1, micro_batch_size=3)
    again = write_config(clip, tmp_path, "again", zero_stage=1, micro_batch_size=3, activation_checkpointing=True)
    whole = write_config(clip, tmp_path, "whole", zero_stage=3, activation_checkpointing=True)
    skip = write_config(clip, tmp_path, "skip", zero_stage=1, on_nonfinite="skip")
    jobs: list[dict[str, Any]] = [{"config": file} for file, _ in (plain, again, whole)]
    jobs.append({"config": skip[0], "poison": {"2": "heads.f.weight", "5": "heads.f.weight"}})
    assert {job["end"] for job in run_jobs(2, jobs, tmp_path)} == {"finished"}
    assert same_weights(plain[1], again[1])
    counts = {plain[1]: 12, whole[1]: 6, skip[1]: 4}  # two micro-batches a step, one, and one of which two are skipped
    for out, count in counts.items():
        weights = load_file(out / "model.safetensors")
        names = [name for name in weights if name.rpartition(".")[2] in NAMES]
        assert {int(weights[name]) for name in names if name.endswith("tracked")} == {count}
        saved = torch.stack([weights[name].double().abs().sum() for name in names]).sum()
        assert metric(out, "weights/moments")[-1] == pytest.approx(float(saved), rel=1e-12)
    # A step that is skipped leaves them as they were.
    moments = metric(skip[1], "weights/moments")
    assert moments[0] == moments[1] != moments[2] != moments[3] == moments[4]


@pytest.mark.distributed
def test_the_deepspeed_launcher(lit: dict[str, Any], tmp_path: Path) -> None:
    file, out = write_config(lit, tmp_path, "run")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    command = [sys.executable, launcher, "--num_accelerators", "2", "--master_port", "29611", "--module", "threetowers"]
    result = run_command([*command, "train", file, "optim.lr=2e-3"])
    assert "on each of 2 ranks (cpu) = 12" in result.stdout + result.stderr
    assert yaml.safe_load((out / "config.yaml").read_text())["optim"]["lr"] == 2e-3
    assert json.loads((out / "deepspeed.json").read_text())["train_micro_batch_size_per_gpu"] == 6
    assert read_metrics(out)[-1]["lr"] < read_metrics(out)[2]["lr"] < 2e-3
    assert list((out / "tensorboard").glob("events.*"))
    alone = [*TRAIN, file, "optim.lr=2e-3"]
    finished = read_metrics(out)
    assert "trained 6 steps" in run_command(alone).stdout  # by two ranks: one alone finds nothing left to do
    assert read_metrics(out) == finished


@pytest.mark.distributed
def test_bad_input_is_one_message(clip: dict[str, Any], tmp_path: Path) -> None:
    samples = samples_of(0, 24)
    samples[9][1]["png"] = b"no picture"
    clip["data"]["tars"] = [str(write_tar(tmp_path / "bad.tar", samples))]
    file, _ = write_config(clip, tmp_path, "run")
    command = [*TRAIN, file]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("threetowers: BadSample: ")  # no launcher started it: no rank
    assert "bad.tar: sample 's0009': " in last
    assert last.endswith("set data.on_bad: skip to train without such samples")
    assert "Traceback" not in result.stderr
    run_command([*command, "data.on_bad=skip", f"output_dir={tmp_path / 'skipping'}"])
    assert sum(m["skipped_samples"] for m in read_metrics(tmp_path / "skipping")) >= 1


def test_torch_says_so_where_one_sample_cannot_be_normalized() -> None:
    """By this message a run tells that too few samples of a batch are left, from its other errors."""
    with pytest.raises(ValueError, match=ONE_VALUE):
        nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))


@pytest.mark.distributed
def test_a_full_disk_is_one_message(clip: dict[str, Any], tmp_path: Path) -> None:
    file, out = write_config(clip, tmp_path, "run")
    command = f"ulimit -f 400; exec {' '.join(TRAIN)} {file}"  # no file above 400 KiB
    result = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 2
    assert f"{out}/checkpoints/step-00000006 cannot be written: " in result.stderr
    assert "it resumes from the start" in result.stderr
    assert not list((out / "checkpoints").iterdir())
    assert not (out / "model.safetensors").exists()


def test_cached_and_live_teacher_give_the_same_loss(three: dict[str, Any], cache: Path, tars: list[Path]) -> None:
    config = parse(three)
    indexes = [index_tar(tar) for tar in tars]
    join = ImageJoin(cache, indexes)
    encoder = load_frozen_encoder(f"timm:test_resnet@64:{cache.parent}/teacher.safetensors").side("image")
    addresses = [(0, 3), (1, 0), (1, 19), (0, 24), (0, 0), (1, 7)]
    pixels = [np.ascontiguousarray(encoder.transform(read_image(indexes[t], o, 10**6))) for t, o in addresses]
    live = encoder.embed(torch.from_numpy(np.stack(pixels)))
    cached = torch.from_numpy(np.stack([join.row(t, o) for t, o in addresses]))
    assert torch.cosine_similarity(live, cached).min() >= 0.9999
    torch.manual_seed(0)
    model = TowerModel(config, vocab_size=48, cache_widths={"third": encoder.width()}).eval()
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.tensor([[5 + i, 9, 2, 0] for i in range(6)])
    totals = [
        float(total_loss(config, model({"image": pixels, "text": tokens, "third": rows}))[0].detach())
        for rows in (live, cached)
    ]
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)


def test_a_folder_with_another_config_is_refused(clip: dict[str, Any], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    clip["engine"] = {"precision": "float32"}
    run = parse(clip)
    assert folder.check(run) == []
    folder.create(run, {}, {})
    assert folder.check(run) == []
    with pytest.raises(
        ConfigError,
        match=r"another config:\n  global_batch_size: 12 -> 15\nchoose another `output_dir`",
    ):
        folder.check(parse(clip | {"global_batch_size": 15}))
    elsewhere = clip | {
        "output_dir": "moved",
        "engine": {"precision": "float32", "zero_stage": 3, "micro_batch_size": 4, "compile": "blocks"},
        "checkpoint": {"keep": 5},
    }
    changed = [d.key for d in folder.check(parse(elsewhere))]
    assert changed == [
        "checkpoint.keep",
        "engine.compile",
        "engine.micro_batch_size",
        "engine.zero_stage",
        "output_dir",
    ]
    with pytest.raises(ConfigError, match=r"config:\n  engine.precision: 'float32' -> 'bfloat16'\nchoose"):
        folder.check(parse(clip | {"engine": {"zero_stage": 3, "precision": "bfloat16"}}))


def test_a_cache_of_another_encoder_is_refused(three: dict[str, Any], cache: Path, tars: list[Path]) -> None:
    indexes = [index_tar(tar) for tar in tars]
    assert ImageJoin(cache, indexes, "timm:test_resnet").cache.manifest.encoder == "timm:test_resnet"
    with pytest.raises(ManifestError, match=r"encoder: expected 'timm:resnet18', found 'timm:test_resnet'"):
        ImageJoin(cache, indexes, "timm:resnet18")
    ImageJoin(cache, indexes, "timm:test_resnet@64")
    with pytest.raises(ManifestError, match=r"encoder: expected 'timm:test_resnet@96', found 'timm:test_resnet@64'"):
        ImageJoin(cache, indexes, "timm:test_resnet@96")
    with pytest.raises(ManifestError, match=r"expected KIND:NAME\[@SIZE\], found .*: leave its weights out"):
        ImageJoin(cache, indexes, "timm:test_resnet:teacher.safetensors")
    began = ImageJoin(cache, indexes).cache.manifest
    folder = RunFolder(Path(three["output_dir"]))
    folder.create(parse(three), {}, {"third": began})
    folder.check_manifests({"third": began})
    with pytest.raises(ManifestError, match=r"tower 'third' reads another cache .*: weights_digest: expected"):
        folder.check_manifests({"third": replace(began, weights_digest="0" * 64)})
    folder.manifests.write_text('{"third": {"encoder": "timm:test_resnet"}}')
    with pytest.raises(
        ManifestError,
        match=r"cache_manifests\.json is damaged, or of another version:\n  third\.weights: Field required",
    ):
        folder.read_manifests()

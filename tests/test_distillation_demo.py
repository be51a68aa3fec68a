"""The demo's students, from the runs of `make demo` over the caches of these to a report, with tiny towers."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests.cache.text_encoders import PROCESS_ENV
from tests.emoji_samples import demo_folder
from tests.trainer.launches import read_metrics

HELD_OUT = 40
SHORT = ["duration={steps: 3}", "global_batch_size=16", "data.workers=0", "log.every_steps=1"]
IMAGE = "towers.image.args={stem_width: 8, channels: [8, 16, 16, 24]}"
HALF = "towers.image.args={stem_width: 4, channels: [4, 8, 8, 12]}"
TEXT = ["towers.text.width=32", "towers.text.heads=4"]
HALF_TEXT = ["towers.text.width=16", "towers.text.heads=2", "towers.text.depth=1"]
THIRD = ["towers.third.encoder=timm:test_resnet", "towers.third.weights=teacher.safetensors"]
TEACHERS = {"clip": [IMAGE, *TEXT], "lit": [*TEXT, *THIRD], "3t": [IMAGE, *TEXT, *THIRD]}
STUDENTS = {
    "distill-lit": [IMAGE, *TEXT],
    "clip-kd": [IMAGE, *TEXT],
    "mobileclip-dr": [IMAGE, *TEXT],
    "tinyclip": [HALF, *HALF_TEXT],
    "3t-distill": [IMAGE, *TEXT, *THIRD],
}
CROPS = ["--views", "crops:2", "--view-scale", "0.6", "--view-augment", "randaugment:2:9"]
SOURCES = ["--captions", "json.label", "json.captions"]


def threetowers(folder: Path, *arguments: str) -> str:
    """Run a command in the folder of the demo; it must succeed."""
    command = [sys.executable, "-m", "threetowers", *arguments]
    result = subprocess.run(command, cwd=folder, env=PROCESS_ENV, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout + result.stderr


def train(folder: Path, name: str, overrides: list[str]) -> str:
    """Train a config of the demo for a few steps; return what it printed."""
    page = threetowers(folder, "train", f"configs/emoji/{name}.yaml", *SHORT, *overrides)
    losses = [metrics["loss"] for metrics in read_metrics(folder / "runs/emoji" / name)]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    return page


def embed(folder: Path, run: str, name: str, *flags: str) -> None:
    """Build the caches of a run's two sides."""
    outputs = [f"runs/emoji/{name}-image", f"runs/emoji/{name}-text"]
    sides = ["--of", "image", "text", "--feature", "projected", "--encoder", f"run:runs/emoji/{run}"]
    threetowers(folder, "cache", "build", "--tars", "data/emoji/train-*.tar", "--output-dir", *outputs, *sides, *flags)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo with its cache, tokenizer and runs, and the caches of what these runs embed."""
    folder = demo_folder(tmp_path_factory.mktemp("demo"), {"train": 48, "test": HELD_OUT})
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), folder / "teacher.safetensors")
    encoder = ["--encoder", "timm:test_resnet@64:teacher.safetensors"]
    threetowers(folder, "cache", "build", "--tars", "data/emoji/*.tar", "--output-dir", "runs/emoji/cache", *encoder)
    tokenizer = ["--vocab-size", "300", "--output", "runs/emoji/tokenizer.model"]
    threetowers(folder, "tokenizer", "train", "--tars", "data/emoji/train-*.tar", *tokenizer)
    for name, overrides in TEACHERS.items():
        train(folder, name, overrides)
    embed(folder, "clip", "clip")
    embed(folder, "lit", "lit")  # whose image tower is the cached encoder, which runs here
    for name in ("lit", "3t"):
        embed(folder, name, f"dr-{name}", *CROPS, *SOURCES)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_of_the_demo(demo: Path, name: str) -> None:
    page = train(demo, name, STUDENTS[name])
    assert re.search(r"term image-text: .* distill of \(f, g\); taught by ", page), page
    if name == "mobileclip-dr":
        assert "views: crops:2, seed 0, scale 0.6, augment randaugment:2:9" in page
        assert re.search(r"50% lit \(u_lit, v_lit\) at 0\.0635", page)
    if name == "tinyclip":
        assert "towers.text.init: inherited blocks 0 of 2" in page
    report = demo / "runs/report" / name
    held_out = ["--tars", "data/emoji/test-*.tar", "--group-field", "concept", "--output-dir", str(report)]
    threetowers(demo, "eval", "retrieval", f"runs/emoji/{name}", *held_out)
    (record,) = (json.loads(file.read_text()) for file in (report / "records").glob("*.json"))
    assert record["counts"]["images"] == HELD_OUT
    assert 0 < record["metrics"]["text_to_image/recall@10"] < 1


def test_the_small_tower_began_with_weights_of_the_large_one(demo: Path) -> None:
    """Three steps with a learning rate of 1e-9 move nothing that is seen here."""
    page = threetowers(
        demo,
        "train",
        "configs/emoji/tinyclip.yaml",
        *SHORT,
        *STUDENTS["tinyclip"],
        "optim.lr=1e-9",
        "output_dir=runs/emoji/begun",
    )
    assert "towers.image.init: inherited" in page
    student, teacher = (load_file(demo / f"runs/emoji/{run}/model.safetensors") for run in ("begun", "clip"))
    name = "towers.text.embed.weight"
    torch.testing.assert_close(student[name], teacher[name][:, :16], atol=1e-6, rtol=0)
    name = "towers.image.model.layer4.0.conv2.weight"
    torch.testing.assert_close(student[name], teacher[name][:12, :12], atol=1e-6, rtol=0)

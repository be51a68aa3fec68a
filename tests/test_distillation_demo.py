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
from safetensors.torch import save_file

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
    "mobileclip-dr": [IMAGE, *TEXT],
    "tinyclip": [HALF, *HALF_TEXT],
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


def embed(folder: Path, caches: dict[str, str], *flags: str) -> None:
    """Build caches of both sides of runs, in one reading; `caches`: the run by the name of its caches."""
    outputs = [f"runs/emoji/{name}-{side}" for name in caches for side in ("image", "text")]
    encoders = [f"run:runs/emoji/{run}" for run in caches.values() for _ in range(2)]
    sides = ["--of", *["image", "text"] * len(caches), "--feature", "projected"]
    tars = ["--tars", "data/emoji/train-*.tar"]
    threetowers(folder, "cache", "build", *tars, "--encoder", *encoders, *sides, "--output-dir", *outputs, *flags)


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
    embed(folder, {"clip": "clip", "lit": "lit"})  # the image tower of lit is a cached encoder, which runs here
    embed(folder, {"dr-lit": "lit", "dr-3t": "3t"}, *CROPS, *SOURCES)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_of_the_demo(demo: Path, name: str) -> None:
    page = train(demo, name, STUDENTS[name])
    assert re.search(r"term image-text: .* distill of \(f, g\); taught by ", page), page
    if name == "mobileclip-dr":
        assert "views: crops:2, seed 0, scale 0.6, augment randaugment:2:9" in page
        assert re.search(
            r"lit \(u_lit, v_lit\) at 0\.0635.* three \(u_three, v_three\) at 0\.0629, 25% own pairs;", page
        ), page
    if name == "tinyclip":
        assert "towers.text.init: inherited blocks 0 of 2" in page
    if name == "distill-lit":
        retrieve(demo, name)


def retrieve(demo: Path, name: str) -> None:
    """Evaluate a student, for which no cache is read."""
    report = demo / "runs/report" / name
    held_out = ["--tars", "data/emoji/test-*.tar", "--group-field", "concept", "--output-dir", str(report)]
    threetowers(demo, "eval", "retrieval", f"runs/emoji/{name}", *held_out)
    (record,) = (json.loads(file.read_text()) for file in (report / "records").glob("*.json"))
    assert record["counts"]["images"] == HELD_OUT
    assert 0 < record["metrics"]["text_to_image/recall@10"] < 1

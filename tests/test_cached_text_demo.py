"""The demo's runs on cached text, from the tars to a report, by the command line alone and with tiny encoders."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.cache.text_encoders import PROCESS_ENV, WIDTH
from tests.emoji_samples import demo_folder
from tests.trainer.launches import read_metrics

IMAGE_WIDTH = 96  # of test_resnet's features
HELD_OUT = 40
SHORT = ["duration={steps: 4}", "global_batch_size=16", "data.workers=0", "log.every_steps=1"]
RUNS = {  # what differs from the demo, whose encoders are larger
    "3t-text": [
        "towers.third.encoder=timm:test_resnet",
        "towers.fourth.encoder=test:bag",
        f"towers.fourth.dim={WIDTH}",
    ],
    "sharelock": [
        "towers.image.encoder=timm:test_resnet",
        "towers.image.weights=teacher.safetensors",
        "towers.text.encoder=test:bag",
        f"towers.text.dim={WIDTH}",
        f"embed_dim={IMAGE_WIDTH}",
    ],
}


def threetowers(folder: Path, *arguments: str) -> str:
    """Run a command in the folder of the demo; it must succeed."""
    command = [sys.executable, "-m", "threetowers", *arguments]
    result = subprocess.run(command, cwd=folder, env=PROCESS_ENV, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo with a cache of images and one of captions, built in one reading, and a tokenizer."""
    folder = demo_folder(tmp_path_factory.mktemp("demo"), {"train": 64, "test": HELD_OUT})
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), folder / "teacher.safetensors")
    encoders = ["--encoder", "timm:test_resnet@64:teacher.safetensors", "test:bag", "--of", "image", "text"]
    outputs = ["--output-dir", "runs/emoji/cache", "runs/emoji/cache-text"]
    threetowers(folder, "cache", "build", "--tars", "data/emoji/*.tar", *outputs, *encoders)
    tokenizer = ["--vocab-size", "300", "--output", "runs/emoji/tokenizer.model"]
    threetowers(folder, "tokenizer", "train", "--tars", "data/emoji/train-*.tar", *tokenizer)
    return folder


def train(demo: Path, name: str) -> str:
    """Train a config of the demo for a few steps on the tiny encoders; return what it printed."""
    page = threetowers(demo, "train", f"configs/emoji/{name}.yaml", *SHORT, *RUNS[name])
    losses = [metrics["loss"] for metrics in read_metrics(demo / "runs/emoji" / name)]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    assert f"{WIDTH} features of the drawn caption" in page
    return page


def retrieve(demo: Path, name: str, *flags: str) -> dict[str, float]:
    """Evaluate a run on the held-out tar; return its metrics."""
    report = demo / "runs/report" / "-".join([name, *flags])
    held_out = ["--tars", "data/emoji/test-*.tar", "--group-field", "concept", "--output-dir", str(report)]
    threetowers(demo, "eval", "retrieval", f"runs/emoji/{name}", *held_out, *flags)
    (record,) = (json.loads(file.read_text()) for file in (report / "records").glob("*.json"))
    assert record["counts"]["images"] == HELD_OUT
    metrics: dict[str, float] = record["metrics"]
    assert 0 < metrics["text_to_image/recall@10"] < 1
    assert 1 <= metrics["text_to_image/median_rank"] <= HELD_OUT
    return metrics


def test_three_towers_with_text(demo: Path) -> None:
    """What is deployed sees images and words: no cache is read."""
    assert "term text-fourth: 0.166667 x contrastive of (g_k, k_g)" in train(demo, "3t-text")
    retrieve(demo, "3t-text")


def test_sharelock(demo: Path) -> None:
    """Images and captions are rows of the caches, in training and in evaluation, or what their encoders compute now."""
    assert "no image is decoded, no word is read" in train(demo, "sharelock")
    by_cache = retrieve(demo, "sharelock")
    live = retrieve(demo, "sharelock", "--live-teacher")
    for name, value in by_cache.items():  # the rows are of float16
        assert live[name] == pytest.approx(value, abs=0.03 if "rank" not in name else 1), name

"""A real run: SIGTERM, resumption at another ZeRO stage, evaluation; and the model on GPU and CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.gpu.setting import Setting
from tests.gpu.steps.photographs import NOUNS, Photographs
from threetowers.trainer.export.trained_model import load_model

PREEMPTED = 75
COMMAND = [sys.executable, "-m", "threetowers"]
SAME = 1 - 1e-3  # cosine of one embedding on two devices, each in float32 or TF32


def run(setting: Setting) -> None:
    data = Photographs.of(setting)
    steps, interrupted_at = (4, 2) if setting.rehearse else (40, 10)
    folder = setting.scratch / "run"
    config = setting.scratch / "run.yaml"
    config.write_text(yaml.safe_dump(config_of(setting, data, folder, steps)))

    # Stopped once it has trained some steps; then the same command again, at another ZeRO stage.
    began = time.monotonic()
    code = train_until(folder, config, interrupted_at)
    assert code == PREEMPTED, f"stopped by SIGTERM the run ended with exit code {code}, not {PREEMPTED}"
    print(f"    stopped by SIGTERM after {time.monotonic() - began:.1f} s")
    logged = steps_of(folder)
    assert logged, "no step was logged before SIGTERM"
    subprocess.run([*COMMAND, "train", str(config), "engine.zero_stage=1"], check=True)
    resumed = steps_of(folder)
    assert resumed == list(range(1, steps + 1)), f"steps in metrics.jsonl: {resumed}"
    rows = metrics_of(folder)
    assert all(row["loss"] == row["loss"] for row in rows)
    summary = json.loads((folder / "summary.json").read_text())
    setting.record("3T S/16 from tars: images", summary["images_per_s"], "images/s")
    setting.record("3T S/16 from tars: waiting for data", 100 * summary["data_wait"], "%")
    print(f"    {summary['bottleneck']}")

    # Evaluated by its command, and embedded on both devices.
    began = time.monotonic()
    command = [*COMMAND, "eval", "retrieval", str(folder), "--tars", data.test_tar, "--workers", str(workers(setting))]
    command += ["--output-dir", str(setting.scratch / "report"), "--device", str(setting.device)]
    subprocess.run(command, check=True)
    setting.record(f"evaluation of {data.per_tar} images, with its start", time.monotonic() - began, "s")
    if setting.gpu_only("embeddings on GPU and CPU"):
        setting.record("smallest cosine of GPU and CPU embeddings", smallest_cosine(folder, setting), "")


def config_of(setting: Setting, data: Photographs, folder: Path, steps: int) -> dict[str, Any]:
    """Return a 3T run, as a plain tree."""
    image: dict[str, Any] = {"kind": "timm", "model": "vit_small_patch16_224"}
    text = {"kind": "text", "width": 384, "depth": 12, "heads": 6}
    size, batch, context = 224, 512, 32
    if setting.rehearse:
        image = {"kind": "timm", "model": "test_vit", "args": {"img_size": 32}}
        text = {"kind": "text", "width": 16, "depth": 1, "heads": 2}
        size, batch, context = 32, 8, 8
    return {
        "output_dir": str(folder),
        "global_batch_size": batch,
        "duration": {"steps": steps},
        "embed_dim": text["width"],
        "data": {
            "tars": data.train_tars,
            "tokenizer": data.tokenizer,
            "image_size": size,
            "context_length": context,
            "workers": workers(setting),
            "crop_scale": 1.0,
        },
        "towers": {"image": image, "text": text, "third": {"kind": "cache", "path": data.cache}},
        "heads": {
            "f": {"of": "image"},
            "g": {"of": "text"},
            "f_h": {"of": "f"},
            "g_h": {"of": "g"},
            "h_f": {"of": "third"},
            "h_g": {"of": "third"},
        },
        "terms": {
            "image-text": {"x": "f", "y": "g"},
            "image-third": {"x": "f_h", "y": "h_f"},
            "text-third": {"x": "g_h", "y": "h_g"},
        },
        "deploy": {"image": "f", "text": "g"},
        "engine": {"zero_stage": 2},
        "log": {"every_steps": 1, "tensorboard": False},
    }


def workers(setting: Setting) -> int:
    """Return how many processes decode: all cores but those of the main process and its threads."""
    return 0 if setting.rehearse else max(1, len(os.sched_getaffinity(0)) - 3)


def train_until(folder: Path, config: Path, step: int) -> int:
    """Train until a step is logged, send SIGTERM, and return the exit code."""
    process = subprocess.Popen([*COMMAND, "train", str(config)])
    while process.poll() is None and (steps_of(folder) or [0])[-1] < step:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    return process.wait()


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a run's metrics."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_of(folder: Path) -> list[int]:
    """Return the steps that a run has logged."""
    return [row["step"] for row in metrics_of(folder) if "loss" in row]


def smallest_cosine(folder: Path, setting: Setting) -> float:
    """Return the smallest cosine of an embedding on the GPU with that on the CPU, which is at least SAME."""
    images = torch.randint(0, 256, (32, 3, 224, 224), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    captions = [f"a {noun} beside a {other}" for noun in NOUNS for other in NOUNS[:2]]
    embeddings = []
    for device in ("cpu", setting.device):
        model = load_model(folder, device)
        embeddings.append(torch.cat([model.encode_images(images).cpu(), model.encode_texts(captions).cpu()]))
    smallest = float((embeddings[0] * embeddings[1]).sum(1).min())
    assert smallest >= SAME, f"an embedding on the GPU has a cosine of {smallest} with that on the CPU"
    return smallest

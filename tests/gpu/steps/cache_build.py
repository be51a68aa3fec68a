"""Building a cache: images a second by precision and by number of processes on the one GPU, and rows recomputed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from tests.gpu.setting import Setting
from tests.gpu.steps.photographs import Photographs
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.verify.verify import verify

PROCESSES = (2, 4)


def run(setting: Setting) -> None:
    data = Photographs.of(setting)
    backbone = "test_vit" if setting.rehearse else "vit_base_patch16_224"
    weights = setting.scratch / f"{backbone}.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(backbone, num_classes=0).state_dict(), weights)

    def config(name: str, precision: str) -> BuildConfig:
        return BuildConfig(
            tars=data.train_tars,
            output_dir=setting.scratch / name,
            backbone=backbone,
            weights=str(weights),
            device=str(setting.device),
            precision=precision,  # type: ignore[arg-type]
            batch_size=4 if setting.rehearse else 128,
        )

    for precision in ("bfloat16", "float32"):
        report = build_cache(config(f"cache-{precision}", precision))
        assert report.ok == report.samples == data.tars * data.per_tar
        stages = ", ".join(f"{stage} {share:.0%}" for stage, share in report.shares.items())
        print(f"    {report.seconds:.1f} s with loading; {stages}")
        setting.record(f"cache, 1 process, {precision}", report.samples / report.seconds, "images/s")
    for processes in PROCESSES[:1] if setting.rehearse else PROCESSES:
        seconds = build_side_by_side(config(f"cache-{processes}", "bfloat16"), processes)
        images = data.tars * data.per_tar
        setting.record(f"cache, {processes} processes on one GPU, bfloat16", images / seconds, "images/s")

    # Embedded again, one by one, by the same teacher; and the work of several processes against that of one.
    for name in ("cache-bfloat16", f"cache-{PROCESSES[0]}"):
        report = verify(
            setting.scratch / name, data.train_tars, depth="recompute", weights=str(weights), device=str(setting.device)
        )
        print(report.text())
        assert report.ok, f"{name} is damaged"


def build_side_by_side(config: BuildConfig, processes: int) -> float:
    """Build a cache by several processes on the same device; return the seconds from the first row to the last.

    Without their start, which is the same for a build of millions: from the end of the first tar, scaled up to all.
    """
    command = [sys.executable, "-m", "threetowers", "cache", "build", "--tars", *map(str, config.tars)]
    command += ["--output-dir", str(config.output_dir), "--backbone", str(config.backbone)]
    command += ["--weights", str(config.weights), "--device", str(config.device), "--precision", config.precision]
    command += ["--batch-size", str(config.batch_size)]
    began = time.time()
    workers = []
    for rank in range(processes):
        ranks = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
        environment = os.environ | {name: str(value) for name, value in ranks.items()}
        workers.append(subprocess.Popen(command, env=environment))
    codes = [worker.wait() for worker in workers]
    assert codes == [0] * processes, f"the processes ended with exit codes {codes}"
    records = sorted((Path(str(config.output_dir)) / "done").glob("*.json"), key=lambda file: file.stat().st_mtime)
    first, last = records[0].stat().st_mtime, records[-1].stat().st_mtime
    images = [json.loads(file.read_text())["n_samples"] for file in records]
    print(f"    {processes} processes: {last - began:.1f} s with their start")
    if last - first < 0.5:  # all of it at once
        return last - began
    return (last - first) * sum(images) / sum(images[1:])

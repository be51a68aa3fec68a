"""Building a cache: images a second by precision and by how images are decoded, and rows recomputed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from tests.gpu.setting import Setting
from tests.gpu.steps.photographs import Photographs
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.verify.verify import verify

PROCESSES = 2


def run(setting: Setting) -> None:
    data = Photographs.of(setting)
    model = "test_vit" if setting.rehearse else "vit_base_patch16_224"
    weights = setting.scratch / f"{model}.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(model, num_classes=0).state_dict(), weights)
    config = BuildConfig(
        tars=data.train_tars,
        output_dir="",
        encoder=f"timm:{model}:{weights}",
        device=str(setting.device),
        precision="bfloat16",
        batch_size=4 if setting.rehearse else None,
    )
    builds = {
        "bfloat16, decoded in processes": replace(
            config, output_dir=setting.scratch / "cache-processes", workers=1 if setting.rehearse else None
        ),
        "float32, decoded in processes": replace(
            config, output_dir=setting.scratch / "cache-float32", precision="float32"
        ),
        "bfloat16, decoded in threads": replace(config, output_dir=setting.scratch / "cache-threads", workers=0),
    }
    for name, build in builds.items():
        report = build_cache(build)
        assert report.ok == report.samples == data.tars * data.per_tar
        stages = ", ".join(f"{stage} {share:.0%}" for stage, share in report.shares.items())
        print(f"    {report.seconds:.1f} s with loading; {stages}")
        setting.record(f"cache, {name}", images_per_second(build), "images/s")
    beside = replace(config, output_dir=setting.scratch / "cache-beside")
    build_side_by_side(beside)
    setting.record(f"cache, bfloat16, {PROCESSES} processes on one GPU", images_per_second(beside), "images/s")

    # Embedded again, one by one, by the same teacher; and the work of several processes against that of one.
    for build in (builds["bfloat16, decoded in processes"], beside):
        report = verify(
            Path(str(build.output_dir)),
            data.train_tars,
            depth="recompute",
            weights=str(weights),
            device=str(setting.device),
        )
        print(report.text())
        assert report.ok, f"{build.output_dir} is damaged"


def build_side_by_side(config: BuildConfig) -> None:
    """Build a cache by several processes on the same device, by the command that a launcher would start."""
    command = [sys.executable, "-m", "threetowers", "cache", "build", "--tars", *map(str, config.tars)]
    command += ["--output-dir", str(config.output_dir), "--encoder", str(config.encoder)]
    command += ["--device", str(config.device), "--precision", str(config.precision)]
    if config.batch_size is not None:
        command += ["--batch-size", str(config.batch_size)]
    workers = []
    for rank in range(PROCESSES):
        ranks = {"RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": PROCESSES}
        environment = os.environ | {name: str(value) for name, value in ranks.items()}
        workers.append(subprocess.Popen(command, env=environment))
    codes = [worker.wait() for worker in workers]
    assert codes == [0] * PROCESSES, f"the processes ended with exit codes {codes}"


def images_per_second(config: BuildConfig) -> float:
    """Return the rate of a build without its start: from the end of its first tar to that of its last."""
    files = sorted((Path(str(config.output_dir)) / "done").glob("*.json"), key=lambda file: file.stat().st_mtime)
    first, last = files[0].stat().st_mtime, files[-1].stat().st_mtime
    images = sum(json.loads(file.read_text())["n_samples"] for file in files[1:])
    return float(images / max(last - first, 1e-3))

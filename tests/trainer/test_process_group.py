"""The process group: that of a lone process, a GPU for each rank, as NCCL needs it, and the ranks of the demo."""

import os
import subprocess
from pathlib import Path

import pytest
from torch import distributed

from threetowers.cache.processes.world import World
from threetowers.trainer.config import ConfigError
from threetowers.trainer.engine import join_process_group, refuse_shared_gpu

ROOT = Path(__file__).parents[2]


def test_ranks_that_share_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_HOSTID"):
        monkeypatch.delenv(name, raising=False)
    store = distributed.HashStore()
    refuse_shared_gpu(store, 0, "a")
    refuse_shared_gpu(store, 1, "b")
    refuse_shared_gpu(store, 1, "b")  # the same process joins again
    with pytest.raises(ConfigError, match=r"ranks 0 and 2 have the same GPU \(a\).*as many ranks as there are GPUs"):
        refuse_shared_gpu(store, 2, "a")
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")  # NCCL then allows it
    refuse_shared_gpu(store, 2, "a")


def test_a_lone_process_takes_no_port_and_makes_no_ranks_of_those_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook that has trained in itself may then start others that train."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in launched:
        monkeypatch.delenv(name, raising=False)
    assert join_process_group() == World(rank=0, size=1, local_rank=0, local_size=1)
    assert distributed.is_initialized()
    inherited = {name: os.environ[name] for name in launched if name in os.environ}
    assert inherited == {"LOCAL_RANK": "0"}
    assert World.from_env(inherited) == World(rank=0, size=1, local_rank=0, local_size=1)
    assert join_process_group().size == 1  # it has joined already, as at a second run in one process


@pytest.mark.parametrize(
    ("gpus", "flags", "accelerator"),
    [
        (0, "--num_accelerators 2", "cpu"),
        (1, "", "cuda"),
        (3, "--num_accelerators 2", "cuda"),
        (8, "", "cuda"),
    ],
)
def test_demo_starts_a_rank_for_each_gpu(tmp_path: Path, gpus: int, flags: str, accelerator: str) -> None:
    """Where their number does not divide the batch of 256 it is the next one below that does; two ranks on the CPU."""
    lister = tmp_path / "nvidia-smi"
    lines = "".join(f"echo GPU-{number}\n" for number in range(gpus))
    lister.write_text(f"#!/bin/sh\n{lines or 'echo No devices were found; exit 6'}\n")
    lister.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "MAKEFLAGS")}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    made = subprocess.run(
        [
            "make",
            "--dry-run",
            "--assume-old=.venv/installed",
            "shown",
            "demo",
            "--eval=shown: ; +@echo accelerator $(DS_ACCELERATOR)",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    trainings = [line for line in made.stdout.splitlines() if "deepspeed" in line]
    expected = " ".join(f".venv/bin/deepspeed --quiet {flags} --module threetowers train configs/emoji".split())
    assert len(trainings) == 3
    assert all(" ".join(line.split()).startswith(expected) for line in trainings)
    assert f"accelerator {accelerator}" in made.stdout

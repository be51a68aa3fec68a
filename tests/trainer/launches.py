"""Launches of real training processes, and readers of the files that they leave in a run's folder."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT), str(ROOT / "tests/encoders")]  # of `tests`, and of the encoders that tests use
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]),
}
TRAIN = [sys.executable, "-m", "threetowers", "train"]
RUN_CONFIGS = str(Path(__file__).with_name("run_configs.py"))
RUN_JOBS = str(Path(__file__).with_name("stopping_runs.py"))


def torchrun(ranks: int) -> list[str]:
    """The start of a command line that launches `ranks` processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def free_port() -> str:
    """A port on which nothing listened a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_command(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    # What a summary cannot say is a fault here, where a run goes on
    assert ": not counted (" not in result.stderr, result.stderr[-8000:]
    return result


def run_jobs(ranks: int, jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Run the jobs of stopping_runs.py on `ranks` processes and return how each ended."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    result = run_command([*torchrun(ranks), RUN_JOBS, str(folder / "jobs.json")])
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"job"')]


def write_config(tree: dict[str, Any], folder: Path, name: str, **engine: Any) -> tuple[str, Path]:
    """Write a config; return the file and the run's folder, the first word of `name`: several configs may share it."""
    out = folder / name.split()[0]
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree | {"output_dir": str(out), "engine": engine}))
    return str(file), out


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def metric(out: Path, key: str) -> list[Any]:
    """One metric of a run, of the lines that have it."""
    return [line[key] for line in read_metrics(out) if key in line]


def losses(out: Path) -> list[list[float]]:
    """The loss of each logged step, and those of its terms."""
    return [[line["loss"], *(v for k, v in line.items() if k.endswith("/loss"))] for line in read_metrics(out)]


def same_weights(a: Path, b: Path) -> bool:
    """Whether two finished runs have the same weights, to the bit."""
    first, second = (load_file(out / "model.safetensors") for out in (a, b))
    return first.keys() == second.keys() and all(second[name].equal(tensor) for name, tensor in first.items())

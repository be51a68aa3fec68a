"""What can be tested of tests/gpu without a GPU: everything but the GPU's own parts, which are skipped by name."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.host_waits import HostWaits
from tests.gpu.plan import MACHINE, STEPS
from tests.gpu.predictions import PREDICTIONS
from tests.gpu.steps import compiled_steps, kernel_tiles, loss_errors, profiler, training_steps

ROOT = Path(__file__).parents[2]
WHEELS = Path(__file__).with_name("wheels.txt")


def driver(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=600)


@pytest.mark.timeout(620)
def test_every_step_runs_in_a_rehearsal(tmp_path: Path) -> None:
    done = driver("--rehearse", "--output-dir", str(tmp_path))
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log[-8000:]}"
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    states = {row["step"]: row["state"] for row in rows if "state" in row}
    assert states == {step.module: "ok" for step in [MACHINE, *STEPS]}
    skipped = {row["skipped"] for row in rows if "skipped" in row}
    assert all(row["why"] == "needs a GPU" for row in rows if "skipped" in row)
    assert {"ncu", "compute-sanitizer memcheck", "compute-sanitizer racecheck"} <= skipped
    measuring = {"loss_errors", "two_ranks", "kernel_times", "training_steps", "loss_times", "cache_build"}
    assert measuring <= {row["step"] for row in rows if "figure" in row}
    summary = (tmp_path / "summary.txt").read_text()
    assert summary in done.stdout
    assert all(what in summary for what in skipped)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = driver("--output-dir", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no GPU: torch.cuda.is_available() is False" in done.stdout
    assert "kernel_tiles" not in done.stdout


def test_sigterm_ends_the_step_that_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu", "--rehearse", "--output-dir", str(tmp_path / "out")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "machine" in process.stdout.readline()
        process.terminate()
        process.stdout.read()  # to its end: no step holds the other side any more
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("threetowers-gpu-*"))


def test_the_limits_and_names_of_the_plan() -> None:
    """The checks that say most come first, and what they need fits in the time of all."""
    names = [step.module for step in STEPS]
    assert len(set(names)) == len(names)
    assert [step.module for step in STEPS if step.checks][:3] == ["kernel_tiles", "loss_errors", "two_ranks"]
    assert all(0 <= prediction.low <= prediction.high for prediction in PREDICTIONS.values())
    training = [name for name in PREDICTIONS if "ZeRO" in name]
    variants = [*training_steps.VARIANTS, *compiled_steps.VARIANTS]
    assert {name.split(": ")[0] for name in training} <= {variant.name for variant in variants}


def test_a_wrong_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss_errors.contrastive_loss
    monkeypatch.setattr(loss_errors, "contrastive_loss", lambda *args, **options: 1.01 * right(*args, **options))
    found = loss_errors.errors(40, 16, "softmax", torch.float32, torch.device("cpu"))
    assert min(found.values()) > 5e-3


def test_a_wrong_tile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_tiles.backend_for

    def scaled(x_bD: torch.Tensor) -> Any:
        backend = right(x_bD)
        dots = backend.dots
        monkeypatch.setattr(backend, "dots", lambda *args: dots(*args).mul_(1.01))
        return backend

    monkeypatch.setattr(kernel_tiles, "backend_for", scaled)
    with pytest.raises(AssertionError, match="cached dots"):
        kernel_tiles.compare(kernel_tiles.CASES[1], torch.float32, None)


def test_a_back_end_that_plain_torch_replaced_is_found() -> None:
    with pytest.raises(AssertionError, match="a kernel of TensorCoreTiles did not compile or load"):
        kernel_tiles.compare(kernel_tiles.CASES[0], torch.bfloat16, "TensorCoreTiles")


def test_host_waits_are_counted_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch warns of waiting operations; waits that are asked for are counted at their methods."""
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    counted = torch.cuda.Event.synchronize
    with HostWaits() as waits:
        assert torch.cuda.Event.synchronize is not counted
        torch.cuda.synchronize()
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert torch.cuda.Event.synchronize is counted
    assert modes == ["warn", "default"]
    assert waits.places.total() == 1  # this folder's own synchronize is the measurement's
    (place,) = waits.places
    assert re.fullmatch(r"gpu/test_rehearsal\.py:\d+", place)


def test_counters_of_ncu_are_read() -> None:
    printed = "\n".join(
        [
            "==PROF== Connected to process 7",
            '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
            '"0","7","stats(Tile, int)","sm__throughput.x","%","12.5"',
            '"1","7","stats(Tile, int)","sm__throughput.x","%","1,062.5"',
            '"1","7","stats(Tile, int)","lts__t.x","%","n/a"',
            "==PROF== Disconnected",
        ]
    )
    assert profiler.counters(printed) == [("stats", "sm__throughput.x", 1062.5)]


def test_wheels_cover_what_the_package_depends_on() -> None:
    """Each dependency is carried in the version of constraints.txt, or named as expected on the machine."""
    text = WHEELS.read_text()
    carried = dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))
    expected = set(re.findall(r"[a-z0-9-]+", " ".join(line for line in text.splitlines() if line.startswith("#"))))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=\[ ]", requirement)[0] for requirement in project["dependencies"]}
    needed = needed - {"faiss-gpu"} | {"faiss-cpu"}  # the same library without its GPU part, a fifth of the size
    assert needed - carried.keys() - expected == set()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    pinned["faiss-cpu"] = pinned["faiss-gpu"]
    assert {name: pinned[name] for name in carried if name in pinned} == {
        name: version for name, version in carried.items() if name in pinned
    }

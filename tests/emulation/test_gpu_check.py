"""What of gpu_check.py can be tested without a GPU."""

import importlib.util
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


@pytest.fixture
def gpu_check() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def test_refuses_where_there_is_no_gpu() -> None:
    done = run()
    assert done.returncode == 1
    refusal = "gpu_check measures on a GPU, and torch finds none here (torch.cuda.is_available() is False)\n"
    assert done.stderr == refusal


def test_every_part_runs_in_a_rehearsal() -> None:
    done = run("--rehearse", "--width", "16", "--rounds", "2", "--batches", "40", "60")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("the CPU: a rehearsal, which tests nothing about a GPU")
    assert sum(line.startswith("ok  ") for line in said) == 3 * 5
    assert sum(line.startswith("B 300 D 40 ") for line in said) == 2 * 3
    assert any("compute-sanitizer" in line for line in said)
    for batch in (40, 60):
        (title,) = (k for k, line in enumerate(said) if line.startswith(f"B {batch}, D 16, bf16"))
        names = [line[:28].strip() for line in said[title + 1 : title + 6]]
        assert names[:2] == ["threetowers", "torch linear_cross_entropy"]
        assert [name.split(" ")[0] for name in names[2:]] == ["open_clip", "memeff", "inf-cl"]
        assert said[title + 1].endswith(" 1.00 x")


def test_a_wrong_loss_is_found(gpu_check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_check.contrastive_loss
    monkeypatch.setattr(gpu_check, "contrastive_loss", lambda *args, **options: 1.01 * right(*args, **options))
    with pytest.raises(AssertionError, match="an error is above"):
        gpu_check.check_loss([(40, 16)], "cpu")


def test_a_wrong_tile_is_found(gpu_check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_check.backend_for

    def scaled(x_bD: torch.Tensor) -> Any:
        backend = right(x_bD)
        dots = backend.dots
        monkeypatch.setattr(backend, "dots", lambda *args: dots(*args).mul_(1.01))
        return backend

    monkeypatch.setattr(gpu_check, "backend_for", scaled)
    with pytest.raises(AssertionError, match="cached dots"):
        gpu_check.check_tiles("cpu")


def test_a_finding_of_the_sanitizer_stops_the_script(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The stub of the tool records its arguments, and fails under racecheck, as the tool does at a finding."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/log\n[ "$2" != racecheck ]\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(subprocess.CalledProcessError):
        gpu_check.check_under_sanitizer(rehearse=False)
    lines = (tmp_path / "log").read_text().splitlines()
    rest = f"--error-exitcode 1 {sys.executable} {SCRIPT} --only tiles"
    assert lines == [f"--tool {name} {rest}" for name in ("memcheck", "racecheck")]


def test_out_of_memory_counts_as_infinite_time(gpu_check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError

    event = types.SimpleNamespace(record=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    assert gpu_check.gpu_milliseconds(step) == math.inf

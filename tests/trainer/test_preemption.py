"""Runs that stop on the way, with real processes: kill -9, SIGTERM, what is not finite; and how they go on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
SCRIPT = str(Path(__file__).with_name("stopping_runs.py"))
TRAIN = [sys.executable, "-m", "threetowers", "train"]


def config(tree: dict[str, Any], folder: Path, name: str, **engine: Any) -> tuple[str, Path]:
    """Write a config; returns the file and the run's folder. Several configs may name one folder."""
    out = folder / name.split()[0]
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree | {"output_dir": str(out), "engine": engine}))
    return str(file), out


def launch(ranks: int, jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", SCRIPT]
    result = subprocess.run(
        [*command, str(folder / "jobs.json")], env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"job"')]


def lines(out: Path, key: str) -> list[Any]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


def same_weights(a: Path, b: Path) -> bool:
    first, second = (load_file(out / "model.safetensors") for out in (a, b))
    return first.keys() == second.keys() and all(second[name].equal(tensor) for name, tensor in first.items())


@pytest.mark.distributed
def test_sigterm_to_one_rank_and_going_on_elsewhere(three: dict[str, Any], tmp_path: Path) -> None:
    """Two ranks stop at the same step; the same layout goes on to the bit, others with the same samples."""
    plain = json.loads(json.dumps(three))
    three["towers"]["text"]["dropout"] = 0.2
    three["data"]["workers"] = 1
    three |= {"optim": {"param_groups": [{"match": "towers.image.*", "lr": 0.5}]}}
    alone = config(three, tmp_path, "alone", zero_stage=1, micro_batch_size=4)
    stopped = config(three, tmp_path, "stopped", zero_stage=1, micro_batch_size=4)
    moved = {z: config(plain, tmp_path, f"moved{z}", zero_stage=z) for z in (2, 3)}
    jobs = [{"config": alone[0]}, {"config": stopped[0], "stop": 3}, {"config": stopped[0]}]
    jobs += [{"config": file, "stop": 2} for file, _ in moved.values()]
    whole, first, rest, *others = launch(2, jobs, tmp_path)
    assert (whole["end"], first["end"], rest["end"]) == ("finished", "interrupted", "finished")
    assert "stopped by SIGTERM after step 4 of 6; the same command goes on from there" in first["message"]
    assert rest["start"] == 4
    assert {job["end"] for job in others} == {"interrupted"}
    for key in ("loss", "grad_norm", "terms/text-third/loss", "look/weights"):
        assert lines(alone[1], key) == lines(stopped[1], key), key
    assert same_weights(alone[1], stopped[1])
    # What was two ranks goes on as three with another stage, then as one with yet another.
    next_stage, last_stage = {2: 0, 3: 1}, {2: 3, 3: 0}
    again = [config(plain, tmp_path, f"moved{z} three", zero_stage=next_stage[z], micro_batch_size=3) for z in moved]
    found = launch(3, [{"config": file, "stop": 4} for file, _ in again], tmp_path)
    assert [(job["start"], job["end"]) for job in found] == [(3, "interrupted")] * 2
    reference = config(plain, tmp_path, "reference", zero_stage=0)
    ends = [config(plain, tmp_path, f"moved{z} one", zero_stage=last_stage[z]) for z in moved]
    found = launch(1, [{"config": file} for file, _ in [reference, *ends]], tmp_path)
    assert [(job["start"], job["end"]) for job in found] == [(0, "finished"), *[(5, "finished")] * 2]
    for _, out in ends:
        assert lines(out, "step") == [s for s in range(1, 7) for _ in range(2)]
        for key in ("loss", "look/weights"):
            np.testing.assert_allclose(lines(out, key), lines(reference[1], key), rtol=2e-4)
    assert found[-1]["summary"]["seconds"] == pytest.approx(lines(ends[-1][1], "seconds")[-1])


@pytest.mark.distributed
def test_what_is_not_finite_is_agreed_on(clip: dict[str, Any], tmp_path: Path) -> None:
    """A NaN in one gradient of one rank: skipped by all, at every stage; stopped at the limit, or at once."""
    bad = {"2": "heads.f.weight", "4": "towers.text.norm.bias"}
    skip = {"on_nonfinite": "skip", "nonfinite_limit": 2}
    jobs = []
    for zero in range(4):
        file, _ = config(clip, tmp_path, f"skip{zero}", zero_stage=zero, **skip)
        jobs.append({"config": file, "poison": bad})
    in_a_row = config(clip, tmp_path, "row", zero_stage=1, **skip)
    stop = config(clip, tmp_path, "stop", zero_stage=2, micro_batch_size=2)
    jobs += [{"config": in_a_row[0], "poison": {"2": "heads.g.bias", "3": "heads.g.bias"}}]
    jobs += [{"config": stop[0], "poison": {"5": "towers.image.model.norm.weight"}}]
    *skipped, limit, stopped = launch(2, jobs, tmp_path)
    for zero, job in enumerate(skipped):
        out = tmp_path / f"skip{zero}"
        assert (job["end"], job["summary"]["not_finite"]) == ("finished", 2)
        weights = lines(out, "look/weights")
        assert weights[1] == weights[0]
        assert weights[3] == weights[2] != weights[1]
        assert weights[4] != weights[3]
        np.testing.assert_allclose(weights, lines(tmp_path / "skip0", "look/weights"), rtol=1e-5)
        about = json.loads((out / "checkpoints" / "step-00000006" / "checkpoint.json").read_text())
        assert (about["step"], about["updates"]) == (6, 4)
    assert limit["end"] == stopped["end"] == "not finite"
    assert (
        "step 3: not finite: gradient of heads.g.bias; the weights are as after 1 updates, 2 steps in a row"
        in (limit["message"])
    )
    assert "step 5: not finite: gradient of towers.image.model.norm.weight" in stopped["message"]
    assert "engine.on_nonfinite: skip" in stopped["message"]


@pytest.mark.distributed
def test_kill_9_at_any_moment(three: dict[str, Any], tmp_path: Path) -> None:
    """Killed again and again, also while it saves: the losses and the weights, to the bit, of a run left alone."""
    three["towers"]["text"]["dropout"] = 0.2
    three["data"]["workers"] = 1
    three |= {"duration": {"steps": 60}, "checkpoint": {"every_steps": 3}}
    alone, killed = config(three, tmp_path, "alone"), config(three, tmp_path, "killed")
    subprocess.run([*TRAIN, alone[0]], env=ENVIRONMENT, check=True, capture_output=True, timeout=280)
    for wanted in (4, 21, 38):
        victim = subprocess.Popen(
            [*TRAIN, killed[0]],
            env=ENVIRONMENT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 200
        metrics = killed[1] / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < wanted:
            assert victim.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.003)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        half = killed[1] / "checkpoints" / ".step-00000099.partial"  # as if it had died while it saved
        half.mkdir(parents=True)
        (half / "state-00000-of-00007.safetensors").write_bytes(b"half of")
    assert not (killed[1] / "model.safetensors").exists()
    with (killed[1] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5')  # a line cut short
    resumed = subprocess.run([*TRAIN, killed[0]], env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert "trained 60 steps" in resumed.stdout, resumed.stderr[-4000:]
    assert lines(killed[1], "step") == list(range(1, 61))
    for key in ("loss", "grad_norm", "terms/image-third/loss"):
        assert lines(killed[1], key) == lines(alone[1], key), key
    assert same_weights(alone[1], killed[1])
    assert sorted(p.name for p in (killed[1] / "checkpoints").iterdir()) == ["step-00000057", "step-00000060"]
    again = subprocess.run([*TRAIN, killed[0]], env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert again.stdout == resumed.stdout  # finished: nothing is done again


@pytest.mark.distributed
def test_sigterm_by_the_command_line(clip: dict[str, Any], tmp_path: Path) -> None:
    """All processes of the run get the signal, its data workers too; exit code 75, and the same command goes on."""
    clip["data"]["workers"] = 2
    clip |= {"duration": {"steps": 150}, "checkpoint": {"every_minutes": 0.005}}
    file, out = config(clip, tmp_path, "run")
    process = subprocess.Popen(
        [*TRAIN, file],
        env=ENVIRONMENT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not list((out / "checkpoints").glob("step-*")):  # written because of the time that passed
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 75, errors[-4000:]
    assert "Interrupted: stopped by SIGTERM after step" in errors
    newest = max((out / "checkpoints").glob("step-*"))
    assert f"after step {int(newest.name[5:])} of 150" in errors
    changed = [*TRAIN, file, "engine.zero_stage=3", "data.workers=0", "log.every_steps=50"]
    refused = subprocess.run([*changed, "optim.lr=0.5"], env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert refused.returncode == 2
    assert "optim.lr: 0.001 -> 0.5" in refused.stderr
    assert "data.workers" not in refused.stderr  # that may change
    resumed = subprocess.run(changed, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert "changed since this run began: engine.zero_stage: 1 -> 3" in resumed.stderr

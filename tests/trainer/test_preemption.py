"""Runs that are stopped, with real processes: kill -9, SIGTERM, nonfinite gradients; and how they resume."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.launches import ENVIRONMENT, TRAIN, free_port, metric, run_jobs, same_weights, write_config


@pytest.mark.distributed
def test_sigterm_to_one_rank_and_resuming_on_other_layouts(three: dict[str, Any], tmp_path: Path) -> None:
    """Two ranks stop at the same step; the same layout resumes to the bit, others with the same samples."""
    plain = json.loads(json.dumps(three))
    three["towers"]["text"]["dropout"] = 0.2
    three["data"]["workers"] = 1
    three |= {"optim": {"param_groups": [{"match": "towers.image.*", "lr": 0.5}]}}
    alone = write_config(three, tmp_path, "alone", zero_stage=1, micro_batch_size=4)
    stopped = write_config(three, tmp_path, "stopped", zero_stage=1, micro_batch_size=4)
    moved = {z: write_config(plain, tmp_path, f"moved{z}", zero_stage=z) for z in (2, 3)}
    jobs = [{"config": alone[0]}, {"config": stopped[0], "stop": 3}, {"config": stopped[0]}]
    jobs += [{"config": file, "stop": 2} for file, _ in moved.values()]
    whole, first, rest, *others = run_jobs(2, jobs, tmp_path)
    assert (whole["end"], first["end"], rest["end"]) == ("finished", "interrupted", "finished")
    assert "stopped by SIGTERM after step 4 of 6; run the same command again to resume" in first["message"]
    assert rest["start"] == 4
    assert {job["end"] for job in others} == {"interrupted"}
    for key in ("loss", "grad_norm", "terms/text-third/loss", "weights/sum"):
        assert metric(alone[1], key) == metric(stopped[1], key), key
    assert same_weights(alone[1], stopped[1])
    # Two ranks resume as three with another stage, then as one with yet another.
    next_stage, last_stage = {2: 0, 3: 1}, {2: 3, 3: 0}
    again = [
        write_config(plain, tmp_path, f"moved{z} three", zero_stage=next_stage[z], micro_batch_size=3) for z in moved
    ]
    found = run_jobs(3, [{"config": file, "stop": 4} for file, _ in again], tmp_path)
    assert [(job["start"], job["end"]) for job in found] == [(3, "interrupted")] * 2
    reference = write_config(plain, tmp_path, "reference", zero_stage=0)
    ends = [write_config(plain, tmp_path, f"moved{z} one", zero_stage=last_stage[z]) for z in moved]
    found = run_jobs(1, [{"config": file} for file, _ in [reference, *ends]], tmp_path)
    assert [(job["start"], job["end"]) for job in found] == [(0, "finished"), *[(5, "finished")] * 2]
    for _, out in ends:
        assert metric(out, "step") == [s for s in range(1, 7) for _ in range(2)]
        for key in ("loss", "weights/sum"):
            np.testing.assert_allclose(metric(out, key), metric(reference[1], key), rtol=2e-4)
    assert found[-1]["summary"]["seconds"] == pytest.approx(metric(ends[-1][1], "seconds")[-1])


@pytest.mark.distributed
def test_sigterm_after_the_last_step_and_a_lost_folder(clip: dict[str, Any], tmp_path: Path) -> None:
    """A request that comes too late changes nothing; a run whose folder another process has writes nothing."""
    files = {name: write_config(clip, tmp_path, name, zero_stage=2) for name in ("alone", "last", "finish", "lost")}
    stops = {"alone": {}, "last": {"stop": 6}, "finish": {"stop_in": "_finish"}, "lost": {"take_over": True}}
    *late, lost = run_jobs(2, [{"config": files[name][0]} | stop for name, stop in stops.items()], tmp_path)
    assert [job["end"] for job in late] == ["finished"] * 3
    assert all(same_weights(files["alone"][1], files[name][1]) for name in ("last", "finish"))
    assert "taken over by another process" in lost["message"]
    assert (lost["end"], metric(files["lost"][1], "step")) == ("in use", [])
    assert not list((files["lost"][1] / "checkpoints").glob("*"))


@pytest.mark.distributed
@pytest.mark.parametrize("schedule", ["constant", "rsqrt"])
def test_an_extended_run_is_that_of_the_longer_duration(schedule: str, clip: dict[str, Any], tmp_path: Path) -> None:
    clip |= {"optim": {"schedule": schedule, "warmup": {"steps": 2}}, "checkpoint": {"every_steps": 3}}
    clip["towers"]["text"]["dropout"] = 0.2
    nine = clip | {"duration": {"steps": 9}}
    configs = [
        write_config(nine, tmp_path, "whole"),
        write_config(clip, tmp_path, "grown six"),
        write_config(nine, tmp_path, "grown nine"),
    ]
    first, six, rest = run_jobs(1, [{"config": file} for file, _ in configs], tmp_path)
    assert [job["start"] for job in (first, six, rest)] == [0, 0, 6]
    whole, grown = configs[0][1], configs[2][1]
    for key in ("lr", "loss", "grad_norm"):
        assert metric(whole, key) == metric(grown, key), key
    assert same_weights(whole, grown)
    assert json.loads((grown / "summary.json").read_text())["steps"] == 9


@pytest.mark.distributed
def test_a_run_that_waits_for_its_cache(three: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    """Started twice, the second is refused; on SIGTERM to one rank the launcher ends with 75."""
    unfinished = Path(shutil.copytree(cache, tmp_path / "cache"))
    (unfinished / "done" / "1.json").unlink()
    three["towers"]["third"] |= {"path": str(unfinished)}
    three["data"] |= {"on_incomplete_cache": "wait"}
    file, out = write_config(three, tmp_path, "run")
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        free_port(),
    ]
    command = [*launcher, "--module", "threetowers", "train", file]
    run = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert run.stderr is not None
        seen = []
        for line in run.stderr:
            seen.append(line)
            if "waiting for the cache: 1 of 2 tars are built" in line:
                break
        holder = json.loads((out / ".lease" / "owner.json").read_text())
        second = subprocess.run([*TRAIN, file], env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
        assert second.returncode == 2, second.stderr
        assert f"{out}: process {holder['pid']} on {holder['host']} has been training this run" in second.stderr
        os.kill(holder["pid"], signal.SIGTERM)
        _, errors = run.communicate(timeout=100)
        assert run.returncode == 75, (seen, errors)
        assert errors.count("stopped by SIGTERM before the first step: nothing to save") == 2
        assert "Traceback" not in errors
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    assert not out.exists()


@pytest.mark.distributed
def test_sigterm_in_the_first_moment(clip: dict[str, Any], tmp_path: Path) -> None:
    """As soon as Python handles the signal at all, long before torch is imported."""
    file, out = write_config(clip, tmp_path, "run")
    process = subprocess.Popen([*TRAIN, file], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    caught = f"/proc/{process.pid}/status"
    while not int(re.findall(r"SigCgt:\s*(\w+)", Path(caught).read_text())[0], 16) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 75, errors
    assert "before the first step: nothing to save; run the same command again" in errors
    assert not out.exists()


@pytest.mark.distributed
def test_nonfinite_gradients_are_skipped_on_all_ranks(clip: dict[str, Any], tmp_path: Path) -> None:
    """A NaN in one gradient of one rank: skipped by all, at every stage, also with the optimizer in the host's memory;
    stopped at the limit, or at once. The other steps are clipped, alike everywhere.
    """
    clip |= {"optim": {"grad_clip_norm": 0.5}}
    bad = {"2": "heads.f.weight", "4": "towers.text.norm.bias"}
    skip = {"on_nonfinite": "skip", "nonfinite_limit": 2}
    jobs = []
    for zero in range(4):
        file, _ = write_config(clip, tmp_path, f"skip{zero}", zero_stage=zero, **skip)
        jobs.append({"config": file, "poison": bad})
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
    for zero in (2, 3):
        file, _ = write_config(clip, tmp_path, f"skip{zero + 2}", zero_stage=zero, deepspeed_extra=offload, **skip)
        jobs.append({"config": file, "poison": bad})
    in_a_row = write_config(clip, tmp_path, "row", zero_stage=1, **skip)
    stop = write_config(clip, tmp_path, "stop", zero_stage=2, micro_batch_size=2)
    jobs += [{"config": in_a_row[0], "poison": {"2": "heads.g.bias", "3": "heads.g.bias"}}]
    jobs += [{"config": stop[0], "poison": {"5": "towers.image.model.norm.weight"}}]
    *skipped, limit, stopped = run_jobs(2, jobs, tmp_path)
    for zero, job in enumerate(skipped):
        out = tmp_path / f"skip{zero}"
        assert (job["end"], job["summary"]["nonfinite_steps"]) == ("finished", 2)
        weights = metric(out, "weights/sum")
        assert weights[1] == weights[0]
        assert weights[3] == weights[2] != weights[1]
        assert weights[4] != weights[3]
        np.testing.assert_allclose(weights, metric(tmp_path / "skip0", "weights/sum"), rtol=1e-5)
        norms = metric(out, "grad_norm")
        assert norms[1] is norms[3] is None
        assert all(norm > 0.5 for norm in norms if norm is not None)
        np.testing.assert_allclose(norms[::2], metric(tmp_path / "skip0", "grad_norm")[::2], rtol=1e-4)
        about = json.loads((out / "checkpoints" / "step-00000006" / "checkpoint.json").read_text())
        assert (about["step"], about["updates"]) == (6, 4)
    assert limit["end"] == stopped["end"] == "nonfinite"
    assert "step 3: nonfinite gradient of heads.g.bias (2 such steps in a row); the weights are " in limit["message"]
    assert "those after 1 updates" in limit["message"]
    assert "step 5: nonfinite gradient of towers.image.model.norm.weight" in stopped["message"]
    assert "engine.on_nonfinite: skip" in stopped["message"]


@pytest.mark.distributed
def test_kill_9_at_any_moment(three: dict[str, Any], tmp_path: Path) -> None:
    """Killed again and again, also while it saves: the losses and the weights, to the bit, of a run left alone."""
    three["towers"]["text"]["dropout"] = 0.2
    three["data"]["workers"] = 1
    three |= {"duration": {"steps": 60}, "checkpoint": {"every_steps": 3}}
    alone, killed = write_config(three, tmp_path, "alone"), write_config(three, tmp_path, "killed")
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
    assert metric(killed[1], "step") == list(range(1, 61))
    for key in ("loss", "grad_norm", "terms/image-third/loss"):
        assert metric(killed[1], key) == metric(alone[1], key), key
    assert same_weights(alone[1], killed[1])
    assert sorted(p.name for p in (killed[1] / "checkpoints").iterdir()) == ["step-00000057", "step-00000060"]
    again = subprocess.run([*TRAIN, killed[0]], env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert again.stdout == resumed.stdout  # finished: nothing is repeated


@pytest.mark.distributed
def test_sigterm_by_the_command_line(clip: dict[str, Any], tmp_path: Path) -> None:
    """All processes of the run get the signal, its data workers too; exit code 75, and the same command resumes."""
    clip["data"]["workers"] = 2
    clip |= {"duration": {"steps": 150}, "checkpoint": {"every_minutes": 0.005}}
    file, out = write_config(clip, tmp_path, "run")
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

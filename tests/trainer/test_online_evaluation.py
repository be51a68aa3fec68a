"""Looking at a run while it trains: evaluation on all ranks, a trace, and an optimizer that must come back whole."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.test_preemption import ENVIRONMENT, config, launch, lines, same_weights
from threetowers.eval.online import RetrievalEvaluator
from threetowers.trainer.export.trained_model import TrainedModel


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["three", "lit"])
def test_evaluation_and_trace(kind: str, tars: list[Path], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What two ranks at ZeRO 3 say of the model on the way is what one process says of the weights it left."""
    tree: dict[str, Any] = request.getfixturevalue(kind)
    tree["evaluate"] = {"tars": [str(tars[0])], "every": {"percent": 50}, "group_field": "concept", "max_samples": 21}
    tree["log"] = {"every_steps": 2, "profile": [2, 3]}
    file, out = config(tree, tmp_path, kind, zero_stage=3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "threetowers"]
    result = subprocess.run([*command, "train", file], env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-8000:]
    assert "step 6/6 | retrieval: text_to_image/recall@1 " in result.stderr
    assert "-bound: " in result.stdout
    assert lines(out, "step") == [2, 3, 4, 6, 6]
    names = {event.get("name") for event in json.loads((out / "profile.json").read_text())["traceEvents"]}
    assert any(name.startswith("threetowers::contrastive_forward") for name in names if name)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["evaluation_seconds"] > 0 < summary["checkpoint_seconds"]
    assert summary["seconds"] >= summary["warmup_seconds"] > 0
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        trained = TrainedModel.load(out)
        assert trained.run.evaluate is not None
        look = RetrievalEvaluator(trained.run, trained.run.evaluate)
        assert len(look.gallery.images) == 25
        for name, value in look(trained.model, 6).items():
            assert lines(out, f"retrieval/{name}")[-1] == pytest.approx(value), name
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_adafactor_goes_on_to_the_bit(clip: dict[str, Any], tmp_path: Path) -> None:
    clip |= {"optim": {"name": "adafactor", "lr": 0.01, "betas": [0.9, 0.99], "schedule": "rsqrt"}}
    clip["towers"]["text"]["width"] = 32  # wide enough that its moments are factored
    alone, stopped = (config(clip, tmp_path, name, zero_stage=0) for name in ("alone", "stopped"))
    jobs = [{"config": alone[0]}, {"config": stopped[0], "stop": 3}, {"config": stopped[0]}]
    whole, first, rest = launch(2, jobs, tmp_path)
    assert (whole["end"], first["end"], rest["end"], rest["start"]) == ("finished", "interrupted", "finished", 4)
    assert lines(stopped[1], "loss") == lines(alone[1], "loss")
    assert same_weights(alone[1], stopped[1])

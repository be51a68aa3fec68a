"""Experiment trackers: what they are told, by whom, and that a resumed run goes on where it was."""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.recorded_trackers import recorded
from threetowers.cache.processes.preemption import Interrupted
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.monitoring.metrics import MetricsLog
from threetowers.trainer.run.run_folder import RunFolder
from threetowers.trainer.train import train


def tracked(clip: dict[str, Any], **log: Any) -> dict[str, Any]:
    return clip | {"duration": {"steps": 4}, "log": {"every_steps": 1, "tensorboard": False} | log}


class StopAfterTwo:
    """An evaluator that sends SIGTERM after the second step, which all ranks hear of in the third."""

    name = "stop"

    def every(self, samples: int, batch: int, steps: int) -> int:
        return 1

    def __call__(self, model: TowerModel, step: int) -> Mapping[str, float]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"value": float(step)}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_continues_its_curves(clip: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = recorded(monkeypatch, name)
    config = parse(tracked(clip, **{name: "towers"}))
    with pytest.raises(Interrupted):
        train(config, [StopAfterTwo()])
    train(config)
    first, second = tracker.runs
    assert first.ended
    assert second.ended
    assert [line["step"] for line in first.lines] == [1, 1, 2, 2, 3, 3]  # metrics and evaluation
    assert [line["stop/value"] for line in first.lines[1::2]] == [1.0, 2.0, 3.0]
    assert [line["step"] for line in second.lines] == [4]
    assert second.lines[0]["loss"] > 0
    assert first.settings == second.settings
    settings = first.settings
    assert settings["project"] == "towers"
    assert settings["resume"] == "allow"
    assert settings["config"]["embed_dim"] == 16
    assert settings["name"].startswith(Path(clip["output_dir"]).name)
    if name == "wandb":
        assert first.axes == {"step": None, "*": "step"}
        assert len(settings["id"]) == 8


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_extra_is_one_line(clip: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ConfigError) as error:
        train(parse(tracked(clip, **{name: "towers"})))
    assert str(error.value).startswith(f"log.{name}: the package {name} cannot be imported (")
    assert str(error.value).endswith(f"install it by `pip install 'threetowers[{name}]'`, or set log.{name}: null")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_refuses_is_one_line(
    clip: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = recorded(monkeypatch, name)

    def refuse(**settings: Any) -> None:
        raise RuntimeError("no API key\nlog in")

    monkeypatch.setattr(tracker, "init", refuse, raising=False)
    with pytest.raises(ConfigError, match=rf"^log.{name}: {name} cannot start: no API key; .*log.{name}: null$"):
        MetricsLog(RunFolder(tmp_path), parse(tracked(clip, **{name: "towers"})), 0)


def test_values_that_are_missing_are_not_told(
    clip: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = recorded(monkeypatch, "wandb")
    log = MetricsLog(RunFolder(tmp_path), parse(tracked(clip, wandb="towers")), 0)
    log.write({"step": 1, "loss": 2.0, "grad_norm": None})
    log.close()
    log.close()  # does nothing more
    assert tracker.runs[0].lines == [{"step": 1, "loss": 2.0}]

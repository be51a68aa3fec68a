"""Online evaluation on all ranks, the trace of some steps, and Adafactor's resuming."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.cached_runs import both_cached, cached_text, pair_caches
from tests.trainer.finished_runs import finished_run
from tests.trainer.launches import metric, run_command, run_jobs, same_weights, torchrun, write_config
from threetowers.cache.format.manifest import ManifestError
from threetowers.eval.datasets.dataset_config import DatasetConfig
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.online import LOGGED, RetrievalEvaluator
from threetowers.eval.record import read_record
from threetowers.eval.suite import evaluate
from threetowers.trainer.config import ConfigError, load_config, parse
from threetowers.trainer.export.trained_model import load_model

CACHED = {"cached_text": cached_text, "both_cached": both_cached}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["three", "lit", "cached_text", "both_cached"])
def test_evaluation_and_trace(kind: str, tars: list[Path], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Two ranks at ZeRO 3 measure during training what one process measures with the final weights.

    So does `eval`, of runs on cached text too, by caches of the held-out tar.
    """
    tree: dict[str, Any]
    caches: dict[str, str] = {}
    if kind in CACHED:
        tree = CACHED[kind](request.getfixturevalue("clip"), pair_caches(tars[1:], tmp_path), tmp_path)
        tree["data"]["tars"] = [str(tars[1])]
        held = pair_caches(tars[:1], tmp_path / "held")
        caches = {name: str(held[tower["of"]]) for name, tower in tree["towers"].items() if "of" in tower}
    else:
        tree = request.getfixturevalue(kind)
    most = 25 if kind in CACHED else 21  # all images, as `eval` takes them, or some
    tree["evaluation"] = {
        "tars": [str(tars[0])],
        "every": {"percent": 50},
        "group_field": "concept",
        "max_samples": most,
        "caches": caches,
    }
    tree["log"] = {"every_steps": 2, "profile": [2, 3]}
    file, out = write_config(tree, tmp_path, kind, zero_stage=3)
    result = run_command([*torchrun(2), "-m", "threetowers", "train", file])
    assert "step 6/6 | retrieval: text_to_image/recall@1 " in result.stderr
    assert "-bound: " in result.stdout
    assert metric(out, "step") == [2, 3, 4, 6, 6]
    names = {event.get("name") for event in json.loads((out / "profile.json").read_text())["traceEvents"]}
    assert any(name.startswith("threetowers::contrastive_forward") for name in names if name)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["evaluation_seconds"] > 0 < summary["checkpoint_seconds"]
    assert summary["seconds"] >= summary["warmup_seconds"] > 0
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        trained = load_model(out)
        assert trained.config.evaluation is not None
        evaluator = RetrievalEvaluator(trained.config, trained.config.evaluation)
        assert len(evaluator.gallery.images) == 25
        for name, value in evaluator(trained.model, 6).items():
            assert metric(out, f"retrieval/{name}")[-1] == pytest.approx(value), name
    finally:
        torch.distributed.destroy_process_group()
    if kind in CACHED:
        flags = ["--cache", *(f"{tower}={path}" for tower, path in caches.items())]
        flags += ["--duplicate-captions", "each", "--output-dir", str(tmp_path / "report")]
        command = ["eval", "retrieval", str(out), "--tars", str(tars[0]), "--group-field", "concept"]
        run_command([sys.executable, "-m", "threetowers", *command, *flags])
        (record,) = map(read_record, (tmp_path / "report" / "records").glob("*.json"))
        assert record.counts["images"] == metric(out, "retrieval/images")[-1] == 25
        for name in LOGGED:
            assert record.metrics[name] == pytest.approx(metric(out, f"retrieval/{name}")[-1]), name
            assert 0 < record.metrics[name] <= 1


@pytest.mark.distributed
def test_cached_towers_are_evaluated_by_caches_of_the_held_out_tars(
    clip: dict[str, Any], tars: list[Path], tmp_path: Path
) -> None:
    """One rank and two find what the evaluation of the finished run finds, with text cached or both sides."""
    trained_on, held = (pair_caches([tar], tmp_path / tar.stem) for tar in tars)
    folders = []
    for kind in (cached_text, both_cached):
        tree = kind(clip, trained_on, tmp_path)
        caches = {tower: str(held[settings["of"]]) for tower, settings in tree["towers"].items() if "of" in settings}
        folders.append(finished_run(tree | {"evaluation": {"tars": [str(tars[1])], "caches": caches}}))
    found = []
    for ranks in (1, 2):
        result = run_command([*torchrun(ranks), str(Path(__file__).with_name("online_ranks.py")), *map(str, folders)])
        found.append([json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")])
    for folder, *online in zip(folders, *found, strict=True):
        evaluation = load_config(folder / "config.yaml").evaluation
        assert evaluation is not None
        caches = {tower: Path(path) for tower, path in evaluation.caches.items()}
        options = LoadOptions(caches=caches, workers=0, precision="float32")
        data = DatasetConfig(name="all", tars=[str(tars[1])])
        (record,) = evaluate([folder], [data], tmp_path / "out", tasks=["retrieval"], options=options).records
        for metrics in online:
            assert metrics["images"] == 20
            for name in ("text_to_image/recall@5", "image_to_text/recall@1"):
                assert metrics[name] == pytest.approx(record.metrics[name]), name


def test_held_out_tars_without_rows_are_named_before_training(
    clip: dict[str, Any], tars: list[Path], tmp_path: Path
) -> None:
    caches = pair_caches([tars[0]], tmp_path)
    tree = cached_text(clip, caches, tmp_path)
    config = parse(tree | {"evaluation": {"tars": [str(tars[1])]}})
    assert config.evaluation is not None
    message = r"b\.tar: not among the 1 tars .* evaluation captions: .* give it as evaluation\.caches\.words"
    with pytest.raises(ManifestError, match=message):
        RetrievalEvaluator(config, config.evaluation)
    evaluation = {"tars": [str(tars[1])], "caches": {"image": "nowhere"}}
    with pytest.raises(ConfigError, match=r"evaluation\.caches: found 'image', expected .* deployed heads: words"):
        parse(tree | {"evaluation": evaluation})


@pytest.mark.distributed
def test_adafactor_resumes_to_the_bit(clip: dict[str, Any], tmp_path: Path) -> None:
    clip |= {"optim": {"name": "adafactor", "lr": 0.01, "betas": [0.9, 0.99], "schedule": "rsqrt"}}
    clip["towers"]["text"]["width"] = 32  # wide enough that its moments are factored
    alone, stopped = (write_config(clip, tmp_path, name, zero_stage=0) for name in ("alone", "stopped"))
    jobs = [{"config": alone[0]}, {"config": stopped[0], "stop": 3}, {"config": stopped[0]}]
    whole, first, rest = run_jobs(2, jobs, tmp_path)
    assert (whole["end"], first["end"], rest["end"], rest["start"]) == ("finished", "interrupted", "finished", 4)
    assert metric(stopped[1], "loss") == metric(alone[1], "loss")
    assert same_weights(alone[1], stopped[1])

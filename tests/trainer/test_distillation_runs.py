"""Runs that distil cached teachers: steps against dense losses, layouts, interruptions, dry runs, exports."""

import shutil
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.trainer.cached_runs import pair_caches
from tests.trainer.finished_runs import finished_run
from tests.trainer.launches import (
    RUN_CONFIGS,
    losses,
    metric,
    run_command,
    run_jobs,
    same_weights,
    torchrun,
    write_config,
)
from threetowers.cache.encoders.names import EncoderName, EncoderOptions
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.kernels import Teacher, reference_distillation_loss
from threetowers.trainer.config import parse
from threetowers.trainer.engine import join_process_group
from threetowers.trainer.estimate.cost import TeacherCost, meta_model
from threetowers.trainer.estimate.dry_run import dry_run
from threetowers.trainer.estimate.loss_cost import term_costs
from threetowers.trainer.export.export import export
from threetowers.trainer.export.run_encoder import load_run_encoder
from threetowers.trainer.export.trained_model import load_model
from threetowers.trainer.loss.teachers import kept_teachers
from threetowers.trainer.train import Trainer


@pytest.fixture(scope="module")
def caches(tars: list[Path], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Images and captions by one small encoder of both, and images by another one."""
    return pair_caches(tars, tmp_path_factory.mktemp("pair")) | {"other": cache}


@pytest.fixture
def tree(clip: dict[str, Any], caches: Mapping[str, Path]) -> dict[str, Any]:
    """A student of two teachers, one of them on a single tower, and of another encoder's features."""
    width = EmbeddingCache.open(caches["other"]).dim
    raw = {"kind": "cache", "standardize": "none"}
    towers = {
        "u": raw | {"path": str(caches["image"])},
        "v": raw | {"path": str(caches["text"]), "of": "text"},
        "other": {"kind": "cache", "path": str(caches["other"]), "standardize": "phi-s"},
    }
    heads = {f"t_{name}": {"of": name, "kind": "none"} for name in towers} | {"f_o": {"of": "f", "embed_dim": width}}
    taught = {"x": "f", "y": "g", "kind": "distill", "hard_weight": 0.2, "teachers": {}}
    taught["teachers"] = {
        "pair": {"x": "t_u", "y": "t_v", "temperature": 0.05},
        "images": {"x": "t_other", "y": "t_other", "temperature": "scale", "weight": "1/2"},
    }
    terms = {
        "taught": taught,
        "angle": {"x": "f_o", "y": "t_other", "kind": "cosine", "weight": 0.9},
        "errors": {"x": "f_o", "y": "t_other", "kind": "smooth_l1", "beta": 0.5, "weight": 0.1},
    }
    return clip | {"towers": clip["towers"] | towers, "heads": clip["heads"] | heads, "terms": terms}


def test_a_step_is_that_of_dense_losses(tree: dict[str, Any]) -> None:
    config = parse(tree | {"duration": {"steps": 1}, "engine": {"precision": "float32"}})
    trainer = Trainer(config, join_process_group())
    with closing(trainer._batches()) as batches:
        batch = next(batches)
    with torch.no_grad():
        outputs = trainer.engine.module(batch.inputs)
    student = {name: x_bD.double() for name, x_bD in outputs.embeddings.items()}
    u, v = (F.normalize(batch.inputs[name].double(), dim=1) for name in ("u", "v"))

    rows = EmbeddingCache.open(tree["towers"]["other"]["path"])
    mean, covariance = rows.covariance()
    centred = batch.inputs["other"].double() - torch.from_numpy(mean)
    rotation = trainer.engine.module.towers["other"].rotation.double()
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(rows.dim), atol=1e-5)
    variance = (rotation @ torch.from_numpy(covariance) @ rotation.T).diagonal()
    np.testing.assert_allclose(variance, np.full(rows.dim, np.trace(covariance) / rows.dim), rtol=1e-4)
    other = F.normalize(centred @ rotation.T, dim=1)

    log_scale = outputs.log_scales["scale"].double()
    cold = -torch.tensor([0.05], dtype=torch.float64).log()
    teachers = [Teacher(u, v, cold, weight=1.0), Teacher(other, other, log_scale, weight=0.5)]
    expected = {
        "taught": reference_distillation_loss(
            student["f"], student["g"], log_scale, teachers, hard_weight=0.2, group_ids=batch.groups_b
        ),
        "angle": (1 - (student["f_o"] * other).sum(1)).mean(),
        "errors": F.smooth_l1_loss(student["f_o"], other, beta=0.5, reduction="none").sum(1).mean(),
    }
    trainer.train()
    folder = Path(tree["output_dir"])
    for name, loss in expected.items():
        assert metric(folder, f"terms/{name}/loss") == [pytest.approx(float(loss), rel=1e-5)]
    total = sum(config.terms[name].weight * float(loss) for name, loss in expected.items())
    assert metric(folder, "loss") == [pytest.approx(total, rel=1e-5)]
    assert metric(folder, "terms/taught/scale") == [pytest.approx(14.3, rel=1e-5)]


@pytest.mark.distributed
def test_layouts_agree(tree: dict[str, Any], tmp_path: Path) -> None:
    """Two ranks at ZeRO 1 and 3, in micro-batches, by a ring, give the losses of one process."""
    tree |= {"duration": {"steps": 3}}
    tree["terms"]["taught"]["drop_teachers"] = 0.5
    ring = tree | {"loss": {"ring": True, "logit_cache_mib": 0}}
    one, expected = write_config(tree, tmp_path, "one")
    others = [
        write_config(tree, tmp_path, "two", zero_stage=1, micro_batch_size=4),
        write_config(ring, tmp_path, "ring", zero_stage=3),
    ]
    run_command([sys.executable, RUN_CONFIGS, one])
    run_command([*torchrun(2), RUN_CONFIGS, *(file for file, _ in others)])
    found = np.array(losses(expected))
    assert found.shape == (3, 4)
    for _, out in others:
        np.testing.assert_allclose(np.array(losses(out)), found, rtol=2e-4)


@pytest.mark.distributed
def test_an_interrupted_run_goes_on_to_the_bit(tree: dict[str, Any], tmp_path: Path) -> None:
    """The teachers that are left out after a resumption are those of the undisturbed run."""
    tree["terms"]["taught"]["drop_teachers"] = 0.5
    whole, stopped = (write_config(tree, tmp_path, name, micro_batch_size=3) for name in ("whole", "stopped"))
    run_jobs(2, [{"config": whole[0]}, {"config": stopped[0], "stop": 2}], tmp_path)
    (end,) = run_jobs(2, [{"config": stopped[0]}], tmp_path)
    assert (end["end"], end["start"]) == ("finished", 3)
    assert same_weights(whole[1], stopped[1])
    assert metric(whole[1], "terms/taught/loss") == metric(stopped[1], "terms/taught/loss")


def test_a_dry_run_counts_teachers(tree: dict[str, Any], caches: Mapping[str, Path]) -> None:
    lines = dry_run(parse(tree), 2)
    (line,) = [line for line in lines if line.startswith("term taught: ")]
    assert "1 x distill of (f, g); taught by 53% pair (t_u, t_v) at 0.05, 27% images (t_other, t_other)" in line
    assert "at scale, 20% own pairs; scale scale, softmax; " in line
    tree["terms"]["taught"]["drop_teachers"] = 0.5
    kept = [kept_teachers(0, step, "taught", parse(tree).terms["taught"]) for step in range(2000)]
    assert np.mean([1 - len(names) / 2 for names in kept]) == pytest.approx(0.25, abs=0.02)
    (taught,) = [line for line in dry_run(parse(tree), 2) if line.startswith("term taught: ")]
    assert "20% own pairs, each left out of 25% of the steps; " in taught
    tree["terms"]["taught"]["drop_teachers"] = 0.0
    (line,) = [line for line in lines if line.startswith("term angle: ")]
    assert line == "term angle: 0.9 x cosine of (f_o, t_other)"
    widths = {"pair": 24, "other": EmbeddingCache.open(caches["other"]).dim}
    teachers = sum(widths.values()) / 16  # in units of the student's width

    def passes(**loss: Any) -> float:
        config = tree | {"loss": loss}
        if loss.get("kind") == "sigmoid":
            config["terms"]["taught"]["teachers"]["pair"]["bias"] = -5
        dims = {"u": 24, "v": 24, "other": widths["other"]}
        model = meta_model(
            parse(config), 48, {name: TeacherCost("t", dim, 2 * dim, None) for name, dim in dims.items()}
        )
        costs = term_costs(model, 2)
        assert costs["taught"].flops == round(costs["taught"].passes * 2 * 12 * 16)
        layers = 1 if config["terms"]["taught"]["hard_weight"] == 1 else 3
        kept = layers * 6 * 12 * 4 if loss.get("logit_cache_mib") else 0
        assert costs["taught"].tile_bytes == kept
        assert costs["angle"].flops == costs["errors"].passes == 0
        return costs["taught"].passes

    assert passes(logit_cache_mib=0) == pytest.approx(4 + 2 * teachers)
    assert passes(logit_cache_mib=1) == pytest.approx(3 + teachers)
    tree["terms"]["taught"]["drop_teachers"] = 0.5  # each of the two is left out of a quarter of the steps
    assert passes(logit_cache_mib=0) == pytest.approx(4 + 2 * 0.75 * teachers)
    tree["terms"]["taught"] |= {"drop_teachers": 0.0, "hard_weight": 1.0}  # the teachers have no share of the target
    assert passes(logit_cache_mib=0) == 4
    assert passes(logit_cache_mib=1) == 3
    tree["terms"]["taught"]["hard_weight"] = 0.2
    assert passes(kind="sigmoid", logit_cache_mib=0) == pytest.approx(3 + teachers)


def test_an_export_needs_no_teacher(tree: dict[str, Any], caches: Mapping[str, Path], tmp_path: Path) -> None:
    """With the caches gone a run is loaded, exported, and evaluated, with its own weights to the bit."""
    mine = {name: shutil.copytree(path, tmp_path / name) for name, path in caches.items()}
    for tower, name in (("u", "image"), ("v", "text"), ("other", "other")):
        tree["towers"][tower]["path"] = str(mine[name])
    folder = finished_run(tree)
    for path in mine.values():
        shutil.rmtree(path)

    assert export(folder, tmp_path / "export").difference == 0
    exported = load_model(tmp_path / "export")
    assert (set(exported.config.towers), set(exported.config.heads)) == ({"image", "text"}, {"f", "g"})
    assert not any(term.teachers for term in exported.config.terms.values())
    assert exported.manifests == {}
    kept, trained = (load_file(path / "model.safetensors") for path in (tmp_path / "export", folder))
    assert kept
    assert all(trained[name].equal(tensor) for name, tensor in kept.items())
    captions = ["a red disc", "cross, blue"]
    assert exported.encode_texts(captions).equal(load_model(folder).encode_texts(captions))
    encoders = [
        load_run_encoder(EncoderName.parse(f"run:{path}"), EncoderOptions()) for path in (folder, tmp_path / "export")
    ]
    scale = float(load_model(folder).model.log_scales["scale"].detach().exp())
    assert [encoder.logit_scale for encoder in encoders] == [pytest.approx(scale)] * 2
    card = (tmp_path / "export" / "README.md").read_text()
    assert "taught: 1 x distill of (f, g), taught by pair, images" in card

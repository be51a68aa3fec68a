"""A complete reproduction in miniature, twice: from nothing to the report, then again without any new work."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from reproduce.__main__ import carry_out
from reproduce.claims import load_claims
from reproduce.experiment import is_finished
from reproduce.folder import Folder, read_json
from reproduce.plan import BadPlan, Experiment, Plan, parse_plan
from reproduce.report.page import write_report
from reproduce.run_teachers import learned_temperatures
from tests.conftest import write_tar
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.webdataset.tar_index import index_tar, read_member

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/reproduce"


def tiny(emoji: Path) -> dict[str, Any]:
    """The shipped plan with one teacher and a few steps; two seeds, for two workers."""
    tree: dict[str, Any] = yaml.safe_load((CONFIGS / "experiments.yaml").read_text())
    return tree | {
        "emoji": str(emoji),
        "vocabulary": 300,
        "epochs": 1,
        "seeds": [0, 1],
        "sweep": {"rates": [2e-3], "epochs": 1, "seed": 0},
        "teachers": {"random": {"arm": "equal", "pretrain": "nothing"}},
        "pretraining": tree["pretraining"] | {"model": "test_resnet", "steps": 1, "image_size": 32},
        "methods": {"3t": tree["methods"]["3t"]},
        "grid": [{"methods": ["3t"], "teachers": ["random"]}],
        "views": {},
        "mixing": tree["mixing"] | {"shares": [0.5]},
        "ablations": {"seeds": [0], "teacher": "random", "variants": {}},
        "quick": tree["quick"] | {"teachers": ["random"], "methods": ["3t"], "variants": []},
    }


def tiny_distillation(emoji: Path) -> dict[str, Any]:
    """The shipped plan of distillation with a random classifier, one seed and a few steps."""
    tree: dict[str, Any] = yaml.safe_load((CONFIGS / "distillation.yaml").read_text())
    random = {"lite0": {"arm": "equal", "pretrain": "nothing"}}
    pretraining = {"model": "test_resnet", "image_size": 32, "steps": 1, "batch": 8, "lr": 1e-3}
    variants = {"wide": {"method": "3t", "set": ["towers.text.width=32", "duration={epochs: 2}"]}}
    return tree | {
        "emoji": str(emoji),
        "vocabulary": 300,
        "epochs": 1,
        "seeds": [0],
        "sweep": {"rates": [2e-3], "epochs": 1, "seed": 0},
        "teachers": random,
        "pretraining": pretraining,
        "ablations": tree["ablations"] | {"variants": variants},
    }


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """The shipped configs with small batches, images and towers, and fewer shots."""
    copy = shutil.copytree(CONFIGS, tmp_path / "configs")
    for name in ("clip", "lit", "3t", "distill", "3t-distill"):
        config = copy / f"{name}.yaml"
        tree = yaml.safe_load(config.read_text())
        tree |= {"global_batch_size": 96, "embed_dim": 16}
        tree["data"] = {"image_size": 32}
        if "image" in tree["towers"]:
            tree["towers"]["image"]["model"] = "test_resnet"
        tree["towers"]["text"] |= {"width": 16, "depth": 1}
        config.write_text(yaml.safe_dump(tree, sort_keys=False))
    groups = copy / "sets/groups.yaml"
    groups.write_text(groups.read_text().replace("fewshot: {}", "fewshot: {shots: [10]}"))
    return copy


@pytest.fixture
def emoji(tmp_path: Path) -> Path:
    """The validation tar whole, as if it were for training, and two pieces of it as if they were held out."""
    folder = tmp_path / "emoji"
    folder.mkdir()
    source = ROOT / "data/emoji/val-000000.tar"
    shutil.copy(source, folder / "train-000000.tar")
    tar = index_tar(source)
    samples = [
        (sample.key, {extension: read_member(tar, ordinal, extension) for extension in sample.members})
        for ordinal, sample in enumerate(tar.samples)
    ]
    write_tar(folder / "val-000000.tar", samples[:100])
    write_tar(folder / "test-000000.tar", samples[100:300])
    return folder


def test_reproduction_from_nothing_to_the_report(tmp_path: Path, emoji: Path, configs: Path) -> None:
    plan: Plan = parse_plan(tiny(emoji))
    folder = Folder(tmp_path / "out")
    done, missing = carry_out(plan, folder, configs, workers=2)
    assert (done, missing) == (plan, {})

    tar = index_tar(folder["data/train.tar"])
    source = index_tar(emoji / "train-000000.tar")
    kept = [sample.key for sample in source.samples if sample.key.rpartition("-")[2] in plan.styles.contrastive]
    assert [sample.key for sample in tar.samples] == kept
    ordinal = [sample.key for sample in source.samples].index(kept[5])
    assert read_member(tar, 5, "webp") == read_member(source, ordinal, "webp")

    experiment = Experiment("3t", "random", None, 0)
    facts = read_json(folder.finished(experiment.name))
    assert set(facts["records"]) == {"0", "0.5"}
    assert set(facts["records"]["0"]) == {"validation", "retrieval", "subgroups", "groups"}
    assert facts["changes"][-1] == "optim.lr=0.002"
    assert not (folder["runs"] / experiment.name / "checkpoints").exists()

    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*.safetensors")}
    before |= {path: path.stat().st_mtime_ns for path in folder["finished"].iterdir()}
    carry_out(plan, folder, configs, workers=2)
    assert {path: path.stat().st_mtime_ns for path in before} == before

    write_report(plan, load_claims(configs / "claims.yaml"), folder, tmp_path / "docs", missing)
    assert "2 of 2 runs are finished" in (tmp_path / "docs/RESULTS.md").read_text()
    with pytest.raises(BadPlan, match="run with other settings"):
        is_finished(folder, experiment, ["seed=5"])


def test_students_learn_from_finished_runs(tmp_path: Path, emoji: Path, configs: Path) -> None:
    plan = parse_plan(tiny_distillation(emoji))
    folder = Folder(tmp_path / "out")
    done, missing = carry_out(plan, folder, configs, workers=0)
    assert (done, missing) == (plan, {})

    samples = len(index_tar(folder["data/train.tar"]).samples)
    temperatures = {}
    for name in ("lit-lite0", "wide-3t"):
        image = EmbeddingCache.open(folder[f"caches/{name}-image"])
        run = folder["runs"] / plan.teaching_experiment(name).name
        assert image.manifest.encoder == f"run:{run}"
        assert sum(image.record(entry.id).n_ok for entry in image.tars) == samples
        temperatures[name] = math.exp(-load_file(run / "model.safetensors")["log_scales.scale"].item())
    assert learned_temperatures(plan, folder) == pytest.approx(temperatures, rel=1e-6)

    # A student reads the rows of its teacher, at the temperature that this one learned.
    student = Experiment("3t-distill", "wide-3t", None, 0)
    changes = read_json(folder.finished(student.name))["changes"]
    assert {f"towers.taught_{side}.path=$caches/wide-3t-{side}" for side in ("image", "text")} <= set(changes)
    assert changes[-1] == f"terms.image-text.teachers.run.temperature={temperatures['wide-3t']:.4g}"
    assert "optim.lr=0.002" in changes

    before = {path: path.stat().st_mtime_ns for path in folder["finished"].iterdir()}
    carry_out(plan, folder, configs, workers=0)
    assert {path: path.stat().st_mtime_ns for path in before} == before

    files = write_report(plan, load_claims(configs / plan.claims), folder, tmp_path / "docs", missing)
    page = files[0].read_text()
    assert files[0].name == "distillation-results.md"
    assert "8 of 8 runs are finished" in page
    for name, run in (("lit-lite0", "lit | lite0"), ("wide-3t", "3t/wide | -")):
        assert f"| {name} | {run} | {temperatures[name]:.4g} |" in page
    measured = page.partition("### Line by line")[2].partition("##")[0]
    assert len(re.findall(r"^\| \d+ \|", measured, re.MULTILINE)) == 3 + 4 * 3 * 2 + 4 * 2 * 2
    assert "Not measured" not in page

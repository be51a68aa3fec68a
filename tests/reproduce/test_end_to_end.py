"""A complete reproduction in miniature, twice: from nothing to the report, then again without any new work."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from reproduce.__main__ import carry_out
from reproduce.claims import load_claims
from reproduce.experiment import is_finished
from reproduce.folder import Folder, read_json
from reproduce.plan import BadPlan, Experiment, Plan, parse_plan
from reproduce.report.page import write_report
from tests.conftest import write_tar
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


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """The shipped configs with small batches, images and towers, and fewer shots."""
    copy = shutil.copytree(CONFIGS, tmp_path / "configs")
    config, groups = copy / "3t.yaml", copy / "sets/groups.yaml"
    tree = yaml.safe_load(config.read_text())
    tree |= {"global_batch_size": 96, "embed_dim": 16}
    tree["data"] = {"image_size": 32}
    tree["towers"]["image"]["model"] = "test_resnet"
    tree["towers"]["text"] |= {"width": 16, "depth": 1}
    config.write_text(yaml.safe_dump(tree, sort_keys=False))
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

    write_report(plan, load_claims(configs / "claims.yaml"), folder, tmp_path / "docs", "make reproduce", missing)
    assert "2 of 2 runs are finished" in (tmp_path / "docs/RESULTS.md").read_text()
    with pytest.raises(BadPlan, match="run with other settings"):
        is_finished(folder, experiment, ["seed=5"])

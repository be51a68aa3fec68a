"""Every config that is shipped and every variant it documents: the arithmetic of all, a few steps of the small ones."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.trainer.test_config import ROOT, RUNS
from threetowers.trainer.config import CacheTower, Run, load
from threetowers.trainer.cost import Teacher, meta_model
from threetowers.trainer.dryrun import dry_run
from threetowers.trainer.engine import deepspeed_config
from threetowers.trainer.optimizer import parameter_groups
from threetowers.trainer.towers.model import TowerModel

CONFIGS = {str(file.relative_to(ROOT / "configs")): file for file in RUNS}
SMALL = ["duration={steps: 7}", "data.vocab_size=4096"]  # what the small ones read from tars and tokenizer
MILLIONS = {  # parameters: of OpenAI's released shapes, and of the authors' released MS-CLIP models
    ("papers/clip.yaml", ""): 151.3,
    ("papers/clip.yaml", "B16"): 149.6,
    ("papers/ms-clip.yaml", ""): 126.3,
    ("papers/ms-clip.yaml", "attention-only"): 183.0,
    ("papers/ms-clip.yaml", "mlp-only"): 154.6,
    ("papers/ms-clip.yaml", "norms-too"): 126.2,
    ("papers/ms-clip.yaml", "nothing-shared"): 211.3,
    ("papers/ms-clip-s.yaml", ""): 132.4,
    ("papers/ms-clip-s.yaml", "B16"): 132.5,
    ("papers/ms-clip-s.yaml", "stem-only"): 128.4,
    ("papers/ms-clip-s.yaml", "branch-only"): 130.3,
}


def variants(file: Path) -> dict[str, list[str]]:
    """The overrides that a config's header documents, by their name; the config as it stands under none."""
    found = re.findall(r"^#   ([\w-]+): (\S+=.*)$", file.read_text(), re.MULTILINE)
    return {"": []} | {name: shlex.split(overrides) for name, overrides in found}


@pytest.mark.parametrize("name", CONFIGS)
def test_dry_run_of_every_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no tars, no cache, no tokenizer
    run = read(name)
    page = "\n".join(dry_run(run, 8))
    assert "samples: unknown" in page
    assert f"= {run.batch:,}\n" in page
    model = build(run)
    assert f"model: {count(model):,} parameters, each counted once" in page
    for tower in run.towers_of("cache"):
        assert re.search(rf"tower {tower}: .* bytes a sample read from .*, no forward passes; .* less than", page)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_documented_variant_can_be_built(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variant, overrides in variants(CONFIGS[name]).items():
        run = read(name, overrides)
        deepspeed_config(run, 8)
        model = build(run)
        assert parameter_groups(model, run.optim), variant
        if (name, variant) in MILLIONS:
            assert round(count(model) / 1e6, 1) == MILLIONS[name, variant], variant
    assert {variant for file, variant in MILLIONS if file == name} <= variants(CONFIGS[name]).keys()


def read(name: str, overrides: Sequence[str] = ()) -> Run:
    return load(CONFIGS[name], [*(SMALL if name.startswith("emoji") else []), *overrides])


def build(run: Run) -> TowerModel:
    teachers = {n: Teacher.named(str(t.backbone)) for n, t in run.towers.items() if isinstance(t, CacheTower)}
    return meta_model(run, run.data.vocab_size or 0, teachers)


def count(model: TowerModel) -> int:
    return sum(p.numel() for p in model.parameters())

"""Every config that is shipped and every variant of it: the arithmetic of all, a few steps of the small ones."""

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.trainer.finished_runs import finished_run
from tests.trainer.launches import RUN_CONFIGS, read_metrics, run_command, torchrun
from tests.trainer.shipped_configs import ROOT, RUNS, variants
from tests.trainer.text_runs import build_text
from threetowers.cache.builder.build import build_caches
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.timm_encoder import load_timm_model
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.trainer.config import CacheTower, TrainConfig, dump, load_config
from threetowers.trainer.engine import deepspeed_config
from threetowers.trainer.estimate.cost import meta_model
from threetowers.trainer.estimate.dry_run import dry_run, teacher_cost
from threetowers.trainer.export.export import probe_inputs
from threetowers.trainer.export.trained_model import load_model
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.optimizer.optimizer import parameter_groups

CONFIGS = {str(file.relative_to(ROOT / "configs")): file for file in RUNS}
SMALL = ["duration={steps: 7}", "data.vocab_size=4096"]  # what the small ones read from tars and tokenizer
MILLIONS = {  # parameters: of OpenAI's released shapes, and of the authors' released MS-CLIP models
    ("papers/clip.yaml", None): 151.3,
    ("papers/clip.yaml", "B16"): 149.6,
    ("papers/clip-finetune.yaml", None): 151.3,
    ("papers/siglip-finetune.yaml", None): 203.2,
    ("papers/ms-clip.yaml", None): 126.3,
    ("papers/ms-clip.yaml", "attention-only"): 183.0,
    ("papers/ms-clip.yaml", "mlp-only"): 154.6,
    ("papers/ms-clip.yaml", "norms-too"): 126.2,
    ("papers/ms-clip.yaml", "nothing-shared"): 211.3,
    ("papers/ms-clip-s.yaml", None): 132.4,
    ("papers/ms-clip-s.yaml", "B16"): 132.5,
    ("papers/ms-clip-s.yaml", "stem-only"): 128.4,
    ("papers/ms-clip-s.yaml", "branch-only"): 130.3,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_dry_run_of_every_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no tars, no cache, no tokenizer
    config = read(name)
    page = "\n".join(dry_run(config, 8))
    assert "samples: unknown" in page
    assert f"= {config.global_batch_size:,}\n" in page
    model = build(config)
    assert f"model: {count(model):,} parameters, each counted once" in page
    for tower in config.towers_reading("rows"):
        settings = config.towers[tower]
        assert isinstance(settings, CacheTower)
        saved = "$"
        if settings.of == "image":
            counted = (settings.encoder or "").startswith("timm:")
            saved = "; .*FLOP a sample less than" if counted else "; FLOPs of the live teacher not counted"
        assert re.search(rf"(?m)^tower {tower}: .* bytes a sample read from .*, no forward passes{saved}", page)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_variant_can_be_built(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = variants(CONFIGS[name])
    for variant in names:
        config = read(name, variant=variant)
        deepspeed_config(config, 8)
        model = build(config)
        assert parameter_groups(model, config.optim), variant
        if (name, variant) in MILLIONS:
            assert round(count(model) / 1e6, 1) == MILLIONS[name, variant], variant
    assert {variant for file, variant in MILLIONS if file == name} <= set(names)


@pytest.mark.parametrize("folders", [["emoji", "reproduce"], ["papers"]])
def test_every_config_and_variant_takes_two_steps(folders: list[str]) -> None:
    """With small towers of the same kinds, in its own precision; all that name none in float32 and mixed, too."""
    result = run_command([sys.executable, str(Path(__file__).with_name("shipped_steps.py")), *folders])
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    names = {(run["config"], run["variant"]) for run in found}
    files = {name: file for name, file in CONFIGS.items() if file.parent.name in folders}
    assert names >= {(name, variant) for name, file in files.items() for variant in variants(file)}
    precisions = {"float32", "mixed", "bfloat16"} if "emoji" in folders else {"mixed"}
    assert {run["precision"] for run in found} == precisions
    for run in found:
        first, second = run["losses"]
        assert math.isfinite(first + second), run
        assert first != second, run
        # Temperature, bias and batch norms, whatever the precision; a run may have none of them.
        assert run["exact"] == (["torch.float32"] if run["scales"] or run["norms"] else []), run
        assert run["embeddings"] == ["torch.float32" if run["precision"] == "float32" else "torch.bfloat16"], run
        specialized = run["config"].endswith("ms-clip-s.yaml") or run["variant"] == "specialized"
        assert not specialized or run["norms"] >= 9, run
    assert {run["precision"] for run in found if run["norms"]} == precisions


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["duration={epochs: 2}"], r"duration\.epochs: the length of an epoch is unknown without .*; give samples"),
        (["data.vocab_size=null"], r"data\.vocab_size: unknown without runs/emoji/tokenizer\.model"),
        (["towers.third.encoder=null"], r"towers\.third\.encoder: name it; .* unknown without the cache"),
        (["towers.third.encoder=timm:resnet0"], r"encoder 'timm:resnet0' is unknown to timm"),
        (["global_batch_size=9"], r"global_batch_size: 9 is not divisible by 2 ranks"),
        (["data.tars=[broken.tar]"], r"broken\.tar"),
    ],
)
def test_keys_that_a_dry_run_without_data_needs(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=message):
        dry_run(read("emoji/3t.yaml", overrides), 2)


def read(name: str, overrides: Sequence[str] = (), variant: str | None = None) -> TrainConfig:
    """Return a shipped config; a small one with what it would read from tars and tokenizer."""
    small = SMALL if name.startswith("emoji") else []
    if name == "emoji/lit-minilm.yaml":  # whose tokenizer is in a package
        small = [key for key in SMALL if not key.startswith("data.vocab_size")]
    return load_config(CONFIGS[name], [*small, *overrides], variant)


def build(config: TrainConfig) -> TowerModel:
    cached = {n: t for n, t in config.towers.items() if isinstance(t, CacheTower)}
    return meta_model(config, config.data.vocab_size, {n: teacher_cost(n, t) for n, t in cached.items()})


def count(model: TowerModel) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.distributed
def test_small_configs_train(
    clip: dict[str, Any], tars: list[Path], tokenizer: Path, cache: Path, tmp_path: Path
) -> None:
    """Two steps of each on two ranks; of shared parameters and of a frozen tower at several ZeRO stages."""
    text_cache = build_text(tmp_path, tars, sources=())
    teacher = finished_run(clip | {"output_dir": str(tmp_path / "teacher")})
    both = {"image": tmp_path / "teacher-image", "text": tmp_path / "teacher-text"}
    build_caches(
        BuildConfig(
            tars=[str(tar) for tar in tars],
            output_dir=tuple(both.values()),
            encoder=f"run:{teacher}",
            of=tuple(both),
            feature="projected",
        )
    )

    def write(file: Path, stage: int, *overrides: str) -> Path:
        tree = dump(load_config(file, overrides))
        for name, tower in tree["towers"].items():
            if tower["kind"] == "cache":
                path = text_cache if tower["of"] == "text" else cache
                if tower["encoder"].startswith(("run:", "open_clip:")):  # whose two sides are in one space
                    path = both[tower["of"]]
                manifest = EmbeddingCache.open(path).manifest
                tower |= {"path": str(path), "encoder": manifest.encoder, "dim": manifest.dim}
                if any(head["of"] == name and head["kind"] == "none" for head in tree["heads"].values()):
                    tree["embed_dim"] = manifest.dim
            elif tower["kind"] == "hf":  # a small one of the kind, for a small tokenizer
                sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
                tower |= {"config": {"model_type": "bert", "vocab_size": 512} | sizes, "init": None}
                tree["data"]["vocab_size"] = None
            elif (tower["init"] or "").startswith("run:"):  # tests/test_distillation_demo.py has it
                tower |= {"init": None, "inherit": None}
        for head in tree["heads"].values():
            if head["embed_dim"] is not None:
                head["embed_dim"] = EmbeddingCache.open(both["image"]).manifest.dim
        tree["data"] |= {"tars": [str(tar) for tar in tars], "workers": 0, "captions": {}}
        if tree["data"]["tokenizer"] is not None:
            tree["data"]["tokenizer"] = str(tokenizer)
        out = tmp_path / f"{file.stem}-{stage}"
        tree |= {"output_dir": str(out), "global_batch_size": 8, "duration": {"steps": 2}, "log": {"every_steps": 1}}
        tree |= {"engine": {"zero_stage": stage}}
        out.with_suffix(".yaml").write_text(yaml.safe_dump(tree))
        return out

    small = {file.stem: file for name, file in CONFIGS.items() if name.startswith("emoji")}
    shared = [write(small["ms-clip-s"], stage) for stage in (0, 2, 3)]
    frozen = [write(small["lit-tuned"], stage, "towers.image.frozen=true") for stage in (1, 3)]
    others = [write(file, 1) for name, file in small.items() if name not in ("ms-clip-s", "lit-tuned")]
    outs = [*shared, *frozen, *others]
    run_command([*torchrun(2), RUN_CONFIGS, *(str(out.with_suffix(".yaml")) for out in outs)])
    for out in outs:
        assert len(read_metrics(out)) == 2
        model = load_model(out)
        images, tokens = probe_inputs(model)
        assert torch.isfinite(model.encode_images(images) @ model.encode_tokens(tokens).T).all()
    for runs in (shared, frozen):
        for out in runs[1:]:
            assert [m["loss"] for m in read_metrics(out)] == pytest.approx(
                [m["loss"] for m in read_metrics(runs[0])], rel=1e-4
            )
    assert not any(name.startswith("towers.text.blocks.5.mlp") for name in load_file(shared[0] / "model.safetensors"))
    pretrained = load_timm_model("tf_efficientnet_lite0", "package:efficientnet-lite0")[0].state_dict()
    for out in frozen:  # neither weights nor running statistics have moved
        for name, tensor in load_model(out).model.towers["image"].model.state_dict().items():  # type: ignore[union-attr]
            assert tensor.equal(pretrained[name]), name

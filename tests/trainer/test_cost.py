"""The arithmetic of a run, for the families whose code is unusual; and what is said where it cannot be done."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

from tests.trainer.test_config import THREE, changed
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.processes.world import World
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.trainer.config import parse
from threetowers.trainer.estimate import summary
from threetowers.trainer.estimate.cost import (
    FusedAttention,
    TeacherCost,
    TrainingFlops,
    activation_bytes,
    meta_model,
    tower_costs,
)
from threetowers.trainer.estimate.summary import DatasetStats, summary_or_reason
from threetowers.trainer.model.towers.timm_tower import TimmTower

TEACHERS = {"third": TeacherCost("b", 20, 40, None)}
STATS = DatasetStats(usable=20, total=20, tars=1, left_out={})
SMALL = ("test_", "atto", "femto", "pico", "nano", "xxs", "xxt", "micro", "tiny", "_ti", "small", "_s", "base")
WITHOUT_EXTRAS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


def tree_of(model: str, size: int, args: dict[str, Any]) -> dict[str, Any]:
    tree = changed("towers.image", {"kind": "timm", "model": model, "args": args})
    return tree | {"data": tree["data"] | {"image_size": size}}


def flops_of(model: str, size: int, **args: Any) -> int:
    flops = tower_costs(meta_model(parse(tree_of(model, size, args)), 30, TEACHERS))["image"].flops
    assert flops is not None
    return flops


def smallest(module: str) -> str:
    """The smallest model of a timm module, as its name says."""

    def size(name: str) -> tuple[int, int]:
        return next((number for number, word in enumerate(SMALL) if word in name), len(SMALL)), len(name)

    return min(timm.list_models(module=module), key=size)


def test_attention_pooling_is_counted() -> None:
    """A latent query that attends to all N tokens: by hand, as the difference to pooling by the mean."""
    tokens, width = 16, 24
    pooled = flops_of("vit_base_patch16_siglip_224", 32, **WITHOUT_EXTRAS)
    mean = flops_of("vit_base_patch16_siglip_224", 32, **WITHOUT_EXTRAS, global_pool="avg")
    keys_values, attention = 2 * tokens * width * 2 * width, 2 * 2 * tokens * width
    query_output_mlp = 2 * width * width * (1 + 1 + 4 + 4)
    assert pooled - mean == keys_values + attention + query_output_mlp


@pytest.mark.parametrize(
    ("model", "size", "args"),
    [
        ("cait_xxs24_224", 32, {"img_size": 32, "depth": 1}),
        ("pit_ti_224", 64, {"img_size": 64}),
        ("vit_pe_core_tiny_patch16_384", 32, {"img_size": 32, "depth": 1}),
        ("naflexvit_base_patch16_map", 32, {"img_size": 32, "depth": 1}),
    ],
)
def test_towers_of_unusual_families_are_counted(model: str, size: int, args: dict[str, Any]) -> None:
    shapes = meta_model(parse(tree_of(model, size, args)), 30, TEACHERS)
    flops = tower_costs(shapes)["image"].flops
    assert flops is not None
    assert flops > 1e5
    kept = activation_bytes(shapes)
    assert kept is not None
    assert kept > 1e4


def test_attention_with_wider_values_has_no_fused_kernel() -> None:
    query, value = torch.empty(1, 2, 4, 8, device="meta"), torch.empty(1, 2, 4, 16, device="meta")
    with FusedAttention():
        assert F.scaled_dot_product_attention(query, query, value).shape == value.shape
        assert F.scaled_dot_product_attention(query[0], query[0], query[0]).shape == query.shape[1:]


@pytest.mark.slow
@pytest.mark.parametrize("module", timm.list_modules())
def test_a_teacher_of_every_family_is_counted(module: str) -> None:
    if timm.list_models(module=module):
        cost = TeacherCost.from_encoder(f"timm:{smallest(module)}")
        assert cost.flops is not None
        assert cost.dim > 0


def test_what_cannot_be_counted_is_said_and_stops_nothing(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = EmbeddingCache.open(cache).manifest

    def page(manifest: Manifest = manifest) -> tuple[str, TrainingFlops | None]:
        world = World(rank=0, size=1, local_rank=0, local_size=1)
        lines, flops = summary_or_reason(parse(THREE), world, 30, {"third": manifest}, STATS, 5)
        return "\n".join(lines), flops

    text, flops = page()
    assert flops is not None
    assert "not counted" not in text + caplog.text

    text, flops = page(replace(manifest, encoder="timm:of_another_timm"))
    assert flops is not None
    assert "no forward passes; FLOPs of the live teacher not counted" in text
    assert (
        "FLOPs of timm:of_another_timm: not counted (ConfigError: encoder 'timm:of_another_timm' is unknown"
        in caplog.text
    )

    def broken(*_: Any) -> Any:
        raise NotImplementedError("no numbers here")

    with monkeypatch.context() as patch:
        patch.setattr(TimmTower, "forward", broken)
        text, flops = page()
    assert flops is None
    assert "parameters, FLOPs not counted forward a sample" in text
    assert "towers and heads, forward and backward, FLOPs not counted + loss" in text
    assert "; activations not counted; " in text
    assert "FLOPs of tower image: not counted (NotImplementedError: no numbers here)" in caplog.text
    assert "memory of activations: not counted (NotImplementedError" in caplog.text

    monkeypatch.setattr(summary, "state_memory", broken)
    with caplog.at_level(logging.WARNING):
        text, flops = page()
    assert flops is None
    assert text.startswith("run runs/x\nsamples: 20 usable of 20 in 1 tars\n")
    assert "costs of the run: not counted (NotImplementedError: no numbers here)" in caplog.text

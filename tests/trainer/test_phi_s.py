"""PHI-S: Hadamard matrices, the standardization against numpy's own steps, and in a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.small_models import model_of
from tests.trainer.test_config import changed
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.trainer.config import parse
from threetowers.trainer.engine import join_process_group
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.towers.cached_tower import CachedTower
from threetowers.trainer.model.towers.phi_s import hadamard_matrix, has_hadamard_matrix, phi_s
from threetowers.trainer.train import Trainer


def test_hadamard_matrices_of_the_widths_of_encoders() -> None:
    for size in (1, 2, 4, 12, 20, 24, 36, 40, 56, 64, 192, 312, 384, 512, 768, 1152):
        matrix = hadamard_matrix(size)
        assert (np.abs(matrix) == 1).all()
        assert np.array_equal(matrix @ matrix.T, size * np.eye(size)), size
    assert all(map(has_hadamard_matrix, range(64, 2049, 64)))


@pytest.mark.parametrize("size", [3, 6, 92, 100])
def test_sizes_without_one(size: int) -> None:
    assert not has_hadamard_matrix(size)
    with pytest.raises(ValueError, match=f"no Hadamard matrix of size {size}"):
        hadamard_matrix(size)


def features(width: int, rank: int) -> np.ndarray[Any, Any]:
    """Features of very unequal variances around a large mean, in a subspace of this rank."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(501, rank)) * np.geomspace(1e-3, 30, rank)
    return values @ rng.normal(size=(rank, width)) + 100


@pytest.mark.parametrize("rank", [20, 7])
def test_each_feature_has_the_variance_1_and_angles_stay(rank: int) -> None:
    x_nD = features(20, rank)
    rotation_DD, std = phi_s(np.cov(x_nD.T, bias=True))
    np.testing.assert_allclose(rotation_DD @ rotation_DD.T, np.eye(20), atol=1e-12)
    tower = CachedTower(20, "phi-s")
    tower.set_statistics(*(torch.from_numpy(a) for a in (x_nD.mean(axis=0), np.full(20, std), rotation_DD)))
    found_nD = tower(torch.from_numpy(x_nD)).double().numpy()
    np.testing.assert_allclose(found_nD.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(found_nD.std(axis=0), 1, rtol=1e-5)
    centred_nD = x_nD - x_nD.mean(axis=0)
    np.testing.assert_allclose(found_nD @ found_nD.T * std**2, centred_nD @ centred_nD.T, atol=1e-3 * std**2)


def test_features_of_one_value_keep_it() -> None:
    rotation_DD, std = phi_s(np.zeros((4, 4)))
    tower = CachedTower(4, "phi-s")
    tower.set_statistics(torch.ones(4), torch.full((4,), std), torch.from_numpy(rotation_DD))
    assert torch.equal(tower(torch.ones(2, 4)), torch.zeros(2, 4))


def test_products_are_full_precision_under_autocast() -> None:
    tower = CachedTower(64, "phi-s")
    tower.set_statistics(torch.zeros(64), torch.ones(64), torch.from_numpy(hadamard_matrix(64) / 8))
    rows = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = tower(rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rows @ torch.from_numpy(hadamard_matrix(64) / 8).float().T)


def test_a_width_without_hadamard_matrix_is_refused() -> None:
    tree = changed("towers.third.standardize", "phi-s")
    model_of(tree)  # of 20
    with pytest.raises(ValueError, match=r"towers\.third\.standardize: phi-s needs a Hadamard matrix .* none of 50 is"):
        TowerModel(parse(tree), vocab_size=48, cache_widths={"third": 50})


def test_a_run_holds_its_standardization(three: dict[str, Any]) -> None:
    """The weights' file has what numpy computes of the rows of the cache."""
    three["towers"]["third"]["standardize"] = "phi-s"
    three |= {"duration": {"steps": 1}}
    Trainer(parse(three), join_process_group()).train()
    state = load_file(Path(three["output_dir"]) / "model.safetensors")
    opened = EmbeddingCache.open(three["towers"]["third"]["path"])
    rows = np.concatenate([opened.tar(i) for i in range(len(opened.tars))]).astype(np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]
    variance = rows.var(axis=0).mean()
    np.testing.assert_allclose(state["towers.third.mean"], rows.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["towers.third.std"], np.full(opened.dim, variance**0.5), rtol=1e-5)
    rotated = (rows - rows.mean(axis=0)) @ state["towers.third.rotation"].double().numpy().T
    np.testing.assert_allclose(rotated.var(axis=0), np.full(opened.dim, variance), rtol=1e-3)

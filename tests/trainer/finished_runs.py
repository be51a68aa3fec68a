"""Runs that were never trained, as if they had been."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from threetowers.cache.format.manifest import Manifest
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.trainer.config import CacheTower, parse
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.state_dict import deduplicated_state_dict
from threetowers.trainer.run.run_folder import RunFolder


def finished_run(tree: dict[str, Any], manifests: dict[str, Manifest] | None = None) -> Path:
    """The folder of a run with random weights, biases, norms and scales included.

    `manifests`: of the caches of its towers; by default these are opened.
    """
    config = parse(tree)
    if manifests is None:
        cached = {name: tower for name, tower in config.towers.items() if isinstance(tower, CacheTower)}
        manifests = {name: EmbeddingCache.open(tower.path).manifest for name, tower in cached.items()}
    folder = RunFolder(Path(config.output_dir))
    folder.create(config, {}, manifests)
    torch.manual_seed(3)
    has_words = config.data.tokenizer is not None
    rows = folder.load_tokenizer().embedding_rows(config.data.vocab_size) if has_words else None
    model = TowerModel(config, rows, {name: manifest.dim for name, manifest in manifests.items()})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        for b in model.buffers():
            if b.is_floating_point():
                b += 0.2 * torch.rand_like(b)
    save_file(deduplicated_state_dict(model), folder.weights)
    return folder.path

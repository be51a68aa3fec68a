"""Runs that were never trained, as if they had been."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from threetowers.cache.encoders.sentencepiece_tokenizer import Tokenizer
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.trainer.config import CacheTower, parse
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.state_dict import deduplicated_state_dict
from threetowers.trainer.run_folder import RunFolder


def finished_run(tree: dict[str, Any]) -> Path:
    """The folder of a run with random weights, biases, norms and scales included."""
    config = parse(tree)
    manifests = {n: EmbeddingCache.open(t.path).manifest for n, t in config.towers.items() if isinstance(t, CacheTower)}
    folder = RunFolder(Path(config.output_dir))
    folder.create(config, {}, manifests)
    torch.manual_seed(3)
    rows = Tokenizer.load(folder.tokenizer).embedding_rows(config.data.vocab_size)
    model = TowerModel(config, rows, {name: manifest.dim for name, manifest in manifests.items()})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        for b in model.buffers():
            if b.is_floating_point():
                b += 0.2 * torch.rand_like(b)
    save_file(deduplicated_state_dict(model), folder.weights)
    return folder.path

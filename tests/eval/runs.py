"""Folders of runs as training leaves them, without the training."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from threetowers.cache.encoders.tokenizers.names import load_named_tokenizer
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.trainer.config import CacheTower, parse
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.run.run_folder import RunFolder


def finished(tree: dict[str, Any], constant: bool = False) -> Path:
    """The folder of a run as training leaves it, with random weights; `constant`: with collapsed embeddings."""
    run = parse(tree)
    caches = {n: EmbeddingCache.open(t.path) for n, t in run.towers.items() if isinstance(t, CacheTower)}
    torch.manual_seed(2)
    tokenizer = load_named_tokenizer(run.data.tokenizer) if run.data.tokenizer else None
    vocab = tokenizer.embedding_rows(run.data.vocab_size) if tokenizer else None
    model = TowerModel(run, vocab, {name: cache.dim for name, cache in caches.items()})
    if constant:
        for head in (run.deploy.image, run.deploy.text):
            torch.nn.init.zeros_(model.heads[head].weight)  # type: ignore[arg-type]
    folder = RunFolder(Path(run.output_dir))
    folder.create(run, {}, {name: cache.manifest for name, cache in caches.items()})
    save_file(model.state_dict(), folder.weights)
    folder.summary.write_text(json.dumps({"steps": 3, "seconds": 1.5}))
    return folder.path

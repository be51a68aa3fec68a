"""Folders of runs as training leaves them, without the training."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from threetowers.cache.encoders.sentencepiece_tokenizer import Tokenizer
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.trainer.config import parse
from threetowers.trainer.data.joins.image_join import ImageJoin
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.run_folder import RunFolder


def finished(tree: dict[str, Any], constant: bool = False) -> Path:
    """The folder of a run as training leaves it, with random weights; `constant`: with collapsed embeddings."""
    run = parse(tree)
    tars = [index_tar(tar) for tar in run.data.tars]
    caches = {name: ImageJoin(run.towers[name].path, tars).cache for name in run.towers_of("cache")}  # type: ignore[union-attr]
    torch.manual_seed(2)
    vocab = Tokenizer.load(run.data.tokenizer).embedding_rows(run.data.vocab_size)
    model = TowerModel(run, vocab, {name: cache.dim for name, cache in caches.items()})
    if constant:
        for head in (run.deploy.image, run.deploy.text):
            torch.nn.init.zeros_(model.heads[head].weight)  # type: ignore[arg-type]
    folder = RunFolder(Path(run.output_dir))
    folder.create(run, {}, {name: cache.manifest for name, cache in caches.items()})
    save_file(model.state_dict(), folder.weights)
    folder.summary.write_text(json.dumps({"steps": 3, "seconds": 1.5}))
    return folder.path

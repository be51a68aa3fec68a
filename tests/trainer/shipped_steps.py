"""Two steps of every config and variant in some of configs/'s folders, shrunk, with their own engine and optimizer.

For each a line of JSON: its precision, the loss of both steps, and the types of weights, batch norms and scales.
"""

import copy
import json
import sys
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tests.trainer.shipped_configs import REPRODUCED, ROOT, RUNS, variants
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import END
from threetowers.trainer.config import Precision, TrainConfig, dump, load_config, parse
from threetowers.trainer.engine import deepspeed_config, join_process_group, leave_process_group, start_engine
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.precision import float32_parameters

BATCH, VOCAB, LENGTH, PIXELS, WIDTH = 8, 48, 8, 32, 32
VIT = {"img_size": PIXELS, "patch_size": 8, "embed_dim": WIDTH, "depth": 6, "num_heads": 2}


def shrunk(config: TrainConfig) -> TrainConfig:
    """Return the config with towers of the same kinds and a few thousand parameters, on small images and captions."""
    tree: dict[str, Any] = copy.deepcopy(dump(config))
    tree["global_batch_size"] = BATCH
    tree["data"] |= {"image_size": PIXELS, "context_length": LENGTH, "vocab_size": VOCAB}
    tree["embed_dim"] = WIDTH
    for head in tree["heads"].values():
        if head["hidden"] is not None:
            head["hidden"] = WIDTH
        head["embed_dim"] = None  # all rows are as wide as the embeddings
    for tower in tree["towers"].values():
        if tower["kind"] == "text":
            tower |= {"width": WIDTH, "depth": 6 if tower["share"] else 1, "heads": 2, "mlp_ratio": 4.0}
            if tower["share"] and tower["share"]["blocks"]:
                tower["share"]["blocks"] = 3
        elif tower["kind"] == "open_clip":
            sizes = {"width": WIDTH, "layers": 1}
            vision, text = {"patch_size": 8, "head_width": 16} | sizes, {"heads": 2} | sizes
            changes = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}
            tower |= {"model": "ViT-B-32", "args": changes, "trainable_blocks": tower["trainable_blocks"] and 1}
        elif tower["kind"] == "hf":
            sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 2}
            tower["config"] = {"model_type": "bert", "vocab_size": VOCAB} | sizes
        elif tower["kind"] == "timm" and tower["model"].startswith("vit"):
            tower["args"] = VIT
        elif tower["kind"] == "timm":  # batch norms; without a head its width is that of the embeddings
            tower |= {"model": "test_efficientnet" if "efficientnet" in tower["model"] else "test_resnet", "args": {}}
            tree["embed_dim"] = timm.create_model(tower["model"], num_classes=0).num_features
    return parse(tree)


def inputs_of(config: TrainConfig, step: int) -> dict[str, Tensor]:
    """Return random images, tokens and cached rows by tower."""
    generator = torch.Generator().manual_seed(step)
    inputs = {}
    for name, tower in config.towers.items():
        if tower.reads == "images":
            inputs[name] = torch.randint(0, 256, (BATCH, 3, PIXELS, PIXELS), generator=generator, dtype=torch.uint8)
        elif tower.reads == "tokens":
            inputs[name] = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
            inputs[name][:, -1] = END
        else:
            inputs[name] = torch.randn(BATCH, config.embed_dim, generator=generator)
    return inputs


def two_steps(config: TrainConfig) -> dict[str, Any]:
    """Train two steps and return what there is to see."""
    torch.manual_seed(0)
    model = TowerModel(config, VOCAB, dict.fromkeys(config.towers, config.embed_dim))
    engine = start_engine(model, config, deepspeed_config(config, 1))
    losses = []
    for step in range(2):
        outputs = engine(inputs_of(config, step))
        loss, _ = total_loss(config, outputs)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return {
        "precision": config.engine.precision,
        "losses": losses,
        "norms": len(norms),
        "scales": len(config.scales()),
        "exact": sorted({str(p.dtype) for p in float32_parameters(model).values()}),
        "embeddings": sorted({str(x_bD.dtype) for x_bD in outputs.embeddings.values()}),
    }


def precisions(config: TrainConfig, plain: bool) -> list[Precision]:
    """Return the precision that a config names; where it names none, those of both kinds of machine, or all of them."""
    if config.engine.precision is not None:
        return [config.engine.precision]
    return ["float32", "mixed", "bfloat16"] if plain and config.engine.zero_stage == 1 else ["float32", "mixed"]


if __name__ == "__main__":
    join_process_group()
    done: dict[str, dict[str, Any]] = {}  # variants that differ in size alone are the same once they are shrunk
    for file in [file for file in [*RUNS, *REPRODUCED] if file.parent.name in sys.argv[1:]]:
        for variant in variants(file):
            small = shrunk(load_config(file, variant=variant))
            for precision in precisions(small, variant is None):
                config = replace(small, engine=replace(small.engine, precision=precision))
                key = json.dumps(dump(replace(config, output_dir="")), sort_keys=True)
                done[key] = found = done.get(key) or two_steps(config)
                name = {"config": str(file.relative_to(ROOT / "configs")), "variant": variant}
                print(json.dumps(name | found), flush=True)
    leave_process_group()

"""Layer-wise learning rates, and towers of which the last blocks alone are trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.trainer.launches import run_command, torchrun
from tests.trainer.small_models import VIT, inputs_of, model_of
from tests.trainer.test_config import THREE, changed
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.estimate.cost import TeacherCost, meta_model, tower_costs
from threetowers.trainer.estimate.summary import _rates_by_layer
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.optimizer.optimizer import build_optimizer, freeze, parameter_groups, rate_factors

DEPTHS = {
    # Starts of parameters' names, from the input up: what is before the blocks, each block, what follows.
    "vit": [
        ("model.cls_token", "model.pos_embed", "model.patch_embed.", "model.norm_pre."),
        ("model.blocks.0.",),
        ("model.blocks.1.",),
        ("model.blocks.2.",),
        ("model.blocks.3.", "model.norm."),
        (),
    ],
    "resnet": [
        ("model.conv1.", "model.bn1."),
        *((f"model.layer{stage}.0.",) for stage in range(1, 5)),
        (),
    ],
    "convnext": [
        ("model.stem.",),
        *(
            (f"model.stages.{stage}.blocks.{block}.", *([f"model.stages.{stage}.downsample."] if block == 0 else []))
            for stage, blocks in enumerate((1, 2, 4, 2))
            for block in range(blocks)
        ),
        ("model.head.",),
    ],
    "text": [("embed.", "position"), ("blocks.0.",), ("blocks.1.",), ("blocks.2.", "norm."), ()],
}
TOWERS = {
    "vit": ("image", VIT),
    "resnet": ("image", {"kind": "timm", "model": "test_resnet", "args": {"zero_init_last": False}}),
    "convnext": ("image", {"kind": "timm", "model": "test_convnext"}),
    "text": ("text", THREE["towers"]["text"] | {"depth": 3}),
}
RUN_STEPS = str(Path(__file__).with_name("step_processes.py"))
GIVEN = {"init": "given.safetensors"}  # which is not loaded here


def model_with(family: str, **keys: Any) -> tuple[TowerModel, str]:
    """A model with a tower of a family, and the name of that tower."""
    name, tower = TOWERS[family]
    return model_of(changed(f"towers.{name}", tower | keys)), name


def depth_of(family: str, parameter: str) -> int:
    """The layer of a parameter, read off its name."""
    found = [number for number, starts in enumerate(DEPTHS[family]) if parameter.startswith(starts or ("-",))]
    assert len(found) == 1, parameter
    return found[0]


@pytest.mark.parametrize("family", DEPTHS)
def test_the_rate_falls_from_block_to_block(family: str) -> None:
    model, name = model_with(family, layer_decay=0.5)
    optim = parse(
        THREE
        | {"optim": {"lr": 0.1, "param_groups": [{"match": "*.bias", "lr": 0.25}, {"match": "heads.g.*", "lr": 0}]}}
    ).optim
    freeze(model, optim)
    found = rate_factors(model, optim)
    above = len(DEPTHS[family]) - 1
    for parameter, _ in model.named_parameters():
        factor = 0.25 if parameter.endswith(".bias") else 1.0
        if parameter.startswith(f"towers.{name}."):
            factor *= 0.5 ** (above - depth_of(family, parameter.removeprefix(f"towers.{name}.")))
        assert found[parameter] == (0.0 if parameter == "heads.g.weight" else factor), parameter
    groups = parameter_groups(model, optim)
    assert len({(g["lr_factor"], g["weight_decay"]) for g in groups}) == len(groups)  # one for each factor
    assert {g["lr_factor"] for g in groups} == set(found.values()) - {0.0}
    assert all(g["lr"] == 0.1 * g["lr_factor"] for g in groups)


@pytest.mark.parametrize(("family", "trained"), [("vit", 1), ("vit", 4), ("resnet", 2), ("convnext", 3), ("text", 2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_trains_the_last_blocks_alone(family: str, trained: int, checkpointing: bool) -> None:
    model, name = model_with(family, trainable_blocks=trained, **GIVEN)
    tower: Any = model.towers[name]
    if checkpointing:
        model.checkpoint_activations()
    above = len(DEPTHS[family]) - 1
    learns = {p for p, _ in tower.named_parameters() if depth_of(family, p) >= above - trained}
    assert {p for p, value in tower.named_parameters() if value.requires_grad} == learns
    before = {key: t.clone() for key, t in tower.state_dict().items()}
    optim = parse(THREE | {"optim": {"lr": 0.1}}).optim
    optimizer = build_optimizer(model, optim)
    loss, _ = total_loss(model.config, model(inputs_of(6)))
    loss.backward()
    optimizer.step()
    after = tower.state_dict()
    assert {p for p, _ in tower.named_parameters() if not after[p].equal(before[p])} == learns
    # Below them statistics are fixed too.
    for buffer, _ in tower.named_buffers():
        if buffer in after and buffer.endswith("num_batches_tracked"):
            assert (int(after[buffer]) > 0) == (depth_of(family, buffer) >= above - trained), buffer


@pytest.mark.parametrize("family", ["vit", "text"])
def test_no_graph_is_kept_below_the_first_trained_block(family: str) -> None:
    model, name = model_with(family, trainable_blocks=1, **GIVEN)
    tower: Any = model.towers[name]
    inputs: list[Tensor] = []
    for block in tower.blocks:
        block.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    model(inputs_of(4))
    assert [x.grad_fn for x in inputs] == [None] * len(tower.blocks)
    assert [block.training for block in tower.blocks] == [False] * (len(tower.blocks) - 1) + [True]


@pytest.mark.distributed
def test_two_ranks_train_the_same_blocks_at_the_same_rates(tmp_path: Path) -> None:
    """In micro-batches, on ZeRO 1 and 3, as one process in one pass, up to what Adam makes of rounding."""
    save_file(inputs_of(24) | {"groups": torch.arange(24)}, tmp_path / "batch.safetensors")
    tree = changed("towers.image", VIT | {"trainable_blocks": 2, "layer_decay": 0.5} | GIVEN)
    tree["towers"]["text"] |= {"layer_decay": 0.25}
    tree["global_batch_size"] = 12

    def launch(ranks: int, *engines: dict[str, Any]) -> list[dict[str, Tensor]]:
        outs = [tmp_path / f"{ranks}-{number}.safetensors" for number in range(len(engines))]
        jobs = [
            {
                "config": tree | {"engine": engine},
                "steps": 2,
                "batch": str(tmp_path / "batch.safetensors"),
                "out": str(out),
            }
            for engine, out in zip(engines, outs, strict=True)
        ]
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        run_command([*torchrun(ranks), RUN_STEPS, str(tmp_path / "jobs.json")])
        return [load_file(out) for out in outs]

    start = model_of(tree)
    learned = [name for name, p in start.named_parameters() if p.requires_grad]
    assert 0 < len(learned) < len(list(start.parameters()))
    (whole,) = launch(1, {"zero_stage": 0})
    moved = sum(float((whole[name] - start.state_dict()[name]).norm()) ** 2 for name in learned) ** 0.5
    for state in launch(2, *({"zero_stage": stage, "micro_batch_size": 2} for stage in (1, 3))):
        for name, p in start.named_parameters():
            assert state[name].equal(p) == (not p.requires_grad), name
        apart = sum(float((state[name] - whole[name]).norm()) ** 2 for name in learned) ** 0.5
        assert apart < moved / 50


def test_what_has_no_such_blocks_is_refused() -> None:
    for family, count in (("vit", 4), ("resnet", 4), ("text", 3)):
        with pytest.raises(ValueError, match=rf"trainable_blocks: found {count + 1}, but the tower has {count} blocks"):
            model_with(family, trainable_blocks=count + 1, **GIVEN)
    special = VIT | {"args": VIT["args"] | {"depth": 6}, "specialize": {}}
    with pytest.raises(ValueError, match=r"towers\.image\.trainable_blocks: SpecializedViT has no blocks .*; leave it"):
        model_of(changed("towers.image", special | {"trainable_blocks": 1} | GIVEN))
    rates = model_of(changed("towers.image", special | {"layer_decay": 0.5}))
    with pytest.raises(ValueError, match=r"towers\.image\.layer_decay: SpecializedViT has no blocks .*; leave it out"):
        parameter_groups(rates, rates.config.optim)
    share = {"share": {"tower": "image"}}
    for path, keys, message in [
        ("towers.image", {"trainable_blocks": 1}, r"towers\.image\.trainable_blocks: .* need weights; name them"),
        ("towers.image", {"frozen": True, "layer_decay": 0.5} | GIVEN, r"layer_decay: found 0\.5, but frozen: true"),
        ("towers.image", {"frozen": True, "trainable_blocks": 1} | GIVEN, r"trainable_blocks: found 1, but frozen"),
        ("towers.third", {"layer_decay": 0.5}, r"towers\.third\.cache\.layer_decay: Unexpected keyword"),
        ("towers.third", {"trainable_blocks": 1}, r"towers\.third\.cache\.trainable_blocks: Unexpected keyword"),
        (
            "towers.text",
            share | {"layer_decay": 0.5},
            r"layer_decay: found 0\.5, but the parameters that .* two towers",
        ),
        ("towers.text", {"layer_decay": 0.0}, r"towers\.text\.text\.layer_decay: .*greater than 0"),
    ]:
        tower = THREE["towers"][path.removeprefix("towers.")]
        with pytest.raises(ConfigError, match=message):
            parse(changed(path, tower | keys))


def test_costs_and_rates_are_told() -> None:
    """Of the last of four blocks alone: a backward pass of a fourth, and no gradients with respect to its input."""
    teachers = {"third": TeacherCost.of_width(None, 20)}
    keys = {"trainable_blocks": 1, "layer_decay": 0.5} | GIVEN
    whole, part = (meta_model(parse(changed("towers.image", VIT | more)), 30, teachers) for more in ({}, keys))
    costs = {model: tower_costs(model)["image"] for model in (whole, part)}
    assert costs[part].flops == costs[whole].flops
    full, some = costs[whole].backward_flops, costs[part].backward_flops
    assert full is not None
    assert some is not None
    assert full / 5 < some < full / 4
    assert _rates_by_layer(whole.config, whole, "image") == []
    assert _rates_by_layer(part.config, part, "image") == [
        "learning rates of image, as factors: before its blocks 0; 3 x 0, 0.5 in 4 blocks"
    ]

"""Micro-batches give the gradients of the batch: towers, heads, scales, biases, with dropout, at every ZeRO stage."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.trainer.launches import run_command, torchrun
from tests.trainer.small_models import VIT, inputs_of, model_of
from tests.trainer.test_config import THREE
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.engine import deepspeed_config, num_micro_batches
from threetowers.trainer.grad_cache import GradCache, learning_heads, seed_dropout, split
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.running_moments import running_moments

RUN_STEPS = str(Path(__file__).with_name("step_processes.py"))
STEPS, BATCH = 5, 12


def tree(**engine: Any) -> dict[str, Any]:
    return copy.deepcopy(THREE) | {"global_batch_size": BATCH, "engine": engine, "optim": {"grad_clip_norm": 0.5}}


class PlainEngine:
    """The part of DeepSpeed's engine that GradCache uses: gradients add up in the module."""

    def __init__(self, module: TowerModel) -> None:
        self.module = module

    def __call__(self, inputs: dict[str, Tensor]) -> Any:
        return self.module(inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def grad_cache_of(model: TowerModel, micro_batches: int) -> GradCache:
    loss_fn = partial(total_loss, model.config)
    return GradCache(PlainEngine(model), loss_fn, micro_batches, seed=0, rank=0, device=torch.device("cpu"))


def gradients(model: TowerModel, micro_batches: int, groups_b: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    result = grad_cache_of(model, micro_batches)(inputs_of(10), 0, groups_b)
    assert result.nonfinite() == ()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def one_process_group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_in_micro_batches_match_one_process_in_one_pass(tmp_path: Path) -> None:
    """Five steps of AdamW with clipping give the same parameters, on ZeRO 0 to 3, up to the rounding of sums.

    The effect of rounding is measured on this processor: one process with each batch's samples in another order adds
    the same numbers in another order, and Adam, which divides a gradient by its own size, amplifies that like any
    rounding.
    """
    inputs = inputs_of(STEPS * BATCH) | {"groups": torch.arange(STEPS * BATCH) % 40}
    turned = torch.arange(STEPS * BATCH).view(STEPS, BATCH).flip(1).flatten()
    save_file(inputs, tmp_path / "batch.safetensors")
    save_file({name: tensor[turned] for name, tensor in inputs.items()}, tmp_path / "turned.safetensors")

    def job(batch: str = "batch", **engine: Any) -> dict[str, Any]:
        return {"config": tree(**engine), "steps": STEPS, "batch": str(tmp_path / f"{batch}.safetensors")}

    def launch(ranks: int, jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
        outs = {name: tmp_path / f"{ranks}-{name}.safetensors" for name in jobs}
        (tmp_path / "jobs.json").write_text(json.dumps([job | {"out": str(outs[name])} for name, job in jobs.items()]))
        run_command([*torchrun(ranks), RUN_STEPS, str(tmp_path / "jobs.json")])
        return {name: load_file(out) for name, out in outs.items()}

    whole, reordered = launch(1, {"whole": job(zero_stage=0), "reordered": job("turned", zero_stage=0)}).values()
    start = model_of(tree()).state_dict()
    learned = [name for name, _ in model_of(tree()).named_parameters()]
    jobs = {f"zero {z}": job(zero_stage=z, micro_batch_size=2) for z in range(4)}
    jobs["odd size"] = job(zero_stage=1, micro_batch_size=4)  # 6 samples a rank: in two parts of 3
    jobs["one pass"] = job(zero_stage=1)
    jobs["recomputed"] = job(zero_stage=3, micro_batch_size=3, activation_checkpointing=True)
    lower = {f"mixed zero {z}": job(zero_stage=z, micro_batch_size=2, precision="mixed") for z in range(4)}
    lower["mixed one pass"] = job(zero_stage=1, precision="mixed")
    lower["bfloat16"] = job(zero_stage=2, micro_batch_size=2, precision="bfloat16")
    found = launch(2, jobs | lower)
    rounded = {name: found.pop(name) for name in lower}
    reference = flat(whole, learned)

    def distance(state: dict[str, Tensor]) -> float:
        return float((flat(state, learned) - reference).norm() / reference.norm())

    rounding = distance(reordered)
    assert 0 < 1000 * rounding < distance(start)  # something was learned, by far more
    for name, state in found.items():
        assert distance(state) <= 10 * rounding, name
        # One step rounds the scale once, and its gradient, a sum over all pairs, is nowhere near 0.
        torch.testing.assert_close(
            state["log_scales.scale"], whole["log_scales.scale"], rtol=STEPS * 2**-23, atol=0, msg=name
        )
    for name, state in rounded.items():
        assert state["heads.f.weight"].dtype == (torch.bfloat16 if name == "bfloat16" else torch.float32)
        # Of bfloat16's gradients, 2^-8 off, Adam makes about the root, of what was learned.
        assert distance(state) <= 1e-2, name
        assert state["log_scales.scale"].dtype == torch.float32  # never in bfloat16, whose steps are of 2^-6 here
        torch.testing.assert_close(state["log_scales.scale"], whole["log_scales.scale"], rtol=0, atol=2**-11, msg=name)


def flat(state: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([state[name].double().flatten() for name in names])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("parts", [2, 3, 10])
def test_gradients_of_every_parameter(one_process_group: None, kind: str, parts: int) -> None:
    config = tree() | {"loss": {"kind": kind}}
    config["terms"]["image-third"] |= {"scale": "own", "weight": 0.5}
    config["terms"]["transfer"] = {"x": "f_h", "y": "h_f", "kind": "l2"}
    model = model_of(config).double()
    groups_b = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0])
    whole = gradients(model, 1, groups_b)
    accumulated = gradients(model, parts, groups_b)
    assert whole.keys() == accumulated.keys() == dict(model.named_parameters()).keys()
    for name, grad in whole.items():
        assert float((accumulated[name] - grad).norm()) <= 1e-5 * float(grad.norm()) + 1e-7, (
            name
        )  # embeddings are float32


def test_dropout_is_the_same_in_both_passes(one_process_group: None) -> None:
    """Compared with one graph of all micro-batches, each under its own seed."""
    config = tree()
    config["towers"]["text"]["dropout"] = 0.5
    config["heads"]["h_f"] |= {"kind": "mlp", "dropout": 0.5, "norm": "batch", "gated": True}
    model = model_of(config).double()
    accumulated = gradients(model, 3)
    model.zero_grad()
    outputs = []
    for number, part in enumerate(split(inputs_of(10), 3)):
        seed_dropout(0, 0, 0, number)
        outputs.append(model(part.inputs))
    embeddings = {name: torch.cat([part.embeddings[name] for part in outputs]) for name in outputs[0].embeddings}
    loss, _ = total_loss(model.config, type(outputs[0])(embeddings, outputs[0].log_scales, outputs[0].biases))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert float((accumulated[name] - p.grad).norm()) <= 1e-5 * float(p.grad.norm()) + 1e-7, name


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_running_moments_take_each_sample_once(one_process_group: None, parts: int, again: bool) -> None:
    """Also where blocks run forward again in backward: to the bit."""
    config = tree(activation_checkpointing=again)
    config["towers"]["image"]["model"] = "test_resnet"
    config["heads"]["h_f"] |= {"kind": "mlp", "norm": "batch", "input_norm": "batch"}
    accumulated, reference = model_of(config), model_of(config)
    if again:
        accumulated.checkpoint_activations()
    found = gradients(accumulated, parts)
    assert len(running_moments(accumulated)) > 6
    for part in split(inputs_of(10), parts):
        reference(part.inputs)
    for name, b in reference.named_buffers():
        assert b.equal(accumulated.get_buffer(name)), name
    reference = model_of(config | {"engine": {}})
    for name, grad in gradients(reference, parts).items():
        assert grad.equal(found[name]), name


def test_micro_batches_and_recomputation_draw_the_same_depth(one_process_group: None) -> None:
    """Stochastic depth and dropout: one draw for the first pass, the second, and the recomputation."""
    config = tree(activation_checkpointing=True)
    config["towers"]["image"] = VIT | {"args": VIT["args"] | {"drop_path_rate": 0.5, "proj_drop_rate": 0.3}}
    config["towers"]["text"] |= {"dropout": 0.3}
    again, once = model_of(config), model_of(config)
    again.checkpoint_activations()
    expected = gradients(once, 3)
    for name, grad in gradients(again, 3).items():
        assert grad.equal(expected[name]), name
    evaluated = gradients(once.eval(), 3)
    assert any(not evaluated[name].equal(grad) for name, grad in expected.items())


def test_heads_without_trained_parameters_get_no_gradient() -> None:
    """LiT on cached rows: the image side is a leaf without gradient, as in one pass."""
    config = tree()
    del config["towers"]["image"], config["heads"]["f_h"], config["terms"]["image-third"], config["heads"]["f"]
    config["heads"]["h_f"] = {"of": "third", "kind": "none"}
    config |= {
        "embed_dim": 20,
        "terms": {"image-text": {"x": "h_f", "y": "g"}},
        "deploy": {"image": "h_f", "text": "g"},
    }
    assert learning_heads(model_of(config)) == {"g"}
    assert learning_heads(model_of(tree())) == {"f", "g", "f_h", "h_f"}


@pytest.mark.parametrize("parts", [1, 2])
def test_nonfinite_embeddings_are_named_and_make_every_gradient_nan(one_process_group: None, parts: int) -> None:
    """So no rank can take its gradients for good ones. A loss beyond floating point does so too, and names its term."""
    model = model_of(tree())
    torch.nn.init.constant_(model.heads["f_h"].weight, torch.inf)  # type: ignore[arg-type]
    result = grad_cache_of(model, parts)(inputs_of(6), 0)
    assert result.nonfinite() == ("embeddings f_h",)
    assert not any(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    config = tree()
    config["terms"]["transfer"] = {"x": "f_h", "y": "h_f", "kind": "l2", "weight": 1e39}
    model = model_of(config)
    result = grad_cache_of(model, parts)(inputs_of(6), 0)
    assert result.nonfinite() == ("loss = nan",)
    assert not any(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_layouts_that_do_not_fit_are_refused() -> None:
    assert num_micro_batches(parse(tree(micro_batch_size=5)), world=2) == 2
    assert num_micro_batches(parse(tree()), world=2) == 1
    with pytest.raises(ConfigError, match=r"adafactor needs whole matrices .* ZeRO stage 1 with float32"):
        deepspeed_config(parse(tree(zero_stage=1) | {"optim": {"name": "adafactor"}}), world=2)
    with pytest.raises(ValueError, match="global_batch_size: 12 is not divisible by 5 ranks"):
        deepspeed_config(parse(tree()), world=5)
    with pytest.raises(ValueError, match="2 samples cannot be split into 3 micro-batches"):
        split(inputs_of(2), 3)

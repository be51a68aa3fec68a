"""The start-up page: the arithmetic of a run, before its first step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import nn

from threetowers.trainer.config import Augment, CacheTower, ImageTower, TrainConfig
from threetowers.trainer.estimate.cost import (
    LOSS_PRODUCTS,
    TeacherCost,
    TowerCost,
    activation_bytes,
    loss_flops,
    state_memory,
    tower_costs,
    training_flops,
)
from threetowers.trainer.model.model import TowerModel


@dataclass(frozen=True)
class Held:
    """What the tars hold: samples that can be used, all of them, and why some cannot."""

    usable: int
    total: int
    tars: int
    left_out: Mapping[str, int]
    without_row: Mapping[str, int] = field(default_factory=dict)  # trained on all the same, and how
    notes: Sequence[str] = ()  # which sets are mixed, and how all are read


def startup_page(
    world_size: int,
    device: torch.device,
    model: TowerModel,
    teachers: Mapping[str, TeacherCost],
    held: Held | None,
    steps: int,
) -> list[str]:
    """Return the lines that say what will be trained, on what, for how long, and what it costs.

    `model`: from `meta_model`. `teachers`: by cached tower. `held`: None where the tars are not at hand.
    """
    run, costs = model.run, tower_costs(model)
    return [
        f"run {run.output_dir}",
        *_data(run, world_size, device, held, steps),
        *_towers(run, model, costs, teachers),
        *_terms(run, model),
        *_compute(run, model, costs, teachers, steps),
        *_memory(run, model, world_size),
    ]


def _data(run: TrainConfig, world_size: int, device: torch.device, held: Held | None, steps: int) -> list[str]:
    local = run.global_batch_size // world_size
    chunk = f", {run.engine.micro_batch_size:,} at a time" if run.engine.micro_batch_size is not None else ""
    batch = f"batch: {local:,} on each of {world_size} ranks ({device.type}){chunk} = {run.global_batch_size:,}"
    samples = f"steps: {steps:,} x {run.global_batch_size:,} = {steps * run.global_batch_size:,} samples"
    if held is None:
        return ["samples: unknown, the tars are not at hand", batch, samples]
    per_epoch = max(1, held.usable // run.global_batch_size)
    return [
        f"samples: {held.usable:,} usable of {held.total:,} in {held.tars} tars",
        *held.notes,
        *_augmentation(run),
        *(f"left out: {count:,}, {reason}" for reason, count in held.left_out.items() if count),
        *(f"without a row: {count:,}, {how}" for how, count in held.without_row.items() if count),
        batch,
        f"{samples} = {steps / per_epoch:.1f} epochs of {per_epoch:,} whole batches",
    ]


def _augmentation(run: TrainConfig) -> list[str]:
    options = ((f.name, getattr(run.data.augment, f.name), f.default) for f in fields(Augment))
    made = [f"{name} {value:g}" for name, value, default in options if value != default]
    if run.data.crop_scale < 1:
        made.insert(0, f"crops of {run.data.crop_scale:g} to 1 of the area")
    cached = run.towers_of("cache")
    unseen = f"; the rows of {', '.join(cached)} are of pictures without" if cached and made else ""
    return [f"augmentation: {', '.join(made)}{unseen}"] if made else []


def _towers(
    run: TrainConfig, model: TowerModel, costs: Mapping[str, TowerCost], teachers: Mapping[str, TeacherCost]
) -> list[str]:
    lines = []
    for name, tower in run.towers.items():
        if isinstance(tower, CacheTower):
            teacher = teachers[name]
            read = f"{teacher.dim:,} features = {teacher.row_bytes:,} bytes a sample read from {tower.path}"
            saved = "" if teacher.flops is None else f"; {flop(teacher.flops)} a sample less than with the live teacher"
            lines.append(f"tower {name}: {teacher.backbone}, {read}, no forward passes{saved}")
            continue
        cost = costs[name]
        what = tower.model if isinstance(tower, ImageTower) else f"text, {tower.depth} blocks of width {tower.width}"
        traits = [f"{cost.parameters:,} parameters", f"{flop(cost.flops)} forward a sample"]
        if cost.shared:
            traits.insert(1, f"{cost.shared:,} of them shared with another tower")
        traits += [f"from {tower.init}"] * (tower.init is not None) + ["frozen"] * tower.frozen
        lines.append(f"tower {name}: {what}, {', '.join(traits)}")
    every, trained = parameters(model), parameters(model, trained=True)
    return [
        *lines,
        f"heads: {parameters(model.heads):,} parameters",
        f"model: {every:,} parameters, each counted once; {trained:,} trained",
    ]


def _terms(run: TrainConfig, model: TowerModel) -> list[str]:
    terms = ", ".join(
        f"{t.weight:g} x {name} ({t.x}, {t.y}; {run.loss.kind if t.kind == 'contrastive' else t.kind})"
        for name, t in run.terms.items()
    )
    return [f"terms: {terms}", f"scales: {', '.join(run.scales()) or 'none'}"]


def _compute(
    run: TrainConfig, model: TowerModel, costs: Mapping[str, TowerCost], teachers: Mapping[str, TeacherCost], steps: int
) -> list[str]:
    towers = training_flops(model, costs)
    loss = loss_flops(run, model.widths)
    total = towers + loss
    contrastive = [term for term in run.terms.values() if term.kind == "contrastive"]
    products = (
        f"{len(contrastive)} terms x {LOSS_PRODUCTS[run.loss.kind]} products of 2 x {run.global_batch_size:,} x width"
    )
    lines = [
        f"FLOPs a sample: towers and heads, forward and backward, {flop(towers)} + loss {flop(loss)} ({products}) "
        f"= {flop(total)}; the run {total * steps * run.global_batch_size:.2e}"
    ]
    live = sum(teacher.flops or 0 for teacher in teachers.values())
    if live:
        lines.append(
            f"with live teachers a sample would cost {flop(total + live)}: {1 + live / total:.2f} times as much"
        )
    return lines


def _memory(run: TrainConfig, model: TowerModel, world_size: int) -> list[str]:
    memory = state_memory(run, model, world_size)
    at_once = min(run.global_batch_size // world_size, run.engine.micro_batch_size or run.global_batch_size)
    if run.engine.activation_checkpointing:
        activations = "activations recomputed, not estimated"
    else:
        each = activation_bytes(model)
        activations = f"activations {at_once:,} x {size(each)} = {size(at_once * each)}"
    return [
        f"memory of a rank: weights {size(memory.weights)} + gradients {size(memory.gradients)} + {run.optim.name} "
        f"{size(memory.optimizer)} = {size(memory.total)} (ZeRO {run.engine.zero_stage} over {world_size} ranks, "
        f"{run.engine.precision}); {activations}; buffers of communication and the loss on top",
    ]


def parameters(module: nn.Module, trained: bool = False) -> int:
    """Return the number of a module's parameters, shared ones once; of all or of those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def flop(count: float) -> str:
    """Return FLOPs in words."""
    for unit in ("", "K", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} PFLOP"


def size(count: float) -> str:
    """Return bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"

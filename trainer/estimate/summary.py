"""The summary of a run, logged before its first step: what is trained, on what, for how long, at which cost."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby

import torch
from torch import nn

from threetowers.cache.format.manifest import Manifest
from threetowers.cache.processes.world import World
from threetowers.trainer.config import Augment, CacheTower, Precision, Term, TrainConfig
from threetowers.trainer.estimate.cost import (
    TeacherCost,
    TowerCost,
    TrainingFlops,
    activation_bytes,
    meta_model,
    state_memory,
    tower_costs,
    training_flops,
)
from threetowers.trainer.estimate.loss_cost import TermCost, term_costs
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.optimizer.optimizer import rate_factors
from threetowers.trainer.optimizer.schedule import Schedule

logger = logging.getLogger(__name__)

SHOWN_RATES = 7  # of the lowest and of the highest blocks of a deep tower

ARITHMETIC: dict[Precision, str] = {
    "float32": "weights and products in float32",
    "mixed": "float32 weights, products in bfloat16",
    "bfloat16": "weights and products in bfloat16, with a float32 copy of the weights in the optimizer",
}


@dataclass(frozen=True)
class DatasetStats:
    """Number of samples in the tars: usable ones, all of them, and why some cannot be used."""

    usable: int
    total: int
    tars: int
    left_out: Mapping[str, int]  # by reason
    without_row: Mapping[str, int] = field(default_factory=dict)  # trained on without a cached row, by how
    notes: Sequence[str] = ()  # on the mixture and on how samples are read


def run_summary(
    world_size: int,
    device: torch.device,
    model: TowerModel,
    teachers: Mapping[str, TeacherCost],
    stats: DatasetStats | None,
    steps: int,
) -> list[str]:
    """Return the summary of a run, line by line.

    Args:
        world_size: Number of ranks.
        device: Of each rank.
        model: From `meta_model`.
        teachers: By cached tower.
        stats: None where the tars are not available.
        steps: Of the run.
    """
    config = model.config
    costs = tower_costs(model)
    terms = term_costs(model, world_size)
    return [
        f"run {config.output_dir}",
        *_data(config, world_size, device, stats, steps),
        *_towers(config, model, costs, teachers),
        *_terms(config, terms),
        *_learning_rate(config, stats, steps),
        _arithmetic(config, device),
        *_compute(config, model, costs, terms, teachers, steps),
        *_memory(config, model, terms, world_size),
    ]


def summary_or_reason(
    config: TrainConfig,
    world: World,
    vocab_size: int | None,
    manifests: Mapping[str, Manifest],
    stats: DatasetStats,
    steps: int,
) -> tuple[list[str], TrainingFlops | None]:
    """Return the summary of a run that is about to begin, and its FLOPs a sample, None where they are not counted.

    It is arithmetic for the reader: whatever goes wrong in it costs lines of the summary, with a warning, but no run.

    Args:
        config: The run.
        world: Of the launch.
        vocab_size: Rows of the token embedding.
        manifests: Of the caches, by tower.
        stats: Of the tars.
        steps: Of the run.
    """
    try:
        teachers = {name: TeacherCost.from_manifest(manifest) for name, manifest in manifests.items()}
        model = meta_model(config, vocab_size, teachers)
        lines = run_summary(world.size, world.device, model, teachers, stats, steps)
        flops = TrainingFlops(model, tower_costs(model))
        return lines, flops if flops.of(config.data.context_length) is not None else None
    except Exception as error:  # a model's own code may raise anything where it is run without numbers
        logger.warning("costs of the run: not counted (%s: %s)", type(error).__name__, error)
        return [f"run {config.output_dir}", *_data(config, world.size, world.device, stats, steps)], None


def _data(
    config: TrainConfig, world_size: int, device: torch.device, stats: DatasetStats | None, steps: int
) -> list[str]:
    total = config.global_batch_size
    micro_batch = config.engine.micro_batch_size
    micro_batches = "" if micro_batch is None else f", {micro_batch:,} at a time"
    local = f"{total // world_size:,} on each of {world_size} ranks ({device.type})"
    batch = f"batch: {local}{micro_batches} = {total:,}"
    length = f"steps: {steps:,} x {total:,} = {steps * total:,} samples"
    if stats is None:
        return ["samples: unknown, the tars are not available", batch, length]
    per_epoch = max(1, stats.usable // total)
    return [
        f"samples: {stats.usable:,} usable of {stats.total:,} in {stats.tars} tars",
        *stats.notes,
        *_augmentation(config),
        *(f"left out: {count:,}, {reason}" for reason, count in stats.left_out.items() if count),
        *(f"without a row: {count:,}, {how}" for how, count in stats.without_row.items() if count),
        batch,
        f"{length} = {steps / per_epoch:.1f} epochs of {per_epoch:,} complete batches",
    ]


def _augmentation(config: TrainConfig) -> list[str]:
    changes = []
    if config.data.crop_scale < 1:
        changes.append(f"crops of {config.data.crop_scale:g} to 1 of the area")
    for option in fields(Augment):
        value = getattr(config.data.augment, option.name)
        if value != option.default:
            changes.append(f"{option.name} {value:g}")
    if not changes:
        return []
    cached = [name for name in config.towers_reading("rows") if config.side_of(name) == "image"]
    without = f"; the rows of {', '.join(cached)} are of images without it" if cached else ""
    return [f"augmentation: {', '.join(changes)}{without}"]


def _towers(
    config: TrainConfig, model: TowerModel, costs: Mapping[str, TowerCost], teachers: Mapping[str, TeacherCost]
) -> list[str]:
    lines = []
    for name, tower in config.towers.items():
        if isinstance(tower, CacheTower):
            teacher = teachers[name]
            of = "the drawn caption" if tower.of == "text" else "the image"
            rows = f"{teacher.dim:,} features of {of} = {teacher.row_bytes:,} bytes a sample read from {tower.path}"
            saved = ""  # of text: the length of captions is not known
            if tower.of == "image" and teacher.flops is not None:
                saved = f"; {flop(teacher.flops)} a sample less than with the live teacher"
            elif tower.of == "image":
                saved = "; FLOPs of the live teacher not counted"
            lines.append(f"tower {name}: {teacher.encoder}, {rows}, no forward passes{saved}")
            continue
        cost = costs[name]
        traits = [f"{cost.parameters:,} parameters"]
        if cost.shared:
            traits.append(f"{cost.shared:,} of them shared with another tower")
        traits.append(f"{_counted(cost.flops)} forward a sample")
        if tower.origin is not None:
            traits.append(tower.origin)
        if name in model.frozen:
            traits.append("frozen")
        lines.append(f"tower {name}: {tower.description}, {', '.join(traits)}")
        lines += _rates_by_layer(config, model, name)
    return [
        *lines,
        f"heads: {num_parameters(model.heads):,} parameters",
        f"model: {num_parameters(model):,} parameters, each counted once; "
        f"{num_parameters(model, trained=True):,} trained",
    ]


def _rates_by_layer(config: TrainConfig, model: TowerModel, name: str) -> list[str]:
    """Return the factors of the learning rate in the layers of a tower, where these differ."""
    tower = config.towers[name]
    if isinstance(tower, CacheTower) or (tower.trainable_blocks is None and tower.layer_decay == 1):
        return []
    factors = rate_factors(model, config.optim)
    layers = model.layers_of(name, "layer_decay")
    of_layer: dict[int, set[float]] = {}
    for parameter, number in layers.numbers.items():
        of_layer.setdefault(number, set()).add(factors[f"towers.{name}.{parameter}"])
    rates = ["/".join(f"{factor:.3g}" for factor in sorted(of_layer[number])) for number in sorted(of_layer)]
    blocks = [
        rate if count == 1 else f"{count} x {rate}"
        for rate, count in ((rate, len(list(equal))) for rate, equal in groupby(rates[1 : layers.above]))
    ]
    if len(blocks) > 2 * SHOWN_RATES:
        blocks = [*blocks[:SHOWN_RATES], "...", *blocks[-SHOWN_RATES:]]
    parts = [f"before its blocks {rates[0]}", f"{', '.join(blocks)} in {layers.blocks} blocks"]
    if layers.above in of_layer:
        parts.append(f"behind them {rates[layers.above]}")
    return [f"learning rates of {name}, as factors: {'; '.join(parts)}"]


def _terms(config: TrainConfig, costs: Mapping[str, TermCost]) -> list[str]:
    lines = []
    for name, term in config.terms.items():
        parts = [f"term {name}: {term.weight:g} x {term.kind} of ({term.x}, {term.y})"]
        if term.teachers:
            parts.append(f"taught by {_teachers_of(term)}")
        if term.has_scale:
            cost = costs[name]
            parts.append(f"scale {term.scale}, {config.loss.kind}")
            parts.append(f"{cost.passes:.3g} passes = {flop(cost.flops)} a sample")
            parts.append(f"columns and gradients {size(cost.feature_bytes)}, kept tiles {size(cost.tile_bytes)}")
        lines.append("; ".join(parts))
    return lines


def _teachers_of(term: Term) -> str:
    total = sum(teacher.weight for teacher in term.teachers.values())
    share = 1 - term.hard_weight
    taught = [
        f"{share * teacher.weight / total:.0%} {name} ({teacher.x}, {teacher.y}) at {teacher.temperature}"
        for name, teacher in term.teachers.items()
    ]
    if term.hard_weight:
        taught.append(f"{term.hard_weight:.0%} own pairs")
    dropped = f", each left out of {term.left_out_share:.0%} of the steps" if term.left_out_share else ""
    return ", ".join(taught) + dropped


def _learning_rate(config: TrainConfig, stats: DatasetStats | None, steps: int) -> list[str]:
    if stats is None:  # the steps of a span in epochs are unknown
        return []
    schedule = Schedule.of(config.optim, steps, stats.usable, config.global_batch_size)
    cooldown = f", cooldown {schedule.cooldown:,}" if schedule.cooldown else ""
    spans = f"warm-up {schedule.warmup:,} of {steps:,} steps{cooldown}"
    return [
        f"learning rate: {config.optim.lr:g}, {config.optim.schedule}, {spans}",
        *(f"warning: {problem}" for problem in schedule.problems()),
    ]


def _arithmetic(config: TrainConfig, device: torch.device) -> str:
    """Return in what numbers the run computes, and what is compiled."""
    precision = config.engine.precision or "float32"
    parts = [f"precision: {precision} ({ARITHMETIC[precision]})"]
    if device.type == "cuda":
        parts.append("float32 products in TF32, convolutions by cuDNN's fastest algorithm")
    if config.engine.compile:
        parts.append(f"compiled: {config.engine.compile}")
    return "; ".join(parts)


def _compute(
    config: TrainConfig,
    model: TowerModel,
    costs: Mapping[str, TowerCost],
    terms: Mapping[str, TermCost],
    teachers: Mapping[str, TeacherCost],
    steps: int,
) -> list[str]:
    towers = training_flops(model, costs)
    loss = sum(cost.flops for cost in terms.values())
    parts = (
        f"FLOPs a sample: towers and heads, forward and backward, {_counted(towers)} + loss {flop(loss)} (passes of "
        f"2 x {config.global_batch_size:,} x width)"
    )
    if towers is None:
        return [parts]
    total = towers + loss
    lines = [f"{parts} = {flop(total)}; the run {total * steps * config.global_batch_size:.2e}"]
    live = sum(teacher.flops or 0 for teacher in teachers.values())
    if live:
        lines.append(
            f"with live teachers a sample would cost {flop(total + live)}: {1 + live / total:.2f} times as much"
        )
    return lines


def _memory(config: TrainConfig, model: TowerModel, terms: Mapping[str, TermCost], world_size: int) -> list[str]:
    memory = state_memory(config, model, world_size)
    loss = sum(cost.feature_bytes + cost.tile_bytes for cost in terms.values())
    local = config.global_batch_size // world_size
    if config.engine.activation_checkpointing:
        activations = "activations recomputed, not estimated"
    else:
        samples = min(local, config.engine.micro_batch_size or local)
        each = activation_bytes(model)
        activations = "activations not counted"
        if each is not None:
            activations = f"activations {samples:,} x {size(each)} = {size(samples * each)}"
    return [
        f"memory of a rank: weights {size(memory.weights)} + gradients {size(memory.gradients)} + {config.optim.name} "
        f"{size(memory.optimizer)} = {size(memory.total)} (ZeRO {config.engine.zero_stage} over {world_size} ranks, "
        f"{config.engine.precision}); {activations}; loss {size(loss)}; communication buffers come on top",
    ]


def num_parameters(module: nn.Module, trained: bool = False) -> int:
    """Return the number of a module's parameters, shared ones once; of all, or of those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _counted(count: int | None) -> str:
    return "FLOPs not counted" if count is None else flop(count)


def flop(count: float) -> str:
    """Return a number of FLOPs as text, in the fitting unit."""
    for unit in ("", "K", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} PFLOP"


def size(count: float) -> str:
    """Return a number of bytes as text, in the fitting unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"

"""The start-up page: the arithmetic of a run, before its first step."""

from torch import nn

from threetowers.trainer.config import CacheTower, Run
from threetowers.trainer.data.samples import SampleSet
from threetowers.trainer.engine import Ranks
from threetowers.trainer.towers.model import TowerModel


def startup_page(
    run: Run, ranks: Ranks, samples: SampleSet, model: TowerModel, steps: int, steps_per_epoch: int
) -> list[str]:
    """Return the lines that say what will be trained, on what, for how long."""
    lines = [
        f"run {run.out}",
        f"samples: {len(samples):,} usable of {samples.total:,} in {len(samples.tars)} tars",
        *(f"left out: {count:,}, {reason}" for reason, count in samples.left_out.items() if count),
        f"batch: {run.batch // ranks.world:,} on each of {ranks.world} ranks ({ranks.device.type}) = {run.batch:,}",
        f"steps: {steps:,} x {run.batch:,} = {steps * run.batch:,} examples "
        f"= {steps / steps_per_epoch:.1f} epochs of {steps_per_epoch:,} whole batches",
    ]
    for name, tower in run.towers.items():
        if isinstance(tower, CacheTower):
            contract = samples.caches[name].cache.contract
            read = f"{contract.dim} features a sample read from {tower.path}, no forward passes"
            lines.append(f"tower {name}: {contract.backbone}, {read}")
        else:
            lines.append(f"tower {name}: {_parameters(model.towers[name]):,} parameters")
    terms = ", ".join(f"{term.weight:g} x {name} ({term.x}, {term.y})" for name, term in run.terms.items())
    return [
        *lines,
        f"heads: {_parameters(model.heads):,} parameters",
        f"terms: {terms}; {run.loss.family}",
        f"DeepSpeed: ZeRO stage {run.engine.zero_stage}, {run.engine.precision}",
    ]


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

"""The objective: a weighted sum of contrastive pair terms over the global batch."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from threetowers.kernels import Pair, PairResult, contrastive_losses
from threetowers.trainer.config import Run
from threetowers.trainer.towers.model import Outputs


@dataclass(frozen=True)
class TermResult:
    """One pair term over the global batch: detached scalars."""

    loss: Tensor
    accuracy: Tensor
    scale: Tensor


def objective(
    run: Run,
    outputs: Outputs,
    concepts_b: Tensor | None,
    group: ProcessGroup | None = None,
    *,
    present: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, TermResult]]:
    """Return the loss to minimise (a scalar) and what each term gave, by name.

    Three Towers: with heads f, g, f_h, g_h, h_f, h_g and weights 1/3 this is the mean of the image-text, image-third
    and text-third InfoNCE losses, each over all samples of all ranks. Samples with equal `concepts_b` (b,) int64 are no
    negatives of each other; None: every other sample is a negative. Accuracy is the mean over both directions of the
    share of samples whose partner beats every negative.

    `present` (b,) bool, by tower, says which samples have that tower at all; on every rank it names the same towers. A
    term is the loss over the samples that have both its towers, as if there were no others. Where no sample of any rank
    has them, the term's loss is 0 and its accuracy NaN.
    """
    present = present or {}
    pairs = {
        name: Pair(
            outputs.embeddings[term.x],
            outputs.embeddings[term.y],
            outputs.log_scales[term.scale],
            outputs.biases.get(term.scale),
        )
        for name, term in run.terms.items()
    }
    results: dict[str, PairResult] = {}
    for towers, names in _by_towers(run, present).items():
        some, ids_b = {name: pairs[name] for name in names}, concepts_b
        if towers:
            has_b = torch.stack([present[tower] for tower in towers]).all(0)
            if not _any_rank(has_b, group):
                results |= {name: _nothing(pair) for name, pair in some.items()}
                continue
            some = {name: pair._replace(x=pair.x[has_b], y=pair.y[has_b]) for name, pair in some.items()}
            ids_b = None if concepts_b is None else concepts_b[has_b]
        found = contrastive_losses(
            list(some.values()),
            family=run.loss.family,
            sample_ids=ids_b,
            process_group=group,
            workspace_bytes=run.loss.workspace * len(some) * 2**20,
        )
        results |= dict(zip(some, found, strict=True))
    total = sum(term.weight * results[name].loss for name, term in run.terms.items())
    report = {
        name: TermResult(
            loss=results[name].loss.detach(),
            accuracy=(results[name].accuracy_xy + results[name].accuracy_yx) / 2,
            scale=pair.log_scale.detach().exp(),
        )
        for name, pair in pairs.items()
    }
    assert isinstance(total, Tensor)
    return total, report


def _by_towers(run: Run, present: Mapping[str, Tensor]) -> dict[tuple[str, ...], list[str]]:
    """Names of the terms, by those of their towers that some samples may lack; the same on all ranks."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, term in run.terms.items():
        towers = {run.root_of(term.x), run.root_of(term.y)} & present.keys()
        groups.setdefault(tuple(sorted(towers)), []).append(name)
    return groups


def _any_rank(has_b: Tensor, group: ProcessGroup | None) -> bool:
    found = has_b.any().to(torch.int32)
    if distributed.is_initialized():
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=group)
    return bool(found)


def _nothing(pair: Pair) -> PairResult:
    """A loss of 0 that reaches every parameter, so that the ranks' backward passes stay alike."""
    parts = [part.sum() * 0 for part in (pair.x, pair.y, pair.log_scale, pair.bias) if part is not None]
    nan = torch.full_like(pair.log_scale.detach().sum(), torch.nan)
    return PairResult(torch.stack([part.to(parts[0].dtype) for part in parts]).sum(), nan, nan)

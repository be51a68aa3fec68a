"""The objective: a weighted sum of pair terms over the global batch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from threetowers.kernels import Pair, contrastive_losses
from threetowers.trainer.config import Term, TrainConfig
from threetowers.trainer.model.model import Outputs
from threetowers.trainer.transfer import transfer_loss


@dataclass(frozen=True)
class TermResult:
    """One pair term over the global batch: detached scalars. An l2 term has no accuracy and no scale."""

    loss: Tensor
    accuracy: Tensor | None
    scale: Tensor | None

    def metrics(self) -> dict[str, float]:
        """What the term has, by name."""
        parts = {"loss": self.loss, "accuracy": self.accuracy, "scale": self.scale}
        return {name: float(value) for name, value in parts.items() if value is not None}


def objective(
    run: TrainConfig,
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
    losses: dict[str, Tensor] = {}
    accuracies: dict[str, Tensor] = {}
    for (kind, towers), names in _groups(run, present).items():
        pairs, ids_b = {name: _pair(run.terms[name], outputs) for name in names}, concepts_b
        if towers:
            has_b = torch.stack([present[tower] for tower in towers]).all(0)
            if not _any_rank(has_b, group):
                losses |= {name: _nothing(pair) for name, pair in pairs.items()}
                accuracies |= {name: torch.full_like(losses[name].detach(), torch.nan) for name in names}
                continue
            pairs = {name: pair._replace(x=pair.x[has_b], y=pair.y[has_b]) for name, pair in pairs.items()}
            ids_b = None if concepts_b is None else concepts_b[has_b]
        if kind == "l2":
            losses |= {name: transfer_loss(pair.x, pair.y, group) for name, pair in pairs.items()}
            continue
        found = contrastive_losses(
            list(pairs.values()),
            kind=run.loss.kind,
            group_ids=ids_b,
            logit_cache_bytes=run.loss.logit_cache_mib * len(pairs) * 2**20,
        )
        losses |= {name: result.loss for name, result in zip(pairs, found, strict=True)}
        accuracies |= {n: (r.accuracy_xy + r.accuracy_yx) / 2 for n, r in zip(pairs, found, strict=True)}
    total = sum(term.weight * losses[name] for name, term in run.terms.items())
    report = {
        name: TermResult(losses[name].detach(), accuracies[name], outputs.log_scales[term.scale].detach().exp())
        if term.kind == "contrastive"
        else TermResult(losses[name].detach(), None, None)
        for name, term in run.terms.items()
    }
    assert isinstance(total, Tensor)
    return total, report


def _pair(term: Term, outputs: Outputs) -> Pair:
    x, y = outputs.embeddings[term.x], outputs.embeddings[term.y]
    if term.kind == "l2":
        return Pair(x, y, x.new_zeros(1))
    return Pair(x, y, outputs.log_scales[term.scale], outputs.biases.get(term.scale))


def _groups(run: TrainConfig, present: Mapping[str, Tensor]) -> dict[tuple[str, tuple[str, ...]], list[str]]:
    """Names of the terms, by kind and by those of their towers that some samples may lack; the same on all ranks."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, term in run.terms.items():
        towers = {run.root_of(term.x), run.root_of(term.y)} & present.keys()
        groups.setdefault((term.kind, tuple(sorted(towers))), []).append(name)
    return groups


def _any_rank(has_b: Tensor, group: ProcessGroup | None) -> bool:
    found = has_b.any().to(torch.int32)
    if distributed.is_initialized():
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=group)
    return bool(found)


def _nothing(parts: Iterable[Tensor | None]) -> Tensor:
    """A loss of 0 that reaches every parameter, so that the ranks' backward passes stay alike."""
    return torch.stack([(part.float() * 0).sum() for part in parts if part is not None]).sum()

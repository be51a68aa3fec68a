"""The loss of a run: a weighted sum of pair terms over the global batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from threetowers.kernels import Pair, contrastive_losses
from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.trainer.config import TrainConfig
from threetowers.trainer.model.model import Outputs

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TermResult:
    """One pair term over the global batch: detached scalars on the device, the same on all ranks.

    Attributes:
        loss: Of the term, without its weight.
        accuracy: None for an l2 term.
        scale: None for an l2 term.
        fault: int32, what is wrong with the values that it was computed from (`kernels.ValueFault`); 0: nothing. None
            for an l2 term.
    """

    loss: Tensor
    accuracy: Tensor | None = None
    scale: Tensor | None = None
    fault: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """Return the values that the term has, by name."""
        values = {"loss": self.loss, "accuracy": self.accuracy, "scale": self.scale}
        return {name: value for name, value in values.items() if value is not None}


def total_loss(
    config: TrainConfig, outputs: Outputs, groups_b: Tensor | None = None, present: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, TermResult]]:
    """Return the loss to minimise, a scalar over the samples of all ranks, and each term's result by name.

    Three Towers: with heads f, g, f_h, g_h, h_f, h_g and weights 1/3 this is the mean of the image-text, image-third
    and text-third InfoNCE losses. Accuracy is the mean over both directions of the share of samples whose partner beats
    every negative. Gradients are scaled for the averaging of DDP and DeepSpeed. Collective.

    Nothing is read of the device: values that cannot be used (NaN, infinite, logits beyond floating point) make the
    total NaN, and with it every gradient; what was wrong is in the terms' results.

    Args:
        config: The run, with its terms and the kind of its loss.
        outputs: Embeddings, scales and biases of the local batch of b samples.
        groups_b: Group of each sample, (b,) int64. Samples of one group are no negatives of each other, unless
            `loss.mask_false_negatives` is off. None: every other sample is a negative.
        present: For each tower that some samples may lack, which ones have it, (b,) bool on the CPU; the same towers
            on every rank. A term is the loss over the samples that have both its towers, as if there were no others.
            Where no sample of any rank has them, the term's loss is 0 and its accuracy NaN.
    """
    present = present or {}
    if not config.loss.mask_false_negatives:
        groups_b = None
    losses: dict[str, Tensor] = {}
    accuracies: dict[str, Tensor] = {}
    faults: dict[str, Tensor] = {}

    # Terms of one kind over the same samples share their collectives.
    for (kind, towers), names in _terms_by_samples(config, present).items():
        pairs = {name: _pair(config, name, outputs) for name in names}
        group_ids = groups_b
        if towers:
            has_b = np.logical_and.reduce([present[tower].numpy() for tower in towers])
            if not _on_any_rank(has_b):
                losses |= {name: zero_loss(pair) for name, pair in pairs.items()}
                accuracies |= {name: torch.full_like(losses[name].detach(), torch.nan) for name in names}
                continue
            rows_n = _rows_on_device(has_b, next(iter(pairs.values())).x.device)
            pairs = {name: _rows_of(pair, rows_n) for name, pair in pairs.items()}
            group_ids = None if groups_b is None else groups_b.index_select(0, rows_n)
        if kind == "l2":
            losses |= {name: l2_loss(pair.x, pair.y) for name, pair in pairs.items()}
            continue
        results = contrastive_losses(
            list(pairs.values()),
            kind=config.loss.kind,
            group_ids=group_ids,
            logit_cache_bytes=config.loss.logit_cache_mib * len(pairs) * 2**20,
            ring=config.loss.ring,
            check=False,
        )
        for name, result in zip(pairs, results, strict=True):
            losses[name] = result.loss
            accuracies[name] = (result.accuracy_xy + result.accuracy_yx) / 2
            faults[name] = result.fault

    # The weighted sum, and what is reported of each term.
    total = torch.zeros((), device=next(iter(losses.values())).device)
    report = {}
    for name, term in config.terms.items():
        total = total + term.weight * losses[name]
        accuracy = scale = None
        if term.kind == "contrastive":
            accuracy = accuracies[name]
            scale = outputs.log_scales[term.scale].detach().exp().reshape(())
        report[name] = TermResult(losses[name].detach(), accuracy, scale, faults.get(name))
    return total * _one_or_nan(total.detach(), list(faults.values())), report


def _one_or_nan(total: Tensor, faults: Sequence[Tensor]) -> Tensor:
    """Return NaN where a loss cannot be used, else 1: what a loss is multiplied by, its gradients are too."""
    usable = total.isfinite()
    for fault in faults:
        usable = usable & (fault == 0)
    return torch.full_like(total, torch.nan).masked_fill_(usable, 1.0)


def _terms_by_samples(
    config: TrainConfig, present: Mapping[str, Tensor]
) -> dict[tuple[str, tuple[str, ...]], list[str]]:
    """Return the terms by kind and by those of their towers that some samples may lack; the same on all ranks."""
    terms: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, term in config.terms.items():
        towers = {config.root_of(term.x), config.root_of(term.y)} & present.keys()
        terms.setdefault((term.kind, tuple(sorted(towers))), []).append(name)
    return terms


def _pair(config: TrainConfig, name: str, outputs: Outputs) -> Pair:
    term = config.terms[name]
    x_bD = outputs.embeddings[term.x]
    y_bD = outputs.embeddings[term.y]
    if term.kind == "l2":
        return Pair(x_bD, y_bD, x_bD.new_zeros(1))
    return Pair(x_bD, y_bD, outputs.log_scales[term.scale], outputs.biases.get(term.scale))


def _on_any_rank(has_b: BoolArray) -> bool:
    """Return whether any rank has such a sample; between hosts, without a look at the device. Collective."""
    found_W1 = RankGroup().gather_on_host(torch.from_numpy(has_b.any(keepdims=True).astype(np.int64)))
    return bool(found_W1.numpy().any())


def _rows_on_device(has_b: BoolArray, device: torch.device) -> Tensor:
    """Return the numbers of the samples that are marked, found on the host: to find them on the device is to wait."""
    rows_n = torch.from_numpy(np.flatnonzero(has_b))
    if device.type == "cuda":
        rows_n = rows_n.pin_memory()
    return rows_n.to(device, non_blocking=True)


def _rows_of(pair: Pair, rows_n: Tensor) -> Pair:
    return pair._replace(x=pair.x.index_select(0, rows_n), y=pair.y.index_select(0, rows_n))


def zero_loss(pair: Pair) -> Tensor:
    """Return a loss of 0 that reaches every parameter, so that all ranks make the same backward pass."""
    return torch.stack([(part.float() * 0).sum() for part in pair if part is not None]).sum()


def l2_loss(x_bD: Tensor, y_bD: Tensor) -> Tensor:
    """Return the mean of |x - y|^2 over the samples of all ranks, a float32 scalar; 2 - 2 cos for unit-norm features.

    It pulls features onto each other directly, without negatives. The value is the same on all ranks. Gradients are
    scaled for the averaging of DDP and DeepSpeed: averaged over ranks, they are those of one process with the joined
    batch, also when local batches differ. At least one rank must have a sample. Collective.
    """
    total = (x_bD.float() - y_bD.float()).square().sum()
    if not distributed.is_initialized():
        return total / len(x_bD)
    sums = torch.stack([total.detach(), torch.full_like(total.detach(), len(x_bD))])
    distributed.all_reduce(sums)
    local = total * (distributed.get_world_size() / sums[1])
    return (local - local.detach()) + sums[0] / sums[1]

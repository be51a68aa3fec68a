"""The loss of a run: a weighted sum of pair terms over the global batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from threetowers.kernels import DistillationPair, Pair, PairResult, contrastive_losses, distillation_losses
from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.trainer.config import Pairing, Term, TrainConfig
from threetowers.trainer.loss.matching import matching_loss
from threetowers.trainer.loss.rows import BoolArray, TermRows
from threetowers.trainer.loss.teachers import step_teachers
from threetowers.trainer.model.model import Outputs


@dataclass(frozen=True)
class TermResult:
    """One pair term over the global batch: detached scalars on the device, the same on all ranks.

    Attributes:
        loss: Of the term, without its weight.
        accuracy: Of contrastive and distill terms; None for the others, as are the following.
        scale: The learned one.
        fault: int32, what is wrong with the values that it was computed from (`kernels.ValueFault`); 0: nothing.
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
    config: TrainConfig,
    outputs: Outputs,
    groups_b: Tensor | None = None,
    present: Mapping[str, Tensor] | None = None,
    step: int = 0,
    owner_m: Tensor | None = None,
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
            on every rank. A term is the loss over the samples that have all its towers, those of its teachers too, as
            if there were no others. Where no sample of any rank has them, the term's loss is 0 and its accuracy NaN.
        step: Number of the step, which decides what teachers are left out of it.
        owner_m: Where samples may have several captions, the sample of each, as in `Batch`: heads of text have m
            embeddings then. Those of a sample are positives of its image, all or the first (`terms.T.positives`), and
            no negatives of each other. Terms without negatives have the mean over captions.
    """
    present = present or {}
    losses: dict[str, Tensor] = {}
    accuracies: dict[str, Tensor] = {}
    faults: dict[str, Tensor] = {}

    # Terms of one kind over the same samples share their collectives.
    for group, names in _terms_by_group(config, present).items():
        has_b = None
        if group.towers:
            has_b = np.logical_and.reduce([present[tower].numpy() for tower in group.towers])
            if not _on_any_rank(has_b):
                losses |= {name: _zero_loss(_learned_parts(config.terms[name], outputs)) for name in names}
                accuracies |= {name: torch.full_like(losses[name].detach(), torch.nan) for name in names}
                continue
        rows = TermRows(config, outputs.embeddings, group.pairing, owner_m, has_b)
        if not group.has_scale:
            for name in names:
                term = config.terms[name]
                losses[name] = matching_loss(term, *_matched(config, term, group.pairing, rows))
            continue
        group_ids = groups_b if group.masks_groups else None
        if group.pairing == "texts":
            group_ids = rows.caption_groups(group_ids)
        elif group_ids is not None:
            group_ids = rows.groups(group_ids)
        compute = _loss_over_batch(config, group.kind, group.pairing, names, outputs, step, rows)
        results = compute(
            kind=config.loss.kind,
            group_ids=group_ids,
            logit_cache_bytes=config.loss.logit_cache_mib * len(names) * 2**20,
            ring=config.loss.ring,
            check=False,
        )
        for name, result in zip(names, results, strict=True):
            losses[name] = result.loss
            accuracies[name] = (result.accuracy_xy + result.accuracy_yx) / 2
            faults[name] = result.fault

    # The weighted sum, and what is reported of each term.
    total = torch.zeros((), device=next(iter(losses.values())).device)
    report = {}
    for name, term in config.terms.items():
        total = total + term.weight * losses[name]
        accuracy = scale = None
        if term.has_scale:
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


class _TermGroup(NamedTuple):
    """What terms have in common that are computed together."""

    kind: str
    has_scale: bool
    masks_groups: bool
    pairing: Pairing
    towers: tuple[str, ...]  # of theirs, those that some samples may lack


def _terms_by_group(config: TrainConfig, present: Mapping[str, Tensor]) -> dict[_TermGroup, list[str]]:
    """Return the names of the terms that are computed together; the same on all ranks."""
    groups: dict[_TermGroup, list[str]] = {}
    for name, term in config.terms.items():
        towers = set(map(config.root_of, term.all_heads)) & present.keys()
        masks_groups = term.masks_groups and config.loss.mask_false_negatives
        group = _TermGroup(term.kind, term.has_scale, masks_groups, config.pairing(term), tuple(sorted(towers)))
        groups.setdefault(group, []).append(name)
    return groups


def _loss_over_batch(
    config: TrainConfig,
    kind: str,
    pairing: Pairing,
    names: Sequence[str],
    outputs: Outputs,
    step: int,
    rows: TermRows,
) -> Callable[..., list[PairResult]]:
    """Return the loss of contrastive, or of distill terms, bound to their features but not yet to its options."""
    pairs = []
    for name in names:
        term = config.terms[name]
        heads = _image_first(config, term) if pairing == "captions" else (term.x, term.y)
        x_bD, y_mD = map(rows.take, heads)
        owner_m = rows.owner_m if pairing == "captions" else None
        pairs.append(Pair(x_bD, y_mD, outputs.log_scales[term.scale], outputs.biases.get(term.scale), owner_m))
    if kind == "contrastive":
        return partial(contrastive_losses, pairs)
    students = []
    for name, pair in zip(names, pairs, strict=True):
        teachers = step_teachers(config, name, outputs, step, rows.take)
        hard_weight = config.terms[name].hard_weight
        students.append(DistillationPair(pair.x, pair.y, pair.log_scale, teachers, pair.bias, hard_weight))
    return partial(distillation_losses, students)


def _image_first(config: TrainConfig, term: Term) -> tuple[str, str]:
    """Return the heads of a term of captions: that of the images, whose rows own captions, and that of text."""
    if config.side_of(config.root_of(term.x)) == "image":
        return term.x, term.y
    return term.y, term.x


def _matched(config: TrainConfig, term: Term, pairing: Pairing, rows: TermRows) -> tuple[Tensor, Tensor]:
    """Return the embeddings of a term without negatives, row by row; those of an image once for each caption."""
    if pairing != "captions":
        return rows.take(term.x), rows.take(term.y)
    assert rows.owner_m is not None
    image, text = _image_first(config, term)
    return rows.take(image).index_select(0, rows.owner_m), rows.take(text)


def _on_any_rank(has_b: BoolArray) -> bool:
    """Return whether any rank has such a sample; between hosts, without a look at the device. Collective."""
    found_W1 = RankGroup().gather_on_host(torch.from_numpy(has_b.any(keepdims=True).astype(np.int64)))
    return bool(found_W1.numpy().any())


def _learned_parts(term: Term, outputs: Outputs) -> list[Tensor]:
    """Return what a term has a gradient of."""
    parts = [outputs.embeddings[term.x], outputs.embeddings[term.y]]
    if term.has_scale:
        parts.append(outputs.log_scales[term.scale])
        parts += [outputs.biases[term.scale]] if term.scale in outputs.biases else []
    return parts


def _zero_loss(parts: Sequence[Tensor]) -> Tensor:
    """Return a loss of 0 that reaches every parameter, so that all ranks make the same backward pass."""
    return torch.stack([(part.float() * 0).sum() for part in parts]).sum()

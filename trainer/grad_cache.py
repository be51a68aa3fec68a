"""The gradients of one optimizer step, for a local batch of any size in the memory of one micro-batch.

A contrastive loss needs the embeddings of the complete global batch, but not the activations behind them. GradCache
(Gao et al. 2021, arXiv 2101.06983) therefore embeds all micro-batches without a graph; computes the loss and its
gradients with respect to embeddings, scales and biases; then runs each micro-batch again, with the same dropout, and
sends these gradients through it. This is exact, for the learned temperature too: it enters the loss once, not once a
micro-batch.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from threetowers.kernels import describe_fault
from threetowers.trainer.loss import TermResult
from threetowers.trainer.model.model import Outputs, TowerModel
from threetowers.trainer.model.running_moments import running_moments_kept

LossFunction = Callable[
    [Outputs, Tensor | None, Mapping[str, Tensor], int, Tensor | None], tuple[Tensor, dict[str, TermResult]]
]


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of a local batch.

    Attributes:
        inputs: One tensor a tower.
        rows: By tower, where they lie in the inputs of the local batch.
    """

    inputs: dict[str, Tensor]
    rows: dict[str, slice]


@dataclass(frozen=True)
class StepResult:
    """What one step computed, on the device: nothing of it is read before it is asked for.

    Attributes:
        loss: Over the global batch, 0-d, the same on all ranks; NaN where it cannot be used, as all gradients then are.
        terms: Each term's part in it, by name.
        embeddings: Of the local batch (b, D), by head.
    """

    loss: Tensor
    terms: Mapping[str, TermResult]
    embeddings: Mapping[str, Tensor]

    def metrics(self) -> dict[str, Tensor]:
        """Return the values of the terms, as the metrics name them."""
        return {
            f"terms/{name}/{key}": value for name, term in self.terms.items() for key, value in term.metrics().items()
        }

    def nonfinite(self) -> tuple[str, ...]:
        """Name what makes the loss nonfinite, the same on all ranks; nothing where it is finite.

        That is the heads with a nonfinite embedding on any rank; or else the terms with a nonfinite loss, or with
        values that it cannot be computed from. Collective; with a host wait for each of them.
        """
        found = torch.stack([~embedding_bD.isfinite().all() for embedding_bD in self.embeddings.values()]).int()
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        if found.any():
            return tuple(f"embeddings {name}" for name, bad in zip(self.embeddings, found.tolist(), strict=True) if bad)
        if self.loss.isfinite():
            return ()
        names = []
        for name, term in self.terms.items():
            if term.fault:
                names.append(f"loss of {name}: {describe_fault(int(term.fault))}")
            elif not term.loss.isfinite():
                names.append(f"loss of {name} = {float(term.loss):g}")
        return tuple(names) or (f"loss = {float(self.loss):g}",)


class GradCache:
    """Computes the gradients of a loss over the global batch, one micro-batch of a rank at a time.

    Batch norm's statistics are those of a micro-batch; its running moments take each micro-batch once.
    """

    def __init__(
        self,
        engine: Any,
        loss_fn: LossFunction,
        num_micro_batches: int,
        *,
        seed: int,
        rank: int,
        device: torch.device,
    ) -> None:
        """Bind an engine to a loss.

        Args:
            engine: DeepSpeed's engine of a `TowerModel`.
            loss_fn: Maps embeddings of the local batch, group ids (b,) or None, which samples have which tower, the
                step, and the sample of each caption (m,) or None, to the loss over the global batch, scaled for
                averaging over ranks, and its terms.
            num_micro_batches: Into how many parts the local batch is split; the same on all ranks. 1: one pass.
            seed: The run's seed: dropout is a function of (seed, step, rank, micro-batch), also in a resumed run.
            rank: Of this process.
            device: Of the engine.
        """
        self.engine = engine
        self.loss_fn = loss_fn
        self.num_micro_batches = num_micro_batches
        self.seed = seed
        self.rank = rank
        self.device = device

    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        step: int,
        groups_b: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
        owner_m: Tensor | None = None,
    ) -> StepResult:
        """Leave the gradients of the step in the engine and return its loss, without a host wait. Collective.

        Args:
            inputs: One tensor of b samples a tower, on the engine's device; from another one they are copied as they
                are used, in micro-batches twice.
            step: Number of the step; seeds dropout of features and of teachers.
            groups_b: Group of each sample (b,) int64; samples of one group are no negatives of each other.
            present: For each tower that some samples may lack, which ones have it, (b,) bool on the CPU.
            owner_m: Where samples may have several captions, the sample of each, as in `Batch`. Towers of text then
                have m inputs, and a micro-batch has all captions of its samples.

        Raises:
            ValueError: For fewer samples than micro-batches.
        """
        config = self.engine.module.config
        owners = {} if owner_m is None else {name: owner_m for name in inputs if config.side_of(name) == "text"}
        micro_batches = split(inputs, self.num_micro_batches, owners)
        groups_b = None if groups_b is None else groups_b.to(self.device, non_blocking=True)

        # Forward: with a graph in one pass, without one where the micro-batches run again in backward.
        if len(micro_batches) == 1:
            outputs = self._forward(micro_batches[0].inputs, step, 0)
        else:
            with torch.no_grad(), running_moments_kept(self.engine.module):
                parts = [self._forward(part.inputs, step, number) for number, part in enumerate(micro_batches)]
            outputs = join(parts, learning_heads(self.engine.module))
            del parts

        # The loss over the global batch.
        loss, terms = self.loss_fn(outputs, groups_b, present or {}, step, owner_m)
        embeddings = {name: embedding_bD.detach() for name, embedding_bD in outputs.embeddings.items()}
        result = StepResult(loss.detach(), terms, embeddings)

        # Backward.
        if len(micro_batches) == 1:
            self._backward(loss)
            return result
        leaves = {key: tensor for key, tensor in _named_tensors(outputs) if tensor.requires_grad}
        # Not backward(): parameters take no part in this, and ZeRO must not count it as a pass over them.
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        del outputs, loss, leaves  # frees the loss's graph before the first micro-batch is embedded again
        for number, micro_batch in enumerate(micro_batches):
            outputs = self._forward(micro_batch.inputs, step, number)
            rows = {name: micro_batch.rows[config.root_of(name)] for name in outputs.embeddings}
            self._backward(_surrogate_loss(outputs, grads, rows, shared=number == 0))
        return result

    def _forward(self, inputs: Mapping[str, Tensor], step: int, number: int) -> Outputs:
        seed_dropout(self.seed, step, self.rank, number)
        outputs: Outputs = self.engine({name: part.to(self.device, non_blocking=True) for name, part in inputs.items()})
        return outputs

    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the engine's."""
        # Checkpointed blocks run forward again in here, and their batch norms have counted this batch already.
        module = self.engine.module
        with running_moments_kept(module, enabled=module.config.engine.activation_checkpointing):
            self.engine.backward(loss)


def seed_dropout(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Seed torch by (seed, step, rank, micro-batch), so that a repeated forward pass draws the same dropout."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1, np.uint64)[0]))


def split(inputs: Mapping[str, Tensor], parts: int, owners: Mapping[str, Tensor] | None = None) -> list[MicroBatch]:
    """Return the batch in `parts` micro-batches of sizes that differ by one at most.

    Args:
        inputs: One tensor a tower.
        parts: Into how many micro-batches it is split.
        owners: For towers with several inputs a sample, the sample of each of them, (m,) int64, ascending, on the CPU.

    Raises:
        ValueError: For fewer samples than parts.
    """
    sample_of = {name: owner_m.numpy() for name, owner_m in (owners or {}).items()}
    size = next((int(sample_m[-1]) + 1 for sample_m in sample_of.values()), len(next(iter(inputs.values()))))
    if size < parts:
        raise ValueError(
            f"{size} samples cannot be split into {parts} micro-batches; raise engine.micro_batch_size or "
            "global_batch_size"
        )
    bounds = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(size), parts))])
    micro_batches = []
    for first, last in itertools.pairwise(bounds.tolist()):
        rows = {name: slice(first, last) for name in inputs}
        for name, sample_m in sample_of.items():
            rows[name] = slice(*np.searchsorted(sample_m, [first, last]).tolist())
        micro_batches.append(MicroBatch({name: tensor[rows[name]] for name, tensor in inputs.items()}, rows))
    return micro_batches


def join(parts: Sequence[Outputs], learning: set[str]) -> Outputs:
    """Return the outputs of micro-batches as those of the batch: leaves that collect gradients.

    Args:
        parts: Outputs without a graph.
        learning: Heads whose embeddings need a gradient.
    """
    embeddings = {}
    for name in parts[0].embeddings:
        joined_bD = torch.cat([part.embeddings[name] for part in parts])
        embeddings[name] = joined_bD.requires_grad_(name in learning)
    scales = {name: scale.detach().requires_grad_() for name, scale in parts[0].log_scales.items()}
    biases = {name: bias.detach().requires_grad_() for name, bias in parts[0].biases.items()}
    return Outputs(embeddings, scales, biases)


def learning_heads(model: TowerModel) -> set[str]:
    """Return the heads that stand on a trained parameter: their own, or one of what is below them."""
    modules = [*model.towers.items(), *model.heads.items()]
    learns = {name: any(p.requires_grad for p in module.parameters()) for name, module in modules}
    for name, head in model.config.heads.items():  # a head comes after the one it stands on
        learns[name] = learns[name] or learns[head.of]
    return {name for name in model.config.heads if learns[name]}


def _named_tensors(outputs: Outputs) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield everything that a loss is computed from, by (kind, name)."""
    for kind in ("embeddings", "log_scales", "biases"):
        for name, tensor in getattr(outputs, kind).items():
            yield (kind, name), tensor


def _surrogate_loss(
    outputs: Outputs, grads: Mapping[tuple[str, str], Tensor], rows: Mapping[str, slice], shared: bool
) -> Tensor:
    """Return a scalar whose gradient in a micro-batch is that of the loss.

    Args:
        outputs: Of the micro-batch.
        grads: Of the loss, for the local batch.
        rows: By head, which of the local batch's embeddings are the micro-batch's.
        shared: Whether scales and biases, which all micro-batches share, count in this one.
    """
    total = torch.zeros((), device=next(iter(outputs.embeddings.values())).device)
    for (kind, name), tensor in _named_tensors(outputs):
        if (kind, name) not in grads:
            continue
        grad = grads[kind, name]
        grad = grad[rows[name]] if kind == "embeddings" else grad * float(shared)
        total = total + (tensor * grad).sum()
    return total

"""The gradients of one optimizer step, for a local batch of any size in the memory of one chunk.

A contrastive loss needs the embeddings of the whole global batch, but not the activations behind them. So (GradCache,
Gao et al. 2021, arXiv 2101.06983): embed all chunks without a graph; compute the loss and its gradients with respect to
embeddings, scales and biases; then run each chunk again, with the same dropout, and send these gradients through it.
This is exact, for the learned temperature too: that enters the loss once, not once a chunk.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from threetowers.trainer.loss import TermResult
from threetowers.trainer.model.model import Outputs, TowerModel

Inputs = Mapping[str, Tensor]
Objective = Callable[[Outputs], tuple[Tensor, dict[str, TermResult]]]


@dataclass(frozen=True)
class Measured:
    """What a step measured. `faults`: what was not finite, the same on all ranks; gradients were then not computed."""

    loss: float
    terms: dict[str, TermResult]
    faults: tuple[str, ...] = ()


def accumulate(
    engine: Any, inputs: Inputs, objective: Objective, chunks: int, seed: Callable[[int], None], device: torch.device
) -> Measured:
    """Leave the gradients of `objective` over this rank's batch in the engine, and return what was measured.

    `inputs`: one tensor per tower, on any device; `objective`: embeddings of the whole local batch to the loss over the
    global one, scaled for averaging over ranks; `chunks`: how many parts the batch goes through in, the same on all
    ranks; `seed`: called with the number of a part before each of its passes. Batch norm's statistics are by nature
    those of a part; its running moments take each part once. Raises ValueError for fewer samples than parts.
    """
    parts = split(inputs, chunks)

    def embed(number: int) -> Outputs:
        seed(number)
        outputs: Outputs = engine({name: part.to(device, non_blocking=True) for name, part in parts[number].items()})
        return outputs

    if len(parts) == 1:
        measured, loss = measure(objective, embed(0), device)
        if loss is not None:
            engine.backward(loss)
        return measured

    with torch.no_grad(), running_moments_kept(engine.module):
        joined = join([embed(number) for number in range(len(parts))], learning_heads(engine.module))
    measured, loss = measure(objective, joined, device)
    if loss is None:
        return measured
    leaves = [leaf for _, _, leaf in tensors(joined) if leaf.requires_grad]
    # Not backward(): parameters take no part in this, and ZeRO must not believe they did.
    wanted = iter(torch.autograd.grad(loss, leaves))
    grads = {(kind, name): next(wanted) for kind, name, leaf in tensors(joined) if leaf.requires_grad}
    del joined, loss, leaves
    first = 0
    for number, part in enumerate(parts):
        outputs = embed(number)
        size = len(next(iter(part.values())))
        engine.backward(_surrogate(outputs, grads, slice(first, first + size), shared=number == 0))
        first += size
    return measured


def measure(objective: Objective, outputs: Outputs, device: torch.device) -> tuple[Measured, Tensor | None]:
    """Return the loss as numbers and as a tensor; the latter is None where something is not finite, on all ranks."""
    try:
        loss, terms = objective(outputs)
    except ValueError:  # raised on all ranks together, so that all can look for the reason together
        names = list(outputs.embeddings)
        bad = torch.stack([~outputs.embeddings[name].detach().isfinite().all() for name in names]).int().to(device)
        distributed.all_reduce(bad, distributed.ReduceOp.MAX)
        faults = tuple(f"embeddings {name}" for name, fault in zip(names, bad.tolist(), strict=True) if fault)
        if not faults:
            raise
        return Measured(float("nan"), {}, faults), None
    value = float(loss.detach())
    if torch.isfinite(loss.detach()):
        return Measured(value, terms), loss
    parts = [f"loss of {name} = {float(t.loss):g}" for name, t in terms.items() if not t.loss.isfinite()]
    return Measured(value, terms, tuple(parts) or (f"loss = {value:g}",)), None


def split(inputs: Inputs, chunks: int) -> list[dict[str, Tensor]]:
    """Return the batch in `chunks` parts of sizes that differ by one at most."""
    size = len(next(iter(inputs.values())))
    if size < chunks:
        raise ValueError(f"{size} samples cannot go through in {chunks} parts; raise engine.micro_batch_size or batch")
    cut = {name: tensor.tensor_split(chunks) for name, tensor in inputs.items()}
    return [{name: parts[number] for name, parts in cut.items()} for number in range(chunks)]


def join(outputs: Sequence[Outputs], learning: set[str]) -> Outputs:
    """Return outputs of parts as those of the whole, as leaves that collect gradients where something learns."""
    embeddings = {
        name: torch.cat([part.embeddings[name] for part in outputs]).requires_grad_(name in learning)
        for name in outputs[0].embeddings
    }
    scales = {name: scale.detach().requires_grad_() for name, scale in outputs[0].log_scales.items()}
    biases = {name: bias.detach().requires_grad_() for name, bias in outputs[0].biases.items()}
    return Outputs(embeddings, scales, biases)


def learning_heads(model: TowerModel) -> set[str]:
    """Names of the heads on whose way down to the input something has a gradient."""
    parts = [*model.towers.items(), *model.heads.items()]
    learns = {name: any(p.requires_grad for p in module.parameters()) for name, module in parts}
    for name, head in model.run.heads.items():  # a head stands on what came before it
        learns[name] = learns[name] or learns[head.of]
    return {name for name in model.run.heads if learns[name]}


def tensors(outputs: Outputs) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (kind, name, tensor) of all that a loss is computed from."""
    for kind in ("embeddings", "log_scales", "biases"):
        for name, tensor in getattr(outputs, kind).items():
            yield kind, name, tensor


def _surrogate(outputs: Outputs, grads: Mapping[tuple[str, str], Tensor], rows: slice, shared: bool) -> Tensor:
    """A scalar whose gradient is that of the loss; what all parts share (scales, biases) counts in one of them."""
    total = torch.zeros((), device=next(iter(outputs.embeddings.values())).device)
    for kind, name, tensor in tensors(outputs):
        if (kind, name) in grads:
            grad = grads[kind, name][rows] if kind == "embeddings" else grads[kind, name] * float(shared)
            total = total + (tensor * grad).sum()
    return total


@contextmanager
def running_moments_kept(model: nn.Module) -> Iterator[None]:
    """Let batch norm use a part's statistics without adding them to its running moments."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True

"""The objective: a weighted sum of contrastive pair terms over the global batch."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from threetowers.kernels import Pair, contrastive_losses
from threetowers.trainer.config import Run
from threetowers.trainer.towers.model import Outputs


@dataclass(frozen=True)
class TermResult:
    """One pair term over the global batch: detached scalars."""

    loss: Tensor
    accuracy: Tensor
    scale: Tensor


def objective(
    run: Run, outputs: Outputs, concepts_b: Tensor | None, group: ProcessGroup | None = None
) -> tuple[Tensor, dict[str, TermResult]]:
    """Return the loss to minimise (a scalar) and what each term gave, by name.

    Three Towers: with heads f, g, f_h, g_h, h_f, h_g and weights 1/3 this is the mean of the image-text, image-third
    and text-third InfoNCE losses, each over all samples of all ranks. Samples with equal `concepts_b` (b,) int64 are no
    negatives of each other; None: every other sample is a negative. Accuracy is the mean over both directions of the
    share of samples whose partner beats every negative.
    """
    pairs = [
        Pair(
            outputs.embeddings[term.x],
            outputs.embeddings[term.y],
            outputs.log_scales[term.scale],
            outputs.biases.get(term.scale),
        )
        for term in run.terms.values()
    ]
    results = contrastive_losses(
        pairs,
        family=run.loss.family,
        sample_ids=concepts_b,
        process_group=group,
        workspace_bytes=run.loss.workspace * len(pairs) * 2**20,
    )
    total = sum(term.weight * result.loss for term, result in zip(run.terms.values(), results, strict=True))
    report = {
        name: TermResult(
            loss=result.loss.detach(),
            accuracy=(result.accuracy_xy + result.accuracy_yx) / 2,
            scale=pair.log_scale.detach().exp(),
        )
        for name, pair, result in zip(run.terms, pairs, results, strict=True)
    }
    assert isinstance(total, Tensor)
    return total, report

"""The large-batch similarity matrix and the contrastive losses made of it."""

from threetowers.kernels.contrastive import Pair, PairResult, contrastive_loss, contrastive_losses
from threetowers.kernels.reference import dense_accuracies, dense_contrastive_loss

__all__ = [
    "Pair",
    "PairResult",
    "contrastive_loss",
    "contrastive_losses",
    "dense_accuracies",
    "dense_contrastive_loss",
]

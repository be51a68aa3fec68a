"""Contrastive losses over a global batch, in memory linear in the batch."""

from threetowers.kernels.contrastive import contrastive_loss, contrastive_losses
from threetowers.kernels.pair import LossKind, Pair, PairResult
from threetowers.kernels.reference import reference_accuracies, reference_contrastive_loss
from threetowers.kernels.validation import ValueFault, describe_fault

__all__ = [
    "LossKind",
    "Pair",
    "PairResult",
    "ValueFault",
    "contrastive_loss",
    "contrastive_losses",
    "describe_fault",
    "reference_accuracies",
    "reference_contrastive_loss",
]

"""Contrastive and distillation losses over a global batch, in memory linear in the batch."""

from threetowers.kernels.contrastive import contrastive_loss, contrastive_losses
from threetowers.kernels.distillation import distillation_loss, distillation_losses
from threetowers.kernels.pair import DistillationPair, LossKind, Pair, PairResult, Teacher
from threetowers.kernels.reference import (
    reference_accuracies,
    reference_contrastive_loss,
    reference_distillation_loss,
)
from threetowers.kernels.validation import ValueFault, describe_fault

__all__ = [
    "DistillationPair",
    "LossKind",
    "Pair",
    "PairResult",
    "Teacher",
    "ValueFault",
    "contrastive_loss",
    "contrastive_losses",
    "describe_fault",
    "distillation_loss",
    "distillation_losses",
    "reference_accuracies",
    "reference_contrastive_loss",
    "reference_distillation_loss",
]

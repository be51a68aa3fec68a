"""The optimizer's step, which all ranks make or none does, and all that is read of the device in a step.

A read makes the host wait until the device has done all that was given to it, and leaves it idle until the host has
given it more (a host wait). So the backward pass and the reduction of the gradients are enqueued without a look at
their results. Then one vector is summed over the ranks and read: the gradient's norm, the loss, what the ranks have to
agree on, the metrics where a log line is due. It is the only host wait of a step, and it comes before the update, so
that a step whose loss or gradient is nonfinite on any rank changes no weights on any of them.

DeepSpeed would find an overflow and the norm itself, with one host wait or more for each group of parameters. It does
neither here (see `deepspeed_config`), and clipping uses the norm that was read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from threetowers.trainer.checkpoint.partition import inner_optimizer
from threetowers.trainer.grad_cache import StepResult

NORM_OFFSET = 1e-6  # added to the norm that divides, as torch and DeepSpeed do


@dataclass(frozen=True)
class StepReport:
    """What is known of a step once it is over: the same on all ranks.

    Attributes:
        loss: Over the global batch.
        grad_norm: Of the gradient over the global batch, before clipping.
        flags: For each flag whether any rank had raised it.
        metrics: Of the terms, by name; empty where none were asked for.
        nonfinite: What was nonfinite on any rank. If there is anything, no weight was changed.
    """

    loss: float
    grad_norm: float
    flags: tuple[bool, ...]
    metrics: dict[str, float]
    nonfinite: tuple[str, ...]


class AgreedStep:
    """Makes the steps of an engine's optimizer. There can be one for an engine."""

    def __init__(self, engine: Any, clip_norm: float, device: torch.device) -> None:
        """Take the optimizer's step over.

        Args:
            engine: DeepSpeed's engine.
            clip_norm: Norm to which a longer gradient is cut; 0: none is cut.
            device: Of the engine.
        """
        self._engine = engine
        self._clip_norm = clip_norm
        self._device = device
        self._factor = 1.0  # for the gradient of the step under way
        self._asked: tuple[StepResult, Sequence[bool], bool] | None = None
        self._report: StepReport | None = None
        # The engine calls `step` of its optimizer once the gradients are reduced.
        self._update = engine.optimizer.step
        engine.optimizer.step = self._agree_and_update
        inner_optimizer(engine).register_step_pre_hook(self._clip)

    def __call__(self, result: StepResult, flags: Sequence[bool] = (), metrics: bool = False) -> StepReport:
        """Reduce the gradients and update the weights, if loss and gradients are finite on all ranks. Collective.

        Args:
            result: Of the step; its backward pass has been called.
            flags: Other things to agree on, in one order on all ranks.
            metrics: Whether to read the metrics of the terms too.
        """
        self._asked = result, flags, metrics
        self._engine.step()
        report, self._report, self._asked = self._report, None, None
        assert report is not None  # the engine has called the optimizer
        return report

    def _agree_and_update(self, closure: None = None) -> None:
        assert self._asked is not None
        report = self._report = self._agree(*self._asked)
        if report.nonfinite:
            self._discard_gradients()
            return
        if 0 < self._clip_norm < report.grad_norm + NORM_OFFSET:
            self._factor = self._clip_norm / (report.grad_norm + NORM_OFFSET)
        self._update()
        self._factor = 1.0

    def _agree(self, result: StepResult, flags: Sequence[bool], metrics: bool) -> StepReport:
        # A value that is the same on all ranks survives the sum: W float32 values add up exactly in float64.
        scalars = {name: value for name, value in result.metrics().items() if metrics}
        flags_F = torch.zeros(len(flags), dtype=torch.float64, device=self._device)
        for number, raised in enumerate(flags):
            if raised:
                flags_F[number].fill_(1.0)
        others = torch.stack([part.detach().double() for part in (self._square_sum(), result.loss, *scalars.values())])
        summed = torch.cat([others, flags_F])
        distributed.all_reduce(summed)
        values: list[float] = summed.tolist()  # the host wait

        ranks = distributed.get_world_size()
        replicated = self._engine.zero_optimization_stage() == 0
        norm = math.sqrt(values[0] / ranks if replicated else values[0])
        loss, *read = (value / ranks for value in values[1 : len(others)])
        nonfinite: tuple[str, ...] = ()
        if not (math.isfinite(norm) and math.isfinite(loss)):
            nonfinite = result.nonfinite() or self._nonfinite_gradients() or (f"norm of the gradient = {norm:g}",)
        raised_F = tuple(value > 0 for value in values[len(others) :])
        return StepReport(loss, norm, raised_F, dict(zip(scalars, read, strict=True)), nonfinite)

    def _square_sum(self) -> Tensor:
        """Return the sum of the squares of the reduced gradients that this rank holds, 0-d float64."""
        parts = self._reduced_gradients()
        if not parts:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        norms = torch.stack(torch._foreach_norm(parts, 2, torch.float32))
        return norms.double().square().sum().to(self._device)

    def _reduced_gradients(self) -> list[Tensor]:
        """Return the gradients that the optimizer is about to use: at stage 0 all of them, else this rank's share."""
        optimizer = self._engine.optimizer
        if self._engine.zero_optimization_stage() == 0:
            return [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
            flat = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_partitioned_groups_flat
            return [p.grad for p in flat if p.grad is not None]
        return [part for group in optimizer.averaged_gradients.values() for part in group]

    def _nonfinite_gradients(self) -> tuple[str, ...]:
        """Name the parameters with a nonfinite gradient. Collective; with one host wait or more a parameter."""
        from deepspeed.utils import safe_get_full_grad

        names = []
        for name, p in self._engine.module.named_parameters():
            if p.requires_grad:
                grad = safe_get_full_grad(p)
                if grad is not None and not grad.isfinite().all():
                    names.append(f"gradient of {name}")
        return tuple(names)

    def _discard_gradients(self) -> None:
        """Drop the gradients of a step in which some are nonfinite: all of them, where the loss is."""
        if self._engine.zero_optimization_stage() == 0:
            return  # the engine drops them after each step
        optimizer = self._engine.optimizer
        optimizer.check_grad_overflow = True  # then it finds them itself, and clears its buffers
        self._update()
        optimizer.check_grad_overflow = False
        assert optimizer.overflow

    def _clip(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Scale the gradients of the parameters that the optimizer is about to update, in their full precision."""
        if self._factor < 1:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(grads, self._factor)

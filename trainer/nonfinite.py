"""What all ranks must agree on before a step changes the weights: is it finite, was a stop asked for, is a save due."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed, nn


class GradientWatch:
    """Notes, as each gradient arrives, whether it is finite: after backward ZeRO has mixed and cut them."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._norms_P = torch.zeros(len(named), device=device)
        for number, (_, p) in enumerate(named):
            p.register_hook(self._noting(number))  # type: ignore[no-untyped-call]

    def _noting(self, number: int) -> Callable[[Tensor], None]:
        def note(grad: Tensor) -> None:
            self._norms_P[number] += torch.linalg.vector_norm(grad, dtype=torch.float32)

        return note

    def agree(self, flags: Sequence[bool]) -> tuple[list[str], list[bool]]:
        """Return the parameters with a gradient that was not finite on any rank, and which flags any rank has raised.

        Collective. Forgets what was noted.
        """
        raised = torch.cat([~self._norms_P.isfinite(), torch.tensor(flags, device=self._norms_P.device)]).int()
        self._norms_P.zero_()
        distributed.all_reduce(raised, distributed.ReduceOp.MAX)
        values = [bool(v) for v in raised.tolist()]
        bad = [name for name, value in zip(self._names, values, strict=False) if value]
        return bad, values[len(self._names) :]

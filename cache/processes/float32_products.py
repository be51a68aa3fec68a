"""Whether products of float32 numbers are computed as such, or rounded to fewer bits first, which GPUs do faster.

TF32 keeps 10 bits of each factor. torch's own default is exact matrix products and convolutions in TF32.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def _backends() -> list[Any]:
    """Return what computes products, each with its own setting: "ieee", "tf32", "bf16", or "none" for the default."""
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    return [torch.backends.cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv]


def allow_tf32(allowed: bool) -> None:
    """Let GPUs compute float32 matrix products and convolutions of this process in TF32, or forbid it."""
    # By torch's older names, which parts of torch itself read, and refuse to where only the newer ones were set.
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Round no factor of a float32 product, whatever the process has set, which is put back at the end."""
    backends = _backends()
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

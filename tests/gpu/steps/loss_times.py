"""The loss, forward and backward, beside its peers: milliseconds, TFLOP/s counted as 4 passes, memory.

Peers are the form of open_clip's loss, which keeps every logit (open_clip's own class where it is installed), and
torch's `linear_cross_entropy` in both directions, in versions of torch that have it.
"""

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from tests.gpu.setting import Setting
from tests.gpu.steps.loss_errors import features
from tests.gpu.tile_shapes import TILE_SHAPES, tile_shape
from tests.gpu.timing import milliseconds, peak_gib
from threetowers.kernels import contrastive_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
DENSE_LIMIT = 32768  # rows above which the peers' logits do not fit beside what they need of them


def run(setting: Setting) -> None:
    sizes = [(96, 16, 2)] if setting.rehearse else [(4096, 512, 6), (16384, 768, 6), (32768, 768, 6), (65536, 768, 4)]
    for batch, width, rounds in sizes:
        compare(setting, batch, width, rounds)
    if setting.gpu_only("the loss by tile shape"):
        for shape in TILE_SHAPES:
            with tile_shape(shape):
                compare(setting, 65536, 768, 3, f", {shape}")
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        setting.skip("torch linear_cross_entropy", f"torch {torch.__version__} has none")


def compare(setting: Setting, batch: int, width: int, rounds: int, remark: str = "") -> None:
    """Record every loss's median time, measured in turns, and its memory; `remark` ends the figures' names."""
    x_BD, y_BD = (z_BD.requires_grad_() for z_BD in features(batch, width, torch.bfloat16, setting.device))
    log_scale = torch.tensor([math.log(50.0)], device=setting.device, requires_grad=True)
    leaves = [x_BD, y_BD, log_scale]
    named = losses(dense=batch <= DENSE_LIMIT)
    steps = {name: lambda loss=loss: torch.autograd.grad(loss(*leaves), leaves) for name, loss in named.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):  # the first round compiles and tunes
        for name, step in steps.items():
            times[name].append(milliseconds(step, setting.device))
    for name, step in steps.items():
        taken = statistics.median(times[name][1:])
        setting.record(f"{name}, B {batch} D {width}{remark}", taken, "ms")
        print(f"    {8 * batch**2 * width / taken / 1e9:.0f} TFLOP/s counted as 4 passes")
        if not setting.rehearse:
            setting.record(f"memory of {name}, B {batch} D {width}{remark}", peak_gib(step), "GiB")


def losses(dense: bool) -> dict[str, Loss]:
    """Return the losses by name; with those that keep every logit if `dense`."""
    named: dict[str, Loss] = {"softmax": contrastive_loss, "sigmoid": sigmoid}
    if dense:
        named |= {"open_clip's form": open_clip_form(), "open_clip's sigmoid form": dense_sigmoid}
        if hasattr(torch.nn.functional, "linear_cross_entropy"):
            named["torch linear_cross_entropy"] = linear_cross_entropy
    return named


def sigmoid(x_BD: Tensor, y_BD: Tensor, log_scale: Tensor) -> Tensor:
    """Return this package's sigmoid loss with SigLIP's bias."""
    return contrastive_loss(x_BD, y_BD, log_scale, bias=torch.full_like(log_scale, -10.0), kind="sigmoid")


def open_clip_form() -> Loss:
    """Return open_clip's loss, or the same arithmetic where it is not installed."""
    try:
        from open_clip import ClipLoss
    except ImportError:
        return dense_softmax
    return lambda x_BD, y_BD, log_scale: ClipLoss()(x_BD, y_BD, log_scale.exp().squeeze())  # type: ignore[no-any-return]


def dense_softmax(x_BD: Tensor, y_BD: Tensor, log_scale: Tensor) -> Tensor:
    """Return the mean of both directions' cross entropies, each with logits of its own, as open_clip computes it."""
    scale, target_B = log_scale.exp().to(x_BD.dtype), torch.arange(len(x_BD), device=x_BD.device)
    return (cross_entropy(scale * x_BD @ y_BD.T, target_B) + cross_entropy(scale * y_BD @ x_BD.T, target_B)) / 2


def dense_sigmoid(x_BD: Tensor, y_BD: Tensor, log_scale: Tensor) -> Tensor:
    """Return the sigmoid loss with all logits in memory, as open_clip computes it on one process."""
    logits_BB = log_scale.exp().to(x_BD.dtype) * x_BD @ y_BD.T - 10.0
    signs_BB = 2 * torch.eye(len(x_BD), device=x_BD.device, dtype=x_BD.dtype) - 1
    return -logsigmoid(signs_BB * logits_BB).sum() / len(x_BD)


def linear_cross_entropy(x_BD: Tensor, y_BD: Tensor, log_scale: Tensor) -> Tensor:
    """Return torch's chunked loss, once for each direction."""
    one_way = torch.nn.functional.linear_cross_entropy  # from torch 2.13 on
    scale, target_B = log_scale.exp().to(x_BD.dtype), torch.arange(len(x_BD), device=x_BD.device)
    return (one_way(scale * x_BD, y_BD, target_B) + one_way(scale * y_BD, x_BD, target_B)) / 2  # type: ignore[no-any-return]

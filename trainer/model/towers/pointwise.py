"""Strided 1x1 convolutions of few channels, kept from an implementation that writes out of bounds.

On x86 processors with AVX2 or AVX-512, oneDNN (3.12, of torch 2.14) computes the weight gradient of a strided 1x1
convolution of channels-last features from a packed copy of every s-th pixel. It places the parts of that copy as if a
pixel had a whole register of channels, 8 or 16; with fewer, parts land past the end of the buffer. The heap is
corrupted, a gradient may be wrong, two threads may deadlock (uxlfoundation/oneDNN#6035).
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

REGISTER_CHANNELS = 16  # float32 values in the widest register, that of AVX-512


def subsample_before_pointwise(model: nn.Module) -> None:
    """Let each strided 1x1 convolution of few channels pick its pixels first, then convolve them with stride 1.

    Outputs and gradients stay the same; so do the names and shapes of parameters. Other convolutions are left alone.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_affected(module):
            module.register_forward_pre_hook(partial(_every_nth_pixel, strides=module.stride))
            module.stride = (1, 1)


def _is_affected(conv: nn.Conv2d) -> bool:
    pointwise = conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding in ((0, 0), "valid")
    return pointwise and conv.stride != (1, 1) and conv.in_channels < REGISTER_CHANNELS


def _every_nth_pixel(module: nn.Module, inputs: tuple[Any, ...], strides: tuple[int, ...]) -> tuple[Tensor]:
    (x_bchw,) = inputs
    return (x_bchw[..., :: strides[0], :: strides[1]],)

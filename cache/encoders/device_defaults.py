"""What a teacher computes with on a device, where nothing else is said."""

import torch

from threetowers.cache.format.manifest import EncoderPrecision, Side

CPU_BATCH = 64
GPU_BATCHES: dict[Side, int] = {"image": 256, "text": 512}  # a caption has fewer tokens than an image has patches


def default_precision(device: str | torch.device) -> EncoderPrecision:
    """Return bfloat16 for a GPU that computes it in hardware, which is several times faster there; else float32.

    float16 rounds less and costs the same, but activations beyond 65504, which some models have, would be lost.
    """
    if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"


def default_batch_size(device: str | torch.device, of: Side = "image") -> int:
    """Return how many images or captions a forward pass takes."""
    return GPU_BATCHES[of] if torch.device(device).type == "cuda" else CPU_BATCH

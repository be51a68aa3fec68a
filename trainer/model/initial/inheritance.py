"""The weights of a smaller tower out of those of a larger one of its family: every few blocks, the first channels.

After the manual weight inheritance of TinyCLIP (Wu et al. 2023, arXiv 2309.12314, section 3.2), where a block that is
not one of every m/n is among the first; both rules are the same where the depths divide.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import timm.models
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from threetowers.trainer.model.towers.text_transformer import TextTransformer

FAMILIES = (TextTransformer, timm.models.VisionTransformer, timm.models.ResNet, timm.models.EfficientNet)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def inherited_weights(tower: nn.Module, source: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights for a tower from a deeper or wider one of its family.

    Of a series of m blocks that repeat, block i of the tower's n takes the weights of block floor(i m / n). Each weight
    has the first channels of the source's, and attention the first heads, which are as wide in both. What depends on
    the size of images, or on the length of captions, keeps the source's size, to be resampled.

    Args:
        tower: A `TextTransformer`, or a vision transformer, ResNet or EfficientNet of timm.
        source: The larger one, without a classifier.

    Returns:
        Weights under the tower's names, and in words which blocks and how many parameters they are.

    Raises:
        ValueError: The towers are not of one of these families, or one cannot be a part of the other. The message names
            the module.
    """
    if type(tower) is not type(source) or not isinstance(tower, FAMILIES):
        families = ", ".join(family.__name__ for family in FAMILIES)
        raise ValueError(
            f"found a {type(source).__name__} for a {type(tower).__name__}; expected two of one family, which are "
            f"{families}"
        )
    for module in (tower, source):
        _require_plain_parts(module)
    notes: list[str] = []
    weights = dict(_inherited(tower, source, "", notes))
    taken = sum(prod(weights[name].shape) for name, _ in tower.named_parameters())
    available = sum(p.numel() for p in source.parameters())
    return weights, [*notes, f"{taken:,} of {available:,} parameters"]


def _require_plain_parts(tower: nn.Module) -> None:
    """Raise ValueError for a part whose first channels are not a smaller part of its kind."""
    for name, module in tower.named_modules():
        if isinstance(tower, timm.models.VisionTransformer) and name.startswith("blocks."):
            plain = name.count(".") > 1 or type(module) is Block
            if not plain or (name.endswith(".mlp") and type(module) is not Mlp):
                raise ValueError(f"{name} is a {type(module).__name__}; expected timm's plain Block, with an Mlp")
        if isinstance(module, Convolution) and module.groups not in (1, module.in_channels):
            raise ValueError(
                f"{name} convolves in {module.groups} groups, of which no first channels can be taken; expected 1, or "
                "one a channel"
            )


def _inherited(own: nn.Module, source: nn.Module, name: str, notes: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a module and of all below it under its own names."""
    if isinstance(own, Attention):
        _require_equal_heads(own, source, name)
    own_tensors, tensors = _tensors(own, name), _tensors(source, name)
    if own_tensors.keys() != tensors.keys():
        raise ValueError(f"{name or 'the tower '}has the weights {[*own_tensors]}, the larger tower {[*tensors]}")
    for key, tensor in own_tensors.items():
        yield key, _first_channels(own, tensors[key], tensor, key)
    blocks = _chosen_blocks(own, source, name, notes)
    for child_name, child in own.named_children():
        path = f"{name}{child_name}."
        below = source.get_submodule(blocks[child_name])
        if isinstance(own, Attention) and child_name == "qkv":
            yield from _first_heads(own, child, below, path)
        else:
            yield from _inherited(child, below, path, notes)


def _tensors(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the weights of a module itself by their full names, without those of modules below it."""
    below = tuple(f"{name}{child}." for child, _ in module.named_children())
    return {key: tensor for key, tensor in module.state_dict(prefix=name).items() if not key.startswith(below)}


def _chosen_blocks(own: nn.Module, source: nn.Module, name: str, notes: list[str]) -> dict[str, str]:
    """Return for the name of each module in a module the name of that in the source which it inherits from."""
    names = [child for child, _ in own.named_children()]
    found = [child for child, _ in source.named_children()]
    if names == found:
        return dict(zip(names, names, strict=True))
    series = (nn.Sequential, nn.ModuleList)
    if not (isinstance(own, series) and isinstance(source, series)):
        raise ValueError(f"{name or 'the tower'} has the modules {names}, in the larger tower {found}")
    if len(names) > len(found):
        raise ValueError(f"{name[:-1]}: {len(found)} blocks found, {len(names)} expected; name a deeper tower")
    # The first block of a stage may change the width. Others that differ are stages, of which none can be left out.
    shapes = [{key: tensor.shape for key, tensor in block.state_dict().items()} for block in source.children()]
    if any(block != shapes[-1] for block in shapes[1:]):
        raise ValueError(
            f"{name[:-1]}: {len(found)} modules found, {len(names)} expected, and none can be left out: they are no "
            "repeated blocks"
        )
    chosen = [found[i * len(found) // len(names)] for i in range(len(names))]
    notes.append(f"{name[:-1]} {', '.join(chosen)} of {len(found)}")
    return dict(zip(names, chosen, strict=True))


def _first_channels(module: nn.Module, found: Tensor, expected: Tensor, name: str) -> Tensor:
    """Return the first channels of a weight, along its dimensions of channels alone."""
    if isinstance(module, (nn.Linear, Convolution)):
        channels = range(min(2, found.ndim))
    elif isinstance(module, nn.Embedding) or found.ndim > 1:  # of one row a token or a position
        channels = range(found.ndim - 1, found.ndim)
    else:
        channels = range(found.ndim)
    if isinstance(module, nn.Embedding) and len(found) != len(expected):
        raise ValueError(
            f"{name}: a vocabulary of {len(found)} found, {len(expected)} expected; use the tokenizer of the larger "
            "tower's run"
        )
    if found.ndim != expected.ndim or any(found.shape[i] < expected.shape[i] for i in channels):
        raise ValueError(f"{name}: {_size(found)} found, {_size(expected)} expected; name a wider tower")
    for i in channels:
        found = found.narrow(i, 0, expected.shape[i])
    return found.contiguous()


def _require_equal_heads(own: Any, source: Any, name: str) -> None:
    """Raise ValueError for attention whose heads are not as wide as the larger tower's."""
    expected, found = (attention.qkv.out_features // 3 // attention.num_heads for attention in (own, source))
    if expected != found:
        raise ValueError(
            f"{name[:-1]}: heads of width {found} found, {expected} expected; whole heads are inherited, so choose "
            f"the number of heads that makes them {found} wide"
        )


def _first_heads(own: Any, projection: nn.Module, source: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the first heads' queries, keys and values, which lie in this order in one matrix."""
    expected, found = _tensors(projection, name), _tensors(source, name)
    if expected.keys() != found.keys():
        raise ValueError(f"{name}has the weights {[*expected]}, the larger tower {[*found]}")
    for key, tensor in found.items():
        head_width = len(expected[key]) // 3 // own.num_heads
        by_head = tensor.reshape(3, -1, head_width, *tensor.shape[1:])  # (3, heads, head width, ...)
        first = by_head[:, : own.num_heads].flatten(0, 2)
        yield key, _first_channels(projection, first, expected[key], key)


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))

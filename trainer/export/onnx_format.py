"""ONNX: both sides of the deployed model as graphs, which ONNX Runtime runs without torch and without this package."""

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from threetowers.cache.encoders.onnx_runtime import PACKAGES
from threetowers.cache.encoders.weights_file import one_line
from threetowers.cache.format.manifest import Side
from threetowers.trainer.export.tokenizer_json import can_write_tokenizer_json, write_tokenizer_json
from threetowers.trainer.export.trained_model import TrainedModel

OPSET = 20  # the first with Gelu
CONFIG = "onnx_config.json"
SIDES: tuple[Side, ...] = ("image", "text")


class DeployedSide(nn.Module):
    """Images (b, 3, S, S) uint8, tokens (b, L) int64, or cached rows (b, width) -> unit-norm embeddings (b, D)."""

    def __init__(self, model: TrainedModel, side: Side) -> None:
        """Make the image or text side of a model."""
        super().__init__()
        self.model = model.model
        self.tower = model.image_tower if side == "image" else model.text_tower
        self.head = getattr(model.config.deploy, side)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return embeddings, float32."""
        return self.model.embed({self.tower: inputs}, [self.head])[self.head]


def input_names(model: TrainedModel) -> dict[Side, str]:
    """Return what each graph takes: pixels, tokens, or rows of a cache."""
    return {
        "image": "rows" if model.sees_cached_rows else "pixels",
        "text": "rows" if model.reads_cached_text else "tokens",
    }


def write_onnx(model: TrainedModel, inputs: dict[Side, Tensor], folder: Path) -> None:
    """Write image.onnx, text.onnx, onnx_config.json, and the tokenizer as tokenizer.json.

    Args:
        model: In float32, on the CPU.
        inputs: Examples of what each side takes.
        folder: An existing folder.

    Raises:
        ValueError: A package is missing, a tower cannot be exported, or tokenizer.json cannot express the tokenizer.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--format onnx: {' and '.join(missing)} not found: pip install 'threetowers[onnx]'")
    names = input_names(model)
    for side in SIDES:
        try:
            _export(DeployedSide(model, side).eval(), names[side], inputs[side], folder / f"{side}.onnx")
        except Exception as error:  # each stage of the exporter raises its own kinds
            raise ValueError(f"ONNX cannot express the {side} side: {one_line(error)}. Use another --format") from error
    if not model.reads_cached_text:
        assert model.tokenizer is not None
        if can_write_tokenizer_json(model.tokenizer):
            write_tokenizer_json(model.tokenizer, model.config.data.context_length, folder)
    (folder / CONFIG).write_text(json.dumps(_config(model, inputs), indent=2))


def _export(side: nn.Module, name: str, example: Tensor, path: Path) -> None:
    """Write a graph with its weights, for batches of any size."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        program = torch.onnx.export(
            side,
            (example,),
            input_names=[name],
            output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(path)


def _config(model: TrainedModel, inputs: dict[Side, Tensor]) -> dict[str, Any]:
    """Return the content of onnx_config.json: what the graphs take, and how embeddings become probabilities."""
    names = input_names(model)
    config: dict[str, Any] = {"opset": OPSET, "embed_dim": model.model.widths[model.config.deploy.image]}
    for side in SIDES:
        example = inputs[side]
        kind = str(example.dtype).removeprefix("torch.")
        config[side] = {"input": names[side], "dtype": kind, "shape": ["batch", *example.shape[1:]]}
        if names[side] == "rows":
            tower = model.image_tower if side == "image" else model.text_tower
            manifest = model.manifests[tower]
            config[side] |= {"encoder": manifest.encoder, "feature": manifest.feature}
    if names["image"] == "pixels":
        config["image"] |= {
            "crop": "largest central square",
            "interpolation": "bicubic",
            "normalization": "in the graph",
        }
    if model.tokenizer is not None and names["text"] == "tokens":
        has_file = can_write_tokenizer_json(model.tokenizer)
        config["text"] |= {"tokenizer": "tokenizer.json" if has_file else model.tokenizer.name}
    if model.logit_scale is not None:
        config["logit_scale"] = model.logit_scale
    for bias in model.model.biases.values():
        config["logit_bias"] = float(bias.detach())
    return config


def load_onnx(folder: Path) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return functions that embed what image.onnx and text.onnx take, by ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only: warnings tell of optimizations that were not made

    def load(side: Side) -> Callable[[Tensor], Tensor]:
        path = folder / f"{side}.onnx"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (taken,) = session.get_inputs()
        return lambda inputs: torch.from_numpy(session.run(None, {taken.name: np.ascontiguousarray(inputs.numpy())})[0])

    return load("image"), load("text")

"""A run as ONNX graphs: the run's own embeddings by ONNX Runtime, for every kind of tower and head."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from tests.emoji_samples import ROOT
from tests.trainer.cached_runs import both_cached, cached_text, pair_caches
from tests.trainer.finished_runs import finished_run
from tests.trainer.small_models import SPECIALIZED
from threetowers.trainer.data.transforms import center_crop
from threetowers.trainer.export.export import export, probe_inputs
from threetowers.trainer.export.onnx_format import OPSET
from threetowers.trainer.export.trained_model import load_model

TEXT = {"kind": "text", "width": 16, "depth": 2, "heads": 2}
MLP = {"kind": "mlp", "depth": 2, "norm": "batch", "input_norm": "layer", "gated": True, "activation": "silu"}


def run_graph(folder: Path, side: str, inputs: torch.Tensor) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(folder / f"{side}.onnx", providers=["CPUExecutionProvider"])
    config = json.loads((folder / "onnx_config.json").read_text())[side]
    assert config["dtype"] == str(inputs.dtype).removeprefix("torch.")
    found: np.ndarray[Any, Any] = session.run(["embeddings"], {config["input"]: inputs.numpy()})[0]
    return found


def compare(run: Path, folder: Path) -> None:
    """Compare the graphs with the run, in batches of odd sizes."""
    assert export(run, folder, "onnx").difference <= 1e-4
    model = load_model(run, precision="float32")
    for size in (1, 7):
        images, texts = probe_inputs(model, size)
        np.testing.assert_allclose(run_graph(folder, "image", images), model.encode_images(images), atol=1e-5)
        np.testing.assert_allclose(run_graph(folder, "text", texts), model.encode_tokens(texts), atol=1e-5)
    for side in ("image", "text"):
        graph = onnx.load(folder / f"{side}.onnx")
        onnx.checker.check_model(graph)
        (opset,) = (entry.version for entry in graph.opset_import if entry.domain == "")
        assert opset == OPSET


@pytest.mark.parametrize(
    ("image", "text", "head"),
    [
        ({"model": "test_vit"}, {}, {}),
        ({"model": "test_resnet"}, {"pool": "mean"}, MLP),
        (
            {"model": "test_vit", "args": {"img_size": 32}},
            {"causal": True, "activation": "quick_gelu"},
            {"bias": False},
        ),
    ],
    ids=["masked", "mean", "causal"],
)
def test_graphs_give_the_embeddings_of_the_run(
    clip: dict[str, Any], tmp_path: Path, image: dict[str, Any], text: dict[str, Any], head: dict[str, Any]
) -> None:
    clip["towers"] = {"image": {"kind": "timm"} | image, "text": TEXT | text}
    clip["heads"] = {"f": {"of": "image"} | head, "g": {"of": "text"} | head}
    compare(finished_run(clip), tmp_path / "export")


def test_the_config_says_what_the_graphs_take(clip: dict[str, Any], tmp_path: Path) -> None:
    folder = export(finished_run(clip | {"loss": {"kind": "sigmoid"}}), tmp_path / "export", "onnx").folder
    config = json.loads((folder / "onnx_config.json").read_text())
    assert config["image"] == {
        "input": "pixels",
        "dtype": "uint8",
        "shape": ["batch", 3, 32, 32],
        "crop": "largest central square",
        "interpolation": "bicubic",
        "normalization": "in the graph",
    }
    assert config["text"] == {"input": "tokens", "dtype": "int64", "shape": ["batch", 8], "tokenizer": "tokenizer.json"}
    model = load_model(tmp_path / "clip")
    assert config["logit_scale"] == pytest.approx(model.logit_scale)
    assert config["logit_bias"] == pytest.approx(model.model.biases["scale"].item())


def test_a_cached_tower_becomes_a_graph_of_its_rows(lit: dict[str, Any], tmp_path: Path) -> None:
    compare(finished_run(lit), tmp_path / "export")
    config = json.loads((tmp_path / "export/onnx_config.json").read_text())
    assert config["image"]["input"] == "rows"
    assert config["image"]["encoder"].startswith("timm:")


@pytest.mark.parametrize("kind", [cached_text, both_cached])
def test_cached_text_becomes_a_graph_of_its_rows(
    kind: Callable[..., dict[str, Any]], clip: dict[str, Any], tars: list[Path], tmp_path: Path
) -> None:
    compare(finished_run(kind(clip, pair_caches(tars, tmp_path, prompt="see: "), tmp_path)), tmp_path / "export")
    assert not (tmp_path / "export/tokenizer.json").exists()


def test_a_decoder_of_transformers_becomes_a_graph(clip: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {"model_type": "llama", "vocab_size": 512, "num_key_value_heads": 1} | sizes
    clip["towers"]["text"] = {"kind": "hf", "of": "text", "config": text}
    compare(finished_run(clip), tmp_path / "export")


def test_shared_and_specialised_towers(clip: dict[str, Any], tmp_path: Path) -> None:
    text = TEXT | {"width": 32, "depth": 3, "share": {"tower": "image"}}
    clip["towers"] = {"image": SPECIALIZED, "text": text}
    compare(finished_run(clip), tmp_path / "export")


def test_the_example_of_the_docs_runs_without_torch(clip: dict[str, Any], tmp_path: Path) -> None:
    page = (ROOT / "docs/exports.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import json\n.*?)```", page, re.DOTALL)
    export(finished_run(clip), tmp_path / "DIR", "onnx")
    wide = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(wide).save(tmp_path / "photo.png")
    code += "\nimport sys\nassert 'torch' not in sys.modules\nnp.save('cosines.npy', images @ texts.T)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model = load_model(tmp_path / "clip", precision="float32")
    image = model.encode_images(center_crop(Image.fromarray(wide), 32)[None])
    expected = image @ model.encode_texts(["a red apple", "a green one"]).T
    np.testing.assert_allclose(np.load(tmp_path / "cosines.npy"), expected, atol=1e-5)

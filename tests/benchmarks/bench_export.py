"""An exported run by ONNX Runtime against the same run by torch, eager, both on the CPU with torch's threads.

    python tests/benchmarks/bench_export.py [--image vit_tiny_patch16_224] [--batches 1 32] [--rounds 7]

The run has random weights: a timm model of 224 pixels, and a text tower of width 512, depth 6, that reads 32 tokens.
Both embed the same batches in alternation; printed are medians, and the ratio of torch's time to ONNX Runtime's.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.trainer.finished_runs import finished_run
from threetowers.trainer.export.export import export, probe_inputs
from threetowers.trainer.export.onnx_format import load_onnx
from threetowers.trainer.export.trained_model import load_model
from threetowers.trainer.tokenizer import train_tokenizer

SIZE, TOKENS = 224, 32


def make_run(folder: Path, image: str) -> Path:
    """Return a run that was never trained."""
    tokenizer = folder / "tokenizer.model"
    words = ["red", "green", "blue", "disc", "bar", "frame", "dot", "cross"]
    tokenizer.write_bytes(train_tokenizer([f"a {a} {b}" for a in words for b in words], 64))
    return finished_run(
        {
            "output_dir": str(folder / "run"),
            "global_batch_size": 8,
            "duration": {"steps": 1},
            "embed_dim": 512,
            "data": {
                "tars": ["none.tar"],
                "tokenizer": str(tokenizer),
                "image_size": SIZE,
                "context_length": TOKENS,
            },
            "towers": {
                "image": {"kind": "timm", "model": image},
                "text": {"kind": "text", "width": 512, "depth": 6, "heads": 8},
            },
            "heads": {"f": {"of": "image"}, "g": {"of": "text"}},
            "terms": {"image-text": {"x": "f", "y": "g"}},
            "deploy": {"image": "f", "text": "g"},
        }
    )


def compare(name: str, batch: int, inputs: Tensor, ways: list[Callable[[Tensor], Tensor]], rounds: int) -> None:
    """Time two ways to embed the same batch, in alternation."""
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 1):  # the first one warms up
        for found, embed in zip(times, ways, strict=True):
            started = time.perf_counter()
            embed(inputs)
            found.append(time.perf_counter() - started)
    torch_ms, onnx_ms = (statistics.median(found[1:]) * 1e3 for found in times)
    print(f"{name}, batch {batch}: torch {torch_ms:.1f} ms, ONNX {onnx_ms:.1f} ms: {torch_ms / onnx_ms:.2f} x as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="vit_tiny_patch16_224")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="threetowers-bench-") as name:
        run = make_run(Path(name), flags.image)
        folder = export(run, Path(name) / "onnx", "onnx").folder
        model = load_model(run, precision="float32")
        encode_image, encode_text = load_onnx(folder)
        print(f"{flags.image}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
        for batch in flags.batches:
            images, tokens_bL = probe_inputs(model, batch)
            compare("images", batch, images, [model.encode_images, encode_image], flags.rounds)
            compare("texts", batch, tokens_bL, [model.encode_tokens, encode_text], flags.rounds)


if __name__ == "__main__":
    main()

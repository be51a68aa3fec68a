"""Teachers run by ONNX Runtime: the same embeddings as torch's, up to rounding, or a refusal."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.names import EncoderOptions, load_frozen_encoder
from threetowers.cache.encoders.onnx_runtime import OnnxNetwork
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.verify.verify import verify

pytest.importorskip("onnxruntime")
TinyEncoder = Callable[..., str]


def pixels(n: int, side: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def test_batches_of_any_size_agree_with_torch(tiny_encoder: TinyEncoder) -> None:
    side = 45
    encoder = load_frozen_encoder(tiny_encoder(f"test_efficientnet@{side}"))
    by_torch, by_onnx = (encoder.running("float32", runtime).side("image") for runtime in ("torch", "onnx"))
    for n in (3, 1, 8):
        found = by_onnx.embed(pixels(n, side))
        torch.testing.assert_close(found, by_torch.embed(pixels(n, side)), rtol=1e-4, atol=1e-4)
        assert not found.is_inference()


def test_a_cache_may_be_built_by_one_runtime_and_continued_by_the_other(
    tiny_encoder: TinyEncoder, weights: Callable[..., str], tars: list[Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"encoder": tiny_encoder("test_vit@64"), "output_dir": tmp_path}
    build_cache(BuildConfig(tars=tars[:1], **options, runtime="onnx", batch_size=5))
    report = build_cache(BuildConfig(tars=tars[:2], **options))  # neither runtime nor batch size is named
    assert (report.tars_built, report.tars_kept, report.differences) == (1, 1, ())
    report = build_cache(BuildConfig(tars=tars, **options, runtime="torch"))
    assert report.tars_built == 1
    assert [line.partition(":")[0] for line in report.differences] == ["versions.onnxruntime", "runtime"]
    cache = EmbeddingCache.open(tmp_path)
    assert (cache.manifest.runtime, cache.manifest.batch_size) == ("onnx", 5)
    made = [(record.runtime, record.batch_size) for record in map(cache.record, range(3))]
    assert made == [("onnx", 5), ("onnx", 5), ("torch", 5)]
    found = verify(
        tmp_path,
        [str(tar) for tar in tars],
        depth="recompute",
        sample=42,
        weights=weights("test_vit"),
        min_cosine=0.999999,
    )
    assert found.ok, found.text()


class Squares(nn.Module):
    """The squares of four pixels, whatever the size."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.arange(1.0, 5.0), requires_grad=False)

    def forward(self, images_b3HW: Tensor) -> tuple[Tensor]:
        return ((images_b3HW[:, 0, 0, :4].float() * self.scale) ** 2,)


def test_a_first_batch_that_differs_from_torch_is_refused() -> None:
    network = Squares()
    exported = OnnxNetwork(network, (8, 8), ("squares",), "timm:squared")
    network.scale.data[0] = -40
    with pytest.raises(
        ValueError,
        match=r"timm:squared: ONNX Runtime \S+ computes other 'squares' features.*at least 0\.99999, found 0\.\d+",
    ):
        exported(pixels(4, 8))
    network.scale.data[0] = float("nan")
    with pytest.raises(ValueError, match="finite in one of them only"):
        exported(pixels(4, 8))
    network.scale.data[0] = 1
    assert exported(pixels(4, 8))[0].shape == (4, 4)
    network.scale.data[0] = -40  # only the first batch is compared
    np.testing.assert_array_equal(exported(pixels(2, 8))[0][:, 0], pixels(2, 8)[:, 0, 0, 0].float() ** 2)


class Undecided(nn.Module):
    """A network whose course depends on the values of its pixels."""

    def forward(self, images_b3HW: Tensor) -> tuple[Tensor]:
        x_b3HW = images_b3HW.float()
        return (x_b3HW.mean((2, 3)) if images_b3HW.sum() > 0 else x_b3HW.amax((2, 3)),)


def test_what_cannot_be_exported_is_refused() -> None:
    with pytest.raises(ValueError, match=r"timm:undecided cannot be exported to ONNX: .*: use --runtime torch"):
        OnnxNetwork(Undecided(), (8, 8), ("pooled",), "timm:undecided")


def test_what_onnx_runtime_does_not_do_here_is_refused(
    tiny_encoder: TinyEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="expected the CPU and float32, found cpu and bfloat16"):
        load_frozen_encoder(tiny_encoder("test_vit@64"), EncoderOptions(precision="bfloat16", runtime="onnx"))
    with pytest.raises(ValueError, match="expected one of them"):
        BuildConfig(tars=["x.tar"], output_dir="x", encoder="timm:test_vit", runtime="onnx", compile=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"onnxruntime and onnxscript not found: pip install 'threetowers\[onnx\]', or"
    ):
        BuildConfig(tars=["x.tar"], output_dir="x", encoder="timm:test_vit", runtime="onnx")

"""Several caches in one reading of the tars: what they share is done once, and changes none of their bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.cache.text_encoders import ColourGrid, Squash
from threetowers.cache.builder import decoding
from threetowers.cache.builder.build import build_caches
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.builder.decoding import PixelFormat, distinct_formats
from threetowers.cache.encoders.forward_queue import ImageQueue
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.format.views import Pixels, Views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.webdataset.sample import read_image
from threetowers.cache.webdataset.tar_index import index_tar

OPTIONS: dict[str, Any] = {"device": "cpu", "batch_size": 5, "threads": 1}
N_SAMPLES = 42  # of the tars of the fixture: 23, 7 and 12
PASSES = 5 + 2 + 3


def stored(folder: Path) -> dict[str, bytes]:
    """Every file but the done records, which hold times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "done"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@dataclass
class Counts:
    """What the encoders were asked for.

    Attributes:
        passes: batch size and features of each forward pass of more than one image: one finds out a width.
        transformed: images that were made pixels.
    """

    passes: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    transformed: int = 0

    def clear(self) -> None:
        self.passes.clear()
        self.transformed = 0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    found = Counts()
    forward, transform = ColourGrid.forward, Squash.__call__

    def counted_forward(self: ColourGrid, x_b3HW: Tensor, features: Sequence[str]) -> tuple[Tensor, ...]:
        if len(x_b3HW) > 1:
            found.passes.append((len(x_b3HW), tuple(features)))
        return forward(self, x_b3HW, features)

    def counted_transform(self: Squash, image: Image.Image) -> Pixels:
        found.transformed += 1
        return transform(self, image)

    monkeypatch.setattr(ColourGrid, "forward", counted_forward)
    monkeypatch.setattr(Squash, "__call__", counted_transform)
    return found


@pytest.fixture
def alone(tars: list[Path], counts: Counts, tmp_path: Path) -> Callable[..., Path]:
    """alone(encoder, feature): the folder of a cache that was built by itself."""

    def build(encoder: str, feature: str) -> Path:
        out = tmp_path / f"alone-{encoder}-{feature}"
        build_caches(BuildConfig(tars=tars, output_dir=out, encoder=encoder, feature=feature, **OPTIONS))
        counts.clear()
        return out

    return build


def test_two_features_of_one_forward_pass(
    tars: list[Path], alone: Callable[..., Path], counts: Counts, tmp_path: Path
) -> None:
    expected = {feature: stored(alone("test:pair", feature)) for feature in ("pooled", "projected")}
    out = [tmp_path / "pooled", tmp_path / "projected"]
    config = BuildConfig(tars=tars, output_dir=out, encoder="test:pair", feature=["pooled", "projected"], **OPTIONS)
    reports = build_caches(config)
    assert [(report.tars_built, report.ok) for report in reports] == [(3, N_SAMPLES)] * 2
    assert [features for _, features in counts.passes] == [("pooled", "projected")] * PASSES
    assert counts.transformed == N_SAMPLES
    for folder in out:
        assert stored(folder) == expected[folder.name]


def test_encoders_that_take_equal_pixels_share_them(
    tars: list[Path], alone: Callable[..., Path], counts: Counts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [
        stored(alone(encoder, "pooled")) for encoder in ("test:pair@32", "test:pair@32:seed:1", "test:pair@16:seed:1")
    ]
    decoded = []
    real = decoding.decode_rgb
    monkeypatch.setattr(decoding, "decode_rgb", lambda data, **how: decoded.append(1) or real(data, **how))
    out = [tmp_path / name for name in "abc"]
    build_caches(
        BuildConfig(
            tars=tars, output_dir=out, encoder=["test:pair@32", "test:pair@32:seed:1", "test:pair@16:seed:1"], **OPTIONS
        )
    )
    assert len(decoded) == N_SAMPLES
    assert counts.transformed == 2 * N_SAMPLES, "once for each of two sizes"
    assert len(counts.passes) == 3 * PASSES
    assert [stored(folder) for folder in out] == expected


def test_only_what_a_cache_lacks_is_computed(tars: list[Path], counts: Counts, tmp_path: Path) -> None:
    out = [tmp_path / name for name in ("pooled", "projected", "other")]
    sources = {"encoder": ["test:pair", "test:pair", "test:pair:seed:1"], "feature": ["pooled", "projected", "pooled"]}
    config = BuildConfig(tars=tars, output_dir=out, **sources, **OPTIONS)
    build_caches(config)
    complete = [stored(folder) for folder in out]
    counts.clear()
    (out[1] / "done/1.json").unlink()  # 7 samples of one cache
    (out[1] / "store.zarr/emb/c/1/0").unlink()
    reports = build_caches(config)
    assert [(report.tars_built, report.tars_kept, report.samples) for report in reports] == [
        (0, 3, 0),
        (1, 2, 7),
        (0, 3, 0),
    ]
    assert counts.passes == [(5, ("pooled", "projected")), (2, ("pooled", "projected"))], (
        "the other encoder has nothing to do"
    )
    assert counts.transformed == 7
    assert [stored(folder) for folder in out] == complete


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"encoder": "test:pair", "feature": ["pooled", "pooled"]},
            "--of image --feature pooled: found for two of --output-dir, .* test:pair offers pooled, projected",
        ),
        ({"encoder": ["test:pair", "test:pair"]}, "--feature pooled: found for two of --output-dir"),
        (
            {"encoder": "test:pair", "feature": ["pooled", "tokens"]},
            "expected one of pooled, projected, found 'tokens'",
        ),
        ({"encoder": "test:pair", "feature": ["pooled"] * 3}, "2 --output-dir for 3 caches"),
        (
            {"encoder": ["test:pair", "test:pair:seed:1", "test:pair:seed:2"], "feature": ["pooled", "projected"]},
            "3 --encoder, 1 --of, 2 --feature: expected one of each, or as many --feature as there are caches",
        ),
        (
            {"encoder": "test:pair", "feature": ["pooled", "projected"], "of": ["image", "sound"]},
            "--of sound: expected image",
        ),
    ],
)
def test_outputs_that_cannot_be_are_refused_before_anything_is_written(
    sources: dict[str, Any], message: str, tars: list[Path], tmp_path: Path
) -> None:
    out = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ValueError, match=message):
        build_caches(BuildConfig(tars=tars, output_dir=out, **sources, **OPTIONS))
    assert not any(folder.exists() for folder in out)


def test_rows_of_two_features_are_the_encoder_s(tars: list[Path], tmp_path: Path) -> None:
    """In processes that decode, with two views, and a batch size that divides nothing."""
    out = [tmp_path / "pooled", tmp_path / "projected"]
    options = OPTIONS | {"batch_size": 4, "workers": 1, "views": Views("center+flip")}
    build_caches(
        BuildConfig(tars=tars, output_dir=out, encoder="test:pair", feature=["pooled", "projected"], **options)
    )
    encoder = load_frozen_encoder("test:pair").side("image")
    for path in tars:
        index = index_tar(path)
        images = [read_image(index, i, 10_000) for i in range(len(index.samples))]
        pixels_n3HW = torch.from_numpy(np.stack([encoder.transform(image) for image in images])).flip(3)
        for folder in out:
            opened = EmbeddingCache.open(folder)
            found_nD = opened.tar(opened.table.find(index).id, view=1)
            np.testing.assert_allclose(found_nD, encoder.embed(pixels_n3HW, folder.name).numpy(), rtol=2e-3, atol=1e-3)


def test_a_queue_gives_several_features() -> None:
    encoder = load_frozen_encoder("test:pair").side("image")
    queue = ImageQueue(encoder, ["projected", "pooled"], views=2, batch_size=4)
    images_nV3HW = np.random.default_rng(0).integers(0, 256, (3, 2, 3, 16, 16), np.uint8)
    running = queue.start(list(images_nV3HW))
    for feature, found_bVD in zip(("projected", "pooled"), running.result(), strict=True):
        for view in range(2):
            expected_bD = encoder.embed(torch.from_numpy(images_nV3HW[:, view]), feature).numpy()
            np.testing.assert_array_equal(found_bVD[:, view], expected_bD)


def test_transforms_of_two_encoders_are_equal_by_what_they_do(weights: Callable[..., str]) -> None:
    forms = []
    for name in ("test_vit@64", "test_vit@96", "test_vit@64"):
        image = load_frozen_encoder(f"timm:{name}:{weights('test_vit')}").side("image")
        forms.append(PixelFormat(Views(), image.transform, image.preprocessing.input_size, "bicubic", None))
    distinct, numbers = distinct_formats(forms)
    assert distinct == forms[:2]
    assert numbers == [0, 1, 0]

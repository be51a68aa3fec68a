"""Several caches in one reading of the tars: what they share is done once, and changes none of their bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cache.two_features import CountedTransform, TwoFeatures, two_features
from threetowers.cache.builder import decoding
from threetowers.cache.builder.build import build_caches
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.builder.decoding import PixelFormat, distinct_formats
from threetowers.cache.encoders.forward_queue import ImageQueue
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.format.views import Views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.webdataset.sample import read_image
from threetowers.cache.webdataset.tar_index import index_tar

__all__ = ["two_features"]  # a fixture

pytestmark = pytest.mark.usefixtures("two_features")
OPTIONS: dict[str, Any] = {"device": "cpu", "batch_size": 5, "threads": 1}
N_SAMPLES = 42  # of the tars of the fixture: 23, 7 and 12
PASSES = 5 + 2 + 3


def stored(folder: Path) -> dict[str, bytes]:
    """Every file but the done records, which hold times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "done"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def passes() -> list[tuple[int, tuple[str, ...]]]:
    """The forward passes since the last call, but for those that find out a width."""
    found = [each for each in TwoFeatures.passes if each[0] > 1]
    TwoFeatures.passes.clear()
    return found


@pytest.fixture
def alone(tars: list[Path], tmp_path: Path) -> Callable[..., Path]:
    """alone(encoder, feature): the folder of a cache that was built by itself."""

    def build(encoder: str, feature: str) -> Path:
        out = tmp_path / f"alone-{encoder}-{feature}"
        build_caches(BuildConfig(tars=tars, output_dir=out, encoder=encoder, feature=feature, **OPTIONS))
        TwoFeatures.passes.clear()
        CountedTransform.calls.clear()
        return out

    return build


def test_two_features_of_one_forward_pass(tars: list[Path], alone: Callable[..., Path], tmp_path: Path) -> None:
    expected = {feature: stored(alone("two:0", feature)) for feature in ("pooled", "cls")}
    out = [tmp_path / "pooled", tmp_path / "cls"]
    config = BuildConfig(tars=tars, output_dir=out, encoder="two:0", feature=["pooled", "cls"], **OPTIONS)
    reports = build_caches(config)
    assert [(report.tars_built, report.ok) for report in reports] == [(3, N_SAMPLES)] * 2
    assert [features for _, features in passes()] == [("pooled", "cls")] * PASSES
    assert len(CountedTransform.calls) == N_SAMPLES
    for folder in out:
        assert stored(folder) == expected[folder.name]


def test_encoders_that_take_equal_pixels_share_them(
    tars: list[Path], alone: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [stored(alone(encoder, "pooled")) for encoder in ("two:0@32", "two:1@32", "two:1@16")]
    decoded = []
    real = decoding.decode_rgb
    monkeypatch.setattr(decoding, "decode_rgb", lambda data, **how: decoded.append(1) or real(data, **how))
    out = [tmp_path / name for name in "abc"]
    build_caches(BuildConfig(tars=tars, output_dir=out, encoder=["two:0@32", "two:1@32", "two:1@16"], **OPTIONS))
    assert len(decoded) == N_SAMPLES
    assert len(CountedTransform.calls) == 2 * N_SAMPLES, "once for each of two sizes"
    assert len(passes()) == 3 * PASSES
    assert [stored(folder) for folder in out] == expected


def test_only_what_a_cache_lacks_is_computed(tars: list[Path], tmp_path: Path) -> None:
    out = [tmp_path / name for name in ("pooled", "cls", "other")]
    sources = {"encoder": ["two:0", "two:0", "two:1"], "feature": ["pooled", "cls", "pooled"]}
    config = BuildConfig(tars=tars, output_dir=out, **sources, **OPTIONS)
    build_caches(config)
    complete = [stored(folder) for folder in out]
    passes()
    CountedTransform.calls.clear()
    (out[1] / "done/1.json").unlink()  # 7 samples of one cache
    (out[1] / "store.zarr/emb/c/1/0").unlink()
    reports = build_caches(config)
    assert [(report.tars_built, report.tars_kept, report.samples) for report in reports] == [
        (0, 3, 0),
        (1, 2, 7),
        (0, 3, 0),
    ]
    assert passes() == [(5, ("pooled", "cls")), (2, ("pooled", "cls"))], "the other encoder has nothing to do"
    assert len(CountedTransform.calls) == 7
    assert [stored(folder) for folder in out] == complete


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"encoder": "two:0", "feature": ["pooled", "pooled"]},
            "two:0 --of image --feature pooled: found for two of --output-dir, .* two:0 offers pooled, cls",
        ),
        ({"encoder": ["two:0", "two:0"]}, "--feature pooled: found for two of --output-dir"),
        ({"encoder": "two:0", "feature": ["pooled", "tokens"]}, "expected one of pooled, cls, found 'tokens'"),
        ({"encoder": "two:0", "feature": ["pooled", "cls"], "of": ["image", "text"]}, "two:0 has no text side"),
        ({"encoder": "two:0", "feature": ["pooled"] * 3}, "2 --output-dir for 3 caches"),
        (
            {"encoder": ["two:0", "two:1", "two:2"], "feature": ["pooled", "cls"]},
            "3 --encoder, 1 --of, 2 --feature: expected one of each, or as many --feature as there are caches",
        ),
        ({"encoder": "two:0", "feature": ["pooled", "cls"], "of": ["image", "sound"]}, "--of sound: expected image"),
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
    out = [tmp_path / "pooled", tmp_path / "cls"]
    options = OPTIONS | {"batch_size": 4, "workers": 1, "views": Views("center+flip")}
    build_caches(BuildConfig(tars=tars, output_dir=out, encoder="two:0", feature=["pooled", "cls"], **options))
    encoder = load_frozen_encoder("two:0").side("image")
    for path in tars:
        index = index_tar(path)
        images = [read_image(index, i, 10_000) for i in range(len(index.samples))]
        pixels_n3HW = torch.from_numpy(np.stack([encoder.transform(image) for image in images])).flip(3)
        for folder in out:
            opened = EmbeddingCache.open(folder)
            found_nD = opened.tar(opened.table.find(index).id, view=1)
            np.testing.assert_allclose(found_nD, encoder.embed(pixels_n3HW, folder.name).numpy(), rtol=2e-3, atol=1e-3)


def test_a_queue_gives_several_features() -> None:
    encoder = load_frozen_encoder("two:0").side("image")
    queue = ImageQueue(encoder, ["cls", "pooled"], views=2, batch_size=4)
    images_nV3HW = np.random.default_rng(0).integers(0, 256, (3, 2, 3, 32, 32), np.uint8)
    running = queue.start(list(images_nV3HW))
    for feature, found_bVD in zip(("cls", "pooled"), running.result(), strict=True):
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

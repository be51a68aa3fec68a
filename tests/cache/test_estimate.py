"""The estimated bytes and files are those of the cache that is then built; rates are measured on its images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cache.text_encoders import NONFINITE
from threetowers.cache import cli as command
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig, EmbeddingConfig, EncoderConfig
from threetowers.cache.estimate.estimate import estimate
from threetowers.cache.format.dtypes import STORAGE_DTYPES
from threetowers.cache.format.views import Views
from threetowers.cache.measure_views import measure_views
from threetowers.cache.webdataset.dataset_sample import sample_dataset
from threetowers.cache.webdataset.defects import BadSample

Pack = Callable[..., Path]


@pytest.fixture(scope="module")
def options(tiny_encoder: Callable[..., str]) -> dict[str, Any]:
    return {"encoder": tiny_encoder("test_vit@64")}


@pytest.mark.parametrize("views", [Views(), Views("crops:2", 1, 0.5)])
def test_estimated_bytes_and_files_equal_those_of_the_built_cache(
    views: Views, tars: list[Path], options: dict[str, Any], tmp_path: Path
) -> None:
    found = estimate(EmbeddingConfig(tars=tars, **options, views=views, batch_size=4), sample=12)
    assert (found.n_tars, found.n_samples, found.exact, found.sampled, found.bad) == (3, 42, True, 12, {})
    assert [cost.name for cost in found.dtypes] == list(STORAGE_DTYPES)
    for cost in found.dtypes:
        report = build_cache(
            BuildConfig(
                tars=tars, output_dir=tmp_path / cost.name, **options, views=views, dtype=cost.name, min_cosine=0.99
            )
        )
        files = [path for path in (tmp_path / cost.name).rglob("*") if path.is_file()]
        assert cost.files == len(files)
        records = sum(path.stat().st_size for path in (tmp_path / cost.name / "done").iterdir())
        assert abs(cost.bytes - report.bytes - records) < 3 * 400, "done records differ by some digits"
        assert 0.99 < cost.min_cosine <= cost.mean_cosine <= 1 + 1e-9
    assert found.hours > 0
    assert found.break_even == pytest.approx(views.count / found.shares["forward"])


def test_more_images_cost_in_proportion(tars: list[Path], options: dict[str, Any]) -> None:
    found = estimate(EmbeddingConfig(tars=tars, **options), sample=8, ranks=4)
    more = found.scaled(42_000)
    assert (more.n_samples, more.n_tars, more.exact) == (42_000, 3000, False)
    assert more.hours == pytest.approx(1000 * found.hours)
    assert more.dtypes[0].bytes == 1000 * found.dtypes[0].bytes
    assert more.break_even == pytest.approx(found.break_even)


def test_a_sample_of_some_tars_estimates_the_rest(pack: Pack, samples: Callable[..., Any], tmp_path: Path) -> None:
    tars = [pack(tmp_path / f"{i}.tar", samples(5 + i % 2, i)) for i in range(9)]
    some = sample_dataset(tars, 7, max_tars=4)
    assert (len(some.indexed), some.n_tars, some.exact) == (4, 9, False)
    assert 45 <= some.n_samples <= 54
    assert len(set(some.sample)) == 7
    assert (
        some.sample == sample_dataset(tars, 7, max_tars=4).sample != sample_dataset(tars, 7, seed=1, max_tars=4).sample
    )
    every = sample_dataset(tars, 1000)
    assert len(every.sample) == every.n_samples == 5 * 5 + 4 * 6
    keys = {every.indexed[number].samples.key(ordinal) for number, ordinal in every.sample}
    assert keys == {key for i in range(9) for key, _ in samples(5 + i % 2, i)}


def test_measured_views_order_augmentations_by_how_far_they_go(tars: list[Path], options: dict[str, Any]) -> None:
    found = measure_views(EncoderConfig(tars=tars, **options), crop_scales=(1.0, 0.9, 0.05), sample=20, draws=3)
    assert (found.images, found.bad, found.draws) == (20, {}, 3)
    by_name = {row.name: row for row in found.rows}
    mild, strong = by_name["random crop, crop_scale 0.9"], by_name["random crop, crop_scale 0.05"]
    other = by_name["another image"]
    assert mild.mean > strong.mean
    assert mild.mean > other.mean
    assert other.own_nearest == 0
    assert mild.own_nearest > 0.5
    for row in found.rows:
        assert row.min <= row.percentiles[0] <= row.percentiles[1] <= row.percentiles[2] <= 1 + 1e-9
    assert found.text().count("\n") == 1 + len(found.rows)


def test_augmentation_is_measured_on_the_same_crops(tars: list[Path], options: dict[str, Any]) -> None:
    config = EncoderConfig(tars=tars, **options)
    plain = measure_views(config, crop_scales=(0.9, 0.4), sample=9, draws=2)
    augmented = measure_views(config, crop_scales=(0.9, 0.4), view_augment="randaugment:2:30", sample=9, draws=2)
    added = [row for row in augmented.rows if row.name == "  and randaugment:2:30"]
    assert tuple(row for row in augmented.rows if row not in added) == plain.rows
    assert len(added) == 2
    for crop, row in zip(plain.rows[1:], added, strict=False):
        assert row.mean < crop.mean
    with pytest.raises(ValueError, match="augment 'rand': expected none, or randaugment:OPS:MAGNITUDE"):
        measure_views(config, view_augment="rand")


def test_bad_input_is_named(tars: list[Path], options: dict[str, Any], pack: Pack, tmp_path: Path) -> None:
    broken = pack(tmp_path / "x.tar", [(str(i), {"png": b"?"}) for i in range(9)])
    with pytest.raises(ValueError, match="0 of 9 sampled images can be decoded: expected at least 8"):
        estimate(EmbeddingConfig(tars=[broken], **options))
    with pytest.raises(ValueError, match="0 of the sampled images can be decoded"):
        measure_views(EncoderConfig(tars=[broken], **options))
    for change in ({"ranks": 0}, {"sample": 0}):
        with pytest.raises(ValueError, match="expected at least 1"):
            estimate(EmbeddingConfig(tars=tars, **options), **change)
    with pytest.raises(ValueError, match="expected 0 < scale <= 1"):
        measure_views(EncoderConfig(tars=tars, **options), crop_scales=(0.0,))


def test_commands_print_and_write_json(
    tars: list[Path], options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        command.estimate(
            EmbeddingConfig(tars=tars, **options), sample=9, images=(1_000_000,), json=tmp_path / "plan.json"
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "3, 42 samples (counted)" in printed
    assert "1,000,000 samples (estimated" in printed
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["break_even_epochs"] == pytest.approx(1 / told["shares"]["forward"])
    assert command.measure_views(EncoderConfig(tars=tars, **options), sample=9, json=tmp_path / "views.json") == 0
    assert "random crop, crop_scale 0.35" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "views.json").read_text())["rows"]) == 6


def text_tars(pack: Pack, folder: Path, sizes: tuple[int, ...] = (23, 7)) -> list[Path]:
    """Tars of samples with two captions each."""
    tars = []
    for tar, size in enumerate(sizes):
        captions = [json.dumps({"captions": [f"picture {i} of {tar}", f"a {i % 5}"]}).encode() for i in range(size)]
        tars.append(pack(folder / f"{tar}.tar", [(f"{tar}{i:04}", {"json": data}) for i, data in enumerate(captions)]))
    return tars


def test_estimated_bytes_and_files_of_text_equal_those_of_the_built_cache(pack: Pack, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tars": text_tars(pack, tmp_path), "encoder": "test:bag", "of": "text"}
    found = estimate(EmbeddingConfig(**options), sample=30)
    assert (found.of, found.per_sample, found.sampled, found.n_samples, found.bad) == ("text", 2.0, 60, 30, {})
    for cost in found.dtypes:
        out = tmp_path / cost.name
        report = build_cache(BuildConfig(**options, output_dir=out, dtype=cost.name, min_cosine=0.99))
        assert cost.files == sum(path.is_file() for path in out.rglob("*"))
        records = sum(path.stat().st_size for path in (out / "done").iterdir())
        assert abs(cost.bytes - report.bytes - records) < 2 * 400, "done records differ by some digits"
        assert 0.99 < cost.min_cosine <= cost.mean_cosine <= 1 + 1e-9
    assert found.break_even == pytest.approx(2 / found.shares["forward"])
    text = found.text()
    assert "measured    on 60 captions\n" in text
    assert "2.00 captions a sample; time by stage: " in text


def test_captions_that_cannot_be_measured_are_counted_or_refused(pack: Pack, tmp_path: Path) -> None:
    tar = pack(tmp_path / "0.tar", [(f"{i:03}", {"txt": b"a caption" if i < 9 else b" "}) for i in range(12)])
    found = estimate(EmbeddingConfig(tars=[tar], encoder="test:bag", of="text"), sample=12)
    assert (found.per_sample, found.bad) == (0.75, {"no caption": 3})
    few = pack(tmp_path / "1.tar", [(f"{i:03}", {"txt": b"a caption"}) for i in range(7)])
    with pytest.raises(ValueError, match="the 7 sampled samples have 7 captions: expected at least 8"):
        estimate(EmbeddingConfig(tars=[few], encoder="test:bag", of="text"))
    with pytest.raises(BadSample, match="no caption"):
        estimate(EmbeddingConfig(tars=[tar], encoder="test:bag", of="text", on_bad="error"), sample=12)


def test_nonfinite_embeddings_refuse_no_dtype(pack: Pack, tmp_path: Path) -> None:
    texts = ["a caption"] * 9 + [f"a {NONFINITE} one"]
    tar = pack(tmp_path / "0.tar", [(f"{i:03}", {"txt": text.encode()}) for i, text in enumerate(texts)])
    found = estimate(EmbeddingConfig(tars=[tar], encoder="test:bag", of="text"))
    assert found.sampled == 9
    assert all(cost.fits for cost in found.dtypes)
    lost = pack(tmp_path / "1.tar", [(f"{i:03}", {"txt": NONFINITE.encode()}) for i in range(10)])
    with pytest.raises(ValueError, match="0 of 10 embeddings are finite: expected at least 8"):
        estimate(EmbeddingConfig(tars=[lost], encoder="test:bag", of="text"))

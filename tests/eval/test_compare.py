"""The retrieval evaluation on real runs: what is matched, where a LiT run's rows come from, what is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import samples_of, write_tar
from tests.eval.runs import finished
from threetowers.cache.builder.build import build
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.compare import Settings, compare
from threetowers.eval.datasets.evaluation_set import evaluation_set
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.ensemble import Mixing
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.metrics.significance import grouped
from threetowers.eval.report.page import render
from threetowers.eval.report.results import load_results

CONCEPTS = Settings(group_field="concept")


def reading(cache: Path) -> LoadOptions:
    return LoadOptions(caches={"third": cache})


def test_records_and_report(clip: dict[str, Any], lit: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    runs = [finished(clip), finished(lit)]
    comparison = compare(runs, [str(tar) for tar in tars], tmp_path / "report", CONCEPTS)
    (gallery,) = comparison.galleries
    assert len(gallery.pictures) == 45
    assert len(gallery.captions) == 40  # two for each of 20 concepts, however many pictures show it
    records = [json.loads(path.read_text()) for path in comparison.records.glob("*.json")]
    assert {record["question"]["run"] for record in records} == {"clip", "lit"}
    for record in records:
        assert record["counts"]["images"] == 45
        assert record["counts"]["groups"] == 20
        for direction in ("image_to_text", "text_to_image"):
            if not record["counts"][f"{direction}/tied"]:
                for k in (1, 5, 10):
                    assert record["metrics"][f"{direction}/recall@{k}"] == pytest.approx(
                        record["metrics"][f"{direction}/recall@{k}_index"]
                    )
    text = comparison.text()
    assert "clip" in text
    assert "test_resnet, 45 x " in text  # what the cache cost
    assert set(comparison.results[0].stage_seconds) == {"training", "evaluation"}
    assert set(comparison.results[1].stage_seconds) == {"cache", "training", "evaluation"}
    assert str(comparison.report.html) in text
    page = comparison.report.html.read_text()
    assert sum(caption in page for caption in gallery.captions) >= 6  # the examples


def test_recalls_equal_a_brute_force_twin(clip: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    path = finished(clip)
    result = compare([path], [str(tar) for tar in tars], tmp_path / "report", CONCEPTS).results[0].records[0]
    model = load_encoder(path)
    data = evaluation_set([index_tar(tar) for tar in tars], group_field="concept", part_field=None, max_captions=5)
    image_ND = model.images(data, data.pictures)
    pairs = sorted({(p.group, caption) for p in data.pictures for caption in p.captions})
    text_MD = model.texts([caption for _, caption in pairs])
    scores = image_ND.astype(np.float64) @ text_MD.astype(np.float64).T
    match = np.array([[p.group == group for group, _ in pairs] for p in data.pictures])
    for direction, s, m in (("image_to_text", scores, match), ("text_to_image", scores.T, match.T)):
        ranks = [int((row[~hit] >= row[hit].max() - 1e-6).sum()) for row, hit in zip(s, m, strict=True)]
        for k in (1, 5, 10):
            assert result.metrics[f"{direction}/recall@{k}"] == pytest.approx(np.mean(np.array(ranks) < k))


def test_a_collapsed_model_scores_nothing(clip: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    result = compare([finished(clip, constant=True)], [str(tar) for tar in tars], tmp_path / "report", CONCEPTS)
    metrics = result.results[0].records[0].metrics
    assert [metrics[f"{d}/recall@{k}"] for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)] == [0.0] * 6
    assert metrics["image_to_text/recall@10_optimistic"] == 1.0


def test_parts_are_galleries_of_their_own(clip: dict[str, Any], tmp_path: Path) -> None:
    samples = samples_of(0, 20)
    for number, (_, members) in enumerate(samples):
        members["json"] = json.dumps(json.loads(members["json"]) | {"style": "ab"[number % 2]}).encode()
    tar = write_tar(tmp_path / "styles.tar", samples)
    comparison = compare(
        [finished(clip)], [str(tar)], tmp_path / "report", Settings("concept", "style", max_captions=1)
    )
    assert [gallery.name for gallery in comparison.galleries] == ["a", "b"]
    assert [len(gallery.captions) for gallery in comparison.galleries] == [10, 10]


def test_a_lit_run_reads_rows_of_the_right_teacher_only(
    lit: dict[str, Any], cache: Path, tars: list[Path], tmp_path: Path
) -> None:
    path = finished(lit)
    heldout = write_tar(tmp_path / "heldout.tar", samples_of(100, 12))
    weights = str(cache.parent / "teacher.safetensors")
    with pytest.raises(
        ManifestError, match=r"heldout\.tar: not among the 2 tars.*--cache third=PATH, or use --live-teacher"
    ):
        compare([path], [str(heldout)], tmp_path / "report", CONCEPTS)
    for name, size in (("same", 64), ("other", 96)):
        build(
            BuildConfig(
                tars=[str(heldout)],
                output_dir=tmp_path / name,
                backbone="test_resnet",
                weights=weights,
                image_size=size,
            )
        )
    with pytest.raises(ManifestError, match=r"not the teacher that .*lit was trained on: preprocessing\.input_size"):
        compare(
            [path],
            [str(heldout)],
            tmp_path / "report",
            CONCEPTS,
            loading=LoadOptions(caches={"third": tmp_path / "other"}),
        )
    cached = compare(
        [path], [str(heldout)], tmp_path / "report", CONCEPTS, loading=LoadOptions(caches={"third": tmp_path / "same"})
    )
    assert cached.results[0].records[0].counts["images"] == 12


def test_live_and_cached_rows_agree(lit: dict[str, Any], cache: Path, tars: list[Path]) -> None:
    path = finished(lit)
    manifests = json.loads((path / "cache_manifests.json").read_text())
    manifests["third"]["weights"] = str(cache.parent / "teacher.safetensors")
    (path / "cache_manifests.json").write_text(json.dumps(manifests))
    data = evaluation_set([index_tar(tars[0])], group_field=None, part_field=None, max_captions=5)
    rows = [
        load_encoder(path, LoadOptions(live_teacher=live)).images(data, data.pictures[:9]) for live in (True, False)
    ]
    assert (rows[0] * rows[1]).sum(1).min() >= 0.9999


def test_samples_that_cannot_be_read_are_listed(clip: dict[str, Any], tmp_path: Path) -> None:
    samples = samples_of(0, 6)
    samples[2][1]["png"] = b"no picture"
    tar = write_tar(tmp_path / "bad.tar", samples)
    comparison = compare([finished(clip)], [str(tar)], tmp_path / "report", CONCEPTS)
    assert len(comparison.skipped) == 1
    assert "sample 's0002'" in comparison.skipped[0]
    assert "1 samples left out; the first: " in comparison.text()
    assert comparison.results[0].records[0].counts["skipped samples"] == 1


def test_runs_that_cannot_be_compared(clip: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    path = finished(clip)
    with pytest.raises(ValueError, match="each folder with a name of its own"):
        compare([path, path], [str(tars[0])], tmp_path / "report", CONCEPTS)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no finished run: model\.safetensors is missing"):
        compare([path], [str(tars[0])], tmp_path / "report", CONCEPTS)


def test_what_is_recorded_is_not_computed_again(clip: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    path, out = finished(clip), tmp_path / "report"
    arguments = ([path], [str(tar) for tar in tars], out, CONCEPTS)
    first = compare(*arguments)
    (record,) = first.results[0].records
    file = out / "records" / record.file_name
    assert compare(*arguments).results[0].records[0].date == record.date
    before = file.stat().st_mtime_ns
    compare(*arguments)
    assert file.stat().st_mtime_ns == before
    file.with_suffix(".npz").write_bytes(b"damaged")
    mended = compare(*arguments).results[0].records[0]
    assert file.stat().st_mtime_ns > before
    assert mended.metrics == record.metrics
    before = file.stat().st_mtime_ns
    compare(*arguments, again=True)
    assert file.stat().st_mtime_ns > before


def test_the_report_needs_the_records_alone(clip: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    path, out = finished(clip), tmp_path / "report"
    report = compare([path], [str(tar) for tar in tars], out, CONCEPTS).report
    page = report.html.read_text()
    shutil.rmtree(path)
    shutil.rmtree(out / "embeddings")
    report.html.unlink()
    again = render(load_results([out]), tmp_path / "elsewhere", title="Retrieval on held-out data: clip")
    assert again.html.read_text().count("<img") == page.count("<img") > 20
    with pytest.raises(ValueError, match="holds no records"):
        load_results([tmp_path / "elsewhere"])
    with pytest.raises(ValueError, match=r"no record of \['lit'\] in .*; found \['clip'\]"):
        load_results([out], ["lit"])


def test_a_retrained_run_replaces_its_old_result(clip: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report"
    first = compare([finished(clip)], [str(tar) for tar in tars], out, CONCEPTS).results[0]
    second = compare([finished(clip, constant=True)], [str(tar) for tar in tars], out, CONCEPTS).results[0]
    assert first.records[0].question.model != second.records[0].question.model
    assert second.records[0].metrics["image_to_text/recall@10"] == 0
    assert "1 other results of the same tasks are left out" in second.note
    # The old weights again: answered from their record, and shown, though another is newer.
    assert compare([finished(clip)], [str(tar) for tar in tars], out, CONCEPTS).results[0].records == first.records


def test_mixing_is_swept_and_seeds_are_one_row(three: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    seeds = [finished(three | {"output_dir": str(tmp_path / f"three-{seed}"), "seed": seed}) for seed in (1, 2)]
    mixings = [Mixing("third", 0.25), Mixing("third", 0.75)]
    comparison = compare(seeds, [str(tar) for tar in tars], tmp_path / "report", CONCEPTS, mixings=mixings)
    assert [result.name for result in comparison.results] == [
        f"three-{seed}{mix}" for seed in (1, 2) for mix in ("", "+third=0.25", "+third=0.75")
    ]
    assert [len(group.members) for group in grouped(comparison.results)] == [2, 2, 2]
    assert "three (2 seeds)" in comparison.report.markdown.read_text()


def test_a_model_that_sees_no_text_is_refused_before_the_work(cache: Path, tars: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['cache:cache'\] see images only"):
        compare([f"cache:{cache}"], [str(tars[0])], tmp_path / "report", CONCEPTS)
    assert not (tmp_path / "report").exists()

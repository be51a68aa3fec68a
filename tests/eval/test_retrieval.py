"""The retrieval task on real runs: matches, the rows of LiT runs, galleries, ensembles, records and report."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from tests.conftest import COLOURS, THINGS, picture, samples_of, write_tar
from tests.eval.runs import finished
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.webdataset.groups import BAD_GROUP
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.cli import EvalFlags, retrieval
from threetowers.eval.cli import compare as command_compare
from threetowers.eval.compare import compare
from threetowers.eval.datasets.dataset import open_dataset
from threetowers.eval.datasets.dataset_config import DatasetConfig
from threetowers.eval.datasets.image_set import EvalImage, ImageSet, read_images
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.eval.encoders.encoder import Encoder, LoadOptions, ModelInfo
from threetowers.eval.encoders.ensemble import EnsembleOptions
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.metrics.significance import group_by_recipe
from threetowers.eval.record import EvalRecord
from threetowers.eval.suite import SuiteResult, evaluate, plan_evaluations, run_evaluation
from threetowers.eval.tasks.retrieval import Gallery, split_galleries
from threetowers.eval.tasks.settings import RetrievalSettings, TasksConfig
from threetowers.eval.terminal import retrieval_text

CONCEPTS = RetrievalSettings(group_field="concept")


def run_retrieval(
    models: Sequence[str | Path],
    tars: Sequence[Path],
    output_dir: Path,
    settings: RetrievalSettings = CONCEPTS,
    **more: Any,
) -> SuiteResult:
    """Evaluate as the command does."""
    name = "" if settings.gallery_field else "all"
    dataset = DatasetConfig(name=name, tars=[str(tar) for tar in tars], tasks=TasksConfig(retrieval=settings))
    return evaluate(models, [dataset], output_dir, **more)


def test_records_and_report(clip: dict[str, Any], lit: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    result = run_retrieval([finished(clip), finished(lit)], tars, tmp_path / "report")
    records = [json.loads(path.read_text()) for path in (tmp_path / "report/records").glob("*.json")]
    assert {record["spec"]["model"] for record in records} == {"clip", "lit"}
    for record in records:
        assert record["spec"]["data"] == "all"
        assert record["counts"]["images"] == 45
        assert record["counts"]["captions"] == 40  # two for each of 20 groups, however many images show it
        assert record["counts"]["groups"] == 20
        for direction in ("image_to_text", "text_to_image"):
            if not record["counts"][f"{direction}/tied"]:
                for k in (1, 5, 10):
                    assert record["metrics"][f"{direction}/recall@{k}"] == pytest.approx(
                        record["metrics"][f"{direction}/recall@{k}_index"]
                    )
    text = retrieval_text(result)
    assert "clip" in text
    assert "test_resnet, 45 x " in text  # what the cache cost
    assert set(result.results[0].stage_seconds) == {"training", "evaluation"}
    assert set(result.results[1].stage_seconds) == {"cache", "training", "evaluation"}
    assert str(result.report.html) in text
    page = result.report.html.read_text()
    captions = {f"a {colour} {thing}" for colour in COLOURS for thing in THINGS}
    assert sum(caption in page for caption in captions) >= 6  # the examples
    assert "45 images in 2 tars. An image and a caption match if they are of one &#39;concept&#39;" in page


def test_recalls_equal_brute_force(clip: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    path = finished(clip)
    (record,) = run_retrieval([path], tars, tmp_path / "report").records
    model = load_encoder(path)
    data = read_images([index_tar(tar) for tar in tars])
    image_ND = model.images(data, data.images)
    pairs = sorted({(image.fields["concept"], caption) for image in data.images for caption in image.captions})
    text_MD = model.texts([caption for _, caption in pairs])
    scores = image_ND.astype(np.float64) @ text_MD.astype(np.float64).T
    match = np.array([[image.fields["concept"] == group for group, _ in pairs] for image in data.images])
    for direction, s, m in (("image_to_text", scores, match), ("text_to_image", scores.T, match.T)):
        ranks = [int((row[~hit] >= row[hit].max() - 1e-6).sum()) for row, hit in zip(s, m, strict=True)]
        for k in (1, 5, 10):
            assert record.metrics[f"{direction}/recall@{k}"] == pytest.approx(np.mean(np.array(ranks) < k))


def test_collapsed_model_scores_nothing(clip: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    (record,) = run_retrieval([finished(clip, constant=True)], tars, tmp_path / "report").records
    metrics = record.metrics
    assert [metrics[f"{d}/recall@{k}"] for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)] == [0.0] * 6
    assert metrics["image_to_text/recall@10_optimistic"] == 1.0


def test_each_gallery_has_a_record(clip: dict[str, Any], tmp_path: Path) -> None:
    samples = samples_of(0, 21)
    for number, (_, members) in enumerate(samples[:20]):
        members["json"] = json.dumps(json.loads(members["json"]) | {"style": "ab"[number % 2]}).encode()
    tar = write_tar(tmp_path / "styles.tar", samples)
    settings = RetrievalSettings(group_field="concept", gallery_field="style", max_captions=1, examples=3)
    result = run_retrieval([finished(clip)], [tar], tmp_path / "report", settings)
    assert [record.spec.data for record in result.records] == ["a", "b"]
    assert [record.counts["captions"] for record in result.records] == [10, 10]
    assert [record.left_out for record in result.records] == [{"no gallery field": 1}] * 2
    assert "'s0020': gallery_field: no field 'style'" in result.skipped[0]
    chosen = [[e for e in record.examples if e.heading == "Caption → images"] for record in result.records]
    assert [len(examples) for examples in chosen] == [2, 1]


def test_images_without_a_group_are_their_own_and_those_without_a_gallery_are_left_out(tmp_path: Path) -> None:
    values = [("boat", 1), ("boat", 1.0), (None, "1"), ("", 1), (float("nan"), 2), (["boat"], 1), ("ship", None)]
    samples = []
    for number, (kind, style) in enumerate(values):
        fields = {"caption": f"caption {number}", "kind": kind, "style": style}
        samples.append((f"s{number}", {"png": picture("red", "disc", number), "json": json.dumps(fields).encode()}))
    tar = write_tar(tmp_path / "groups.tar", samples)
    settings = RetrievalSettings(group_field="kind", gallery_field="style")
    opened = open_dataset(DatasetConfig(name="groups", tars=[str(tar)]), "retrieval", settings)
    galleries, problems = split_galleries(opened, settings)
    assert [gallery.name for gallery, _ in galleries] == ["groups/1", "groups/2"]
    first = Gallery.of(galleries[0][0].test, settings)
    assert first.image_group_N.tolist() == [0, 0, 1, 2]
    part = replace(galleries[0][0].test, group_field="kind")
    assert part.notes == {"notes/group_field: no value": 2}
    assert (part.left_out[BAD_GROUP], part.left_out["no gallery field"]) == (1, 1)
    assert "'s5': group_field: field 'kind' holds a list" in problems[0]
    assert "'s6': gallery_field: no value in field 'style'" in problems[1]


def test_named_captions_are_compared_in_their_order(clip: dict[str, Any], tmp_path: Path) -> None:
    samples = []
    for key, members in samples_of(0, 4):
        fields = {"caption": None, "title": f"title {key}"}
        samples.append((key, {"png": members["png"], "txt": b"one", "json": json.dumps(fields).encode()}))
    tar = write_tar(tmp_path / "titles.tar", samples)
    config = DatasetConfig(name="titles", tars=[str(tar)], captions={"json.title": 1, "txt": 1})
    opened = open_dataset(config, "retrieval", RetrievalSettings())
    assert opened.test.images()[0].captions == ("title s0000", "one")
    flags = EvalFlags((str(finished(clip)),), tmp_path / "out", workers=0)
    retrieval(flags, (str(tar),), captions=("json.title", "json.caption"))
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "out" / "records").glob("*.json")]
    assert record["counts"]["captions"] == 4
    assert record["counts"]["notes/json.caption: null"] == 4


def test_lit_run_reads_rows_of_the_right_teacher_only(
    lit: dict[str, Any], cache: Path, tars: list[Path], tmp_path: Path
) -> None:
    path = finished(lit)
    heldout = write_tar(tmp_path / "heldout.tar", samples_of(100, 12))
    weights = str(cache.parent / "teacher.safetensors")
    with pytest.raises(
        ManifestError, match=r"heldout\.tar: not among the 2 tars.*--cache third=PATH, or use --live-teacher"
    ):
        run_retrieval([path], [heldout], tmp_path / "report")
    for name, size in (("same", 64), ("other", 96)):
        build_cache(
            BuildConfig(
                tars=[str(heldout)],
                output_dir=tmp_path / name,
                encoder=f"timm:test_resnet@{size}:{weights}",
            )
        )
    other, same = (LoadOptions(caches={"third": tmp_path / name}) for name in ("other", "same"))
    with pytest.raises(ManifestError, match=r"not the teacher that .*lit was trained on: preprocessing\.input_size"):
        run_retrieval([path], [heldout], tmp_path / "report", options=other)
    (record,) = run_retrieval([path], [heldout], tmp_path / "report", options=same).records
    assert record.counts["images"] == 12


def test_live_and_cached_rows_agree(lit: dict[str, Any], cache: Path, tars: list[Path]) -> None:
    path = finished(lit)
    manifests = json.loads((path / "cache_manifests.json").read_text())
    manifests["third"]["weights"] = str(cache.parent / "teacher.safetensors")
    (path / "cache_manifests.json").write_text(json.dumps(manifests))
    data = read_images([index_tar(tars[0])])
    encoders = [load_encoder(path, LoadOptions(live_teacher=live)) for live in (True, False)]
    rows = [encoder.images(data, data.images[:9]) for encoder in encoders]
    assert (rows[0] * rows[1]).sum(1).min() >= 0.9999
    found = [encoder.info.preprocessing.partition(": ")[0] for encoder in encoders]
    assert found == [f"timm:test_resnet pooled ({how})" for how in ("live", "cached")]


def test_bad_samples_are_listed(clip: dict[str, Any], tmp_path: Path) -> None:
    samples = samples_of(0, 6)
    samples[2][1]["png"] = b"not an image"
    samples[4][1]["json"] = json.dumps({"concept": "x"}).encode()
    tar = write_tar(tmp_path / "bad.tar", samples)
    result = run_retrieval([finished(clip)], [tar], tmp_path / "report")
    assert len(result.skipped) == 2
    assert "sample 's0002'" in result.skipped[0]
    assert "sample 's0004': no caption" in result.skipped[1]
    assert "left out of all, retrieval: 2 of 6 images: 1 undecodable, 1 no caption" in retrieval_text(result)
    assert result.records[0].left_out == {"undecodable": 1, "no caption": 1}
    assert result.records[0].counts["images"] == 4


def test_each_line_is_a_caption_only_if_the_config_says_so(clip: dict[str, Any], tmp_path: Path) -> None:
    samples = [(key, {"png": members["png"], "txt": b"one\ntwo\n"}) for key, members in samples_of(0, 4)]
    tar = write_tar(tmp_path / "lines.tar", samples)
    model = finished(clip)
    for per_line, captions in ((False, 4), (True, 8)):
        config = DatasetConfig(name="lines", tars=[str(tar)], caption_per_line=per_line)
        result = evaluate([model], [config], tmp_path / "out", tasks=["retrieval"])
        assert result.records[0].counts["captions"] == captions
        told = "lines: noted: a caption of several lines (caption_per_line takes each line of a text member as one)"
        assert (f"{told}, in 4 images" in retrieval_text(result)) is not per_line


def test_models_that_cannot_be_compared_are_refused(clip: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    path = finished(clip)
    with pytest.raises(ValueError, match="models must have different names"):
        run_retrieval([path, path], tars[:1], tmp_path / "report")
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no finished run: model\.safetensors is missing"):
        run_retrieval([path], tars[:1], tmp_path / "report")


def test_recorded_results_are_not_computed_again(clip: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    path = finished(clip)
    output_dir = tmp_path / "report"
    (record,) = run_retrieval([path], tars, output_dir).records
    file = output_dir / "records" / record.file_name
    assert run_retrieval([path], tars, output_dir).records[0].date == record.date
    before = file.stat().st_mtime_ns
    run_retrieval([path], tars, output_dir)
    assert file.stat().st_mtime_ns == before
    file.with_suffix(".npz").write_bytes(b"damaged")
    mended = run_retrieval([path], tars, output_dir).records[0]
    assert file.stat().st_mtime_ns > before
    assert mended.metrics == record.metrics
    before = file.stat().st_mtime_ns
    run_retrieval([path], tars, output_dir, overwrite=True)
    assert file.stat().st_mtime_ns > before


def test_report_from_records_alone(clip: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    path = finished(clip)
    output_dir = tmp_path / "report"
    report = run_retrieval([path], tars, output_dir).report
    page = report.html.read_text()
    shutil.rmtree(path)
    shutil.rmtree(output_dir / "embeddings")
    report.html.unlink()
    again = compare([output_dir], tmp_path / "elsewhere", title="Retrieval on held-out data: clip")
    assert again.html.read_text().count("<img") == page.count("<img") > 20
    with pytest.raises(ValueError, match="holds no records"):
        compare([tmp_path / "elsewhere"])
    with pytest.raises(ValueError, match=r"no record of \['lit'\] in .*; found \['clip'\]"):
        compare([output_dir], models=["lit"])
    with pytest.raises(ValueError, match="at least one folder"):
        compare([])


def test_retrained_run_replaces_its_old_result(clip: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    output_dir = tmp_path / "report"
    first = run_retrieval([finished(clip)], tars, output_dir).results[0]
    second = run_retrieval([finished(clip, constant=True)], tars, output_dir).results[0]
    assert first.records[0].spec.model_digest != second.records[0].spec.model_digest
    assert second.records[0].metrics["image_to_text/recall@10"] == 0
    assert "1 other results of the same tasks are left out" in second.note
    # The old weights again: their record is read and shown, though another is newer.
    assert run_retrieval([finished(clip)], tars, output_dir).results[0].records == first.records


def test_ensembles_are_models_and_seeds_are_grouped(three: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    seeds = [finished(three | {"output_dir": str(tmp_path / f"three-s{seed}"), "seed": seed}) for seed in (1, 2)]
    ensembles = [EnsembleOptions("third", 0.25), EnsembleOptions("third", 0.75)]
    result = run_retrieval(seeds, tars, tmp_path / "report", ensembles=ensembles)
    assert [model.name for model in result.results] == [
        f"three-s{seed}{ensemble}" for seed in (1, 2) for ensemble in ("", "+third=0.25", "+third=0.75")
    ]
    assert [len(group.members) for group in group_by_recipe(result.results)] == [2, 2, 2]
    assert "three (2 seeds)" in result.report.markdown.read_text()
    names = "three (2 seeds), three+third=0.25 (2 seeds), three+third=0.75 (2 seeds)"
    assert f"means over seeds, with intervals, are in the report: {names}\n" in retrieval_text(result)


def test_model_without_text_tower_is_refused_before_the_work(cache: Path, tars: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['cache:cache'\] see images only"):
        run_retrieval([f"cache:{cache}"], tars[:1], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_retrieval_command(
    clip: dict[str, Any], tars: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = EvalFlags((str(finished(clip)),), tmp_path / "out", workers=0)
    retrieval(flags, tuple(map(str, tars)), group_field="concept")
    assert "all: 45 images, 40 captions, 20 groups" in capsys.readouterr().out
    command_compare((tmp_path / "out",))
    assert "report: " in capsys.readouterr().out


def captions_of(number: int) -> list[str]:
    """Three to seven captions of an image, of which the first two are equal."""
    looks = [f"{number} look {look}" for look in range(number % 5)]
    return [f"thing {number}", f"thing {number}", f"{number} seen", *looks]


class NoisyEncoder(Encoder):
    """Embeds an image by its number, and a caption as the image of its number with noise of its own."""

    dim = 8
    info = ModelInfo("noisy", "d", None, "float32", "none", "f")

    def raw_image_batches(self, data: ImageSet, images: Sequence[EvalImage], features: bool) -> Iterator[Embeddings]:
        for image in images:
            yield self.vector(int(image.key[1:]))

    def raw_text_batches(self, captions: Sequence[str]) -> Iterator[Embeddings]:
        for caption in captions:
            number = int(re.findall(r"\d+", caption)[0])
            yield self.vector(number) + 1.2 * self.vector(xxhash.xxh3_64_intdigest(caption.encode()))

    def vector(self, seed: int) -> Embeddings:
        vector = np.random.default_rng(seed).standard_normal((1, self.dim)).astype(np.float32)
        return vector / np.linalg.norm(vector)


@pytest.fixture
def repeated(tmp_path: Path) -> Path:
    """A CLIP_benchmark folder of 40 images with duplicate captions, and with more and fewer than five."""
    root = tmp_path / "repeated"
    (root / "test").mkdir(parents=True)
    (root / "test/nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("retrieval")
    samples = []
    for number, (key, members) in enumerate(samples_of(0, 40)):
        samples.append((key, {"png": members["png"], "txt": "\n".join(captions_of(number)).encode()}))
    write_tar(root / "test/0.tar", samples)
    return root


def recorded(dataset: str | Path | DatasetConfig, output_dir: Path) -> EvalRecord:
    (planned,) = plan_evaluations(dataset).evaluations
    return run_evaluation(planned, NoisyEncoder(), output_dir)


def test_a_clip_benchmark_folder_gives_clip_benchmarks_recalls(repeated: Path, tmp_path: Path) -> None:
    peer = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    record = recorded(repeated, tmp_path / "out")
    # As clip-benchmark's `evaluate` does: all lines of all images, each its own query and its own item.
    model = NoisyEncoder()
    owner = [row for row in range(40) for _ in captions_of(row)]
    text_MD = torch.from_numpy(model.texts([caption for row in range(40) for caption in captions_of(row)]))
    image_ND = torch.from_numpy(np.concatenate([model.vector(row) for row in range(40)]))
    scores = text_MD @ image_ND.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(owner)), torch.tensor(owner)] = True
    sides = {"text_to_image": (scores, positive), "image_to_text": (scores.T, positive.T)}
    merged = recorded(DatasetConfig(name="ours", root=str(repeated), tasks=ONCE), tmp_path / "out")
    for direction, (side, matches) in sides.items():
        assert record.counts[f"{direction}/tied"] == 0
        for k in (1, 5, 10):
            expected = (peer.batchify(peer.recall_at_k, side, matches, 7, "cpu", k=k) > 0).float().mean()
            assert record.metrics[f"{direction}/recall@{k}"] == pytest.approx(float(expected), abs=1e-6)
        assert record.metrics[f"{direction}/recall@1"] != merged.metrics[f"{direction}/recall@1"]


ONCE = TasksConfig(retrieval=RetrievalSettings())


def test_duplicates_and_limits_are_settings_and_their_counts_true(repeated: Path, tmp_path: Path) -> None:
    given = [captions_of(number) for number in range(40)]
    total = sum(map(len, given))
    assert min(map(len, given)) < 5 < max(map(len, given))
    found = []
    for limit, each in ((None, "each"), (None, "once"), (5, "each"), (5, "once")):
        settings = RetrievalSettings(max_captions=limit, duplicate_captions=each)  # type: ignore[arg-type]
        config = DatasetConfig(name="r", root=str(repeated), tasks=TasksConfig(retrieval=settings))
        counts = recorded(config, tmp_path / "out").counts
        beyond = 0 if limit is None else sum(max(0, len(captions) - limit) for captions in given)
        assert counts["captions_beyond_limit"] == beyond
        assert counts["captions_merged"] == (40 if each == "once" else 0)
        assert counts["captions"] + counts["captions_merged"] + beyond == total
        assert counts["caption_duplicates"] == 80
        assert counts["caption_duplicates_across_groups"] == 0
        found.append(counts["captions"])
    assert len(set(found)) == 4

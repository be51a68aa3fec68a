"""The suite end to end on the shipped emoji, with small random towers: results, records, resumption and errors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import balanced_accuracy_score

from tests.conftest import samples_of, write_tar
from tests.eval.runs import finished
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.datasets.dataset_config import DatasetConfig, DatasetError
from threetowers.eval.datasets.image_set import EvalImage, ImageSet, read_images
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.eval.encoders.encoder import Encoder, LoadOptions
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.record import read_items, read_record
from threetowers.eval.suite import evaluate
from threetowers.eval.terminal import suite_text

EMOJI = Path(__file__).parents[2] / "data/emoji"
GROUPS = ["activities", "animals-nature", "food-drink", "objects", "people-body", "smileys-emotion", "symbols"]
TREE: dict[str, Any] = {
    "name": "emoji",
    "tars": [str(EMOJI / "val-000000.tar")],
    "filter": {"group": GROUPS},
    "train": {"tars": [str(EMOJI / "test-000000.tar")]},
    "label": "group",
    "group_field": "concept",
    "classes": {group: group.replace("-", " and ") for group in GROUPS},
    "prompts": ["{c}", "a drawing of {c}", "{c} emoji"],
    "metric": "mean_per_class",
    "shifted": {"noto": {"filter": {"style": "noto"}}},
    "outliers": {"flags": {"filter": {"group": "flags"}}},
    "tasks": {
        "retrieval": {"group_field": "concept"},
        "zeroshot": {},
        "fewshot": {"shots": [1, 5, 10], "seeds": [0, 1]},
        "probe": {"penalties": [1.0, 0.01]},
        "knn": {"ks": [1, 5]},
        "shift": {},
        "ood": {"k": 10},
    },
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "emoji.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def test_every_task_end_to_end(
    clip: dict[str, Any], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On the CPU no task may look for GPUs to search on
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: pytest.fail("the search looked for GPUs"))
    run = finished(clip)
    out = tmp_path / "out"
    options = LoadOptions(workers=0, embeddings=out / "embeddings", device="cpu")
    result = evaluate([run], [config], out, options=options)
    found = {record.spec.task: record for record in result.records}
    assert list(found) == list(TREE["tasks"])
    assert {"zeroshot", "emoji"} <= set(suite_text(result).split())
    for record in result.records:
        path = out / "records" / record.file_name
        assert read_record(path) == record
        for name, values in read_items(record, path.parent).items():
            if name in record.metrics:  # what intervals are computed from is what the metric is the mean of
                assert np.nanmean(values) == pytest.approx(record.metrics[name], abs=1e-6)
    assert found["zeroshot"].counts["images"] == 434
    assert found["ood"].counts["flags/images"] == 25
    assert {f"{k}-shot/top1" for k in (1, 5, 10)} <= found["fewshot"].metrics.keys()
    drop = found["shift"].metrics
    assert drop["noto/top1_drop"] == pytest.approx(drop["original/top1"] - drop["noto/top1"])
    assert found["knn"].metrics["majority@1/top1"] > 1.5 / len(GROUPS)  # even a random network sees colours

    # Zero-shot again, written out.
    encoder = load_encoder(run)
    data = read_images([index_tar(tar) for tar in TREE["tars"]])
    rows = [i for i, image in enumerate(data.images) if image.fields["group"] in GROUPS]
    label = np.array([GROUPS.index(data.images[i].fields["group"]) for i in rows])
    classes = []
    for name in TREE["classes"].values():
        texts = encoder.texts([prompt.format(c=name) for prompt in TREE["prompts"]]).astype(np.float64)
        mean = np.mean([text / np.linalg.norm(text) for text in texts], axis=0)
        classes.append(mean / np.linalg.norm(mean))
    scores = encoder.images(data, data.images)[rows] @ np.stack(classes).T
    expected = scores.argmax(axis=1)
    assert found["zeroshot"].counts["tied"] == 0
    assert found["zeroshot"].metrics["top1"] == pytest.approx((expected == label).mean())
    assert found["zeroshot"].metrics["mean_per_class"] == pytest.approx(balanced_accuracy_score(label, expected))
    items = read_items(found["zeroshot"], out / "records")
    np.testing.assert_array_equal(items["predicted"], expected)
    np.testing.assert_array_equal(items["label"][:, 0], label)

    # The styles of one concept are one group, in every result that intervals are computed from.
    concepts = [data.images[i].fields["concept"] for i in rows]
    assert len(set(zip(items["group"].tolist(), concepts, strict=True))) == len(set(concepts)) < len(concepts)
    for task, prefix in (("fewshot", "5-shot"), ("knn", "majority@1"), ("shift", "original")):
        np.testing.assert_array_equal(read_items(found[task], out / "records")[f"{prefix}/group"], items["group"])


def test_recorded_results_are_not_computed_again(
    clip: dict[str, Any], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = finished(clip), tmp_path / "out"

    def run_it(**more: Any) -> list[str]:
        options = LoadOptions(workers=0, embeddings=out / "embeddings")
        result = evaluate([run], [config], out, options=options, tasks=["zeroshot", "knn"], **more)
        return [record.date + str(record.seconds) for record in result.records]

    first = run_it()
    monkeypatch.setattr(Encoder, "image_batches", None)  # any call would fail
    assert run_it() == first
    (out / "records" / next((out / "records").glob("zeroshot*.npz")).name).unlink()
    second = run_it()
    assert second[0] != first[0]  # its items were lost
    assert second[1] == first[1]
    assert not set(run_it(overwrite=True)) & {*first, *second}
    tree = TREE | {"prompts": ["{c}"]}
    config.write_text(yaml.safe_dump(tree))
    assert len(list((out / "records").glob("zeroshot*.json"))) == 1
    run_it()
    assert len(list((out / "records").glob("zeroshot*.json"))) == 2  # other prompts are another spec
    assert len(list((out / "records").glob("knn*.json"))) == 1


def test_model_without_text_tower_runs_image_tasks_only(config: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
    result = evaluate(
        [f"timm:test_resnet@32:{weights}"],
        [config],
        tmp_path / "out",
        tasks=["zeroshot", "ood", "retrieval"],
        options=LoadOptions(workers=0, embeddings=tmp_path / "embeddings"),
    )
    (record,) = result.records
    assert {name.split("/")[1] for name in record.metrics} == {"knn", "mahalanobis"}
    assert len(result.left_out) == 2
    assert all("sees images only" in line for line in result.left_out)


class UntouchableEncoder:
    """An encoder that must not be used."""

    def images(self, data: ImageSet, images: Sequence[EvalImage]) -> Embeddings:
        raise AssertionError("embedded before the checks")

    features = images


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"tasks": {"fewshot": {"shots": [1, 10_000]}}},
            ValueError,
            "10000 shots need as many training items in each of 7",
        ),
        ({"tasks": {"knn": {"ks": [5, 9999]}}}, ValueError, r"knn: k of \(5, 9999\) over 582 training items"),
        ({"tasks": {"ood": {"k": 9999}}}, ValueError, r"ood: k of \(9999,\) over"),
        (
            {"classes": {**TREE["classes"], "flags": "flag"}, "tasks": {"probe": {}}},
            ValueError,
            "have no training item",
        ),
        ({"tasks": {}}, ValueError, "names no task"),
        ({"label": "colour"}, DatasetError, "has no field 'colour'"),
        (
            {"tasks": {"retrieval": {"group_field": "colour"}}},
            ValueError,
            "sample .*: group_field: no field 'colour'",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(
    change: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("threetowers.eval.suite.load_encoder", lambda *_: UntouchableEncoder())
    path = tmp_path / "emoji.yaml"
    path.write_text(yaml.safe_dump(TREE | change))
    with pytest.raises(error, match=message):
        evaluate(["model"], [path], tmp_path / "out")


def test_unknown_or_repeated_names_are_refused(clip: dict[str, Any], config: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one model and one data set"):
        evaluate([], [config], tmp_path)
    with pytest.raises(ValueError, match="'zeroshots' is not a task"):
        evaluate(["model"], [config], tmp_path, tasks=["zeroshots"])
    run = finished(clip)
    with pytest.raises(ValueError, match="several of the data sets are called 'emoji'"):
        evaluate([run], [config, config], tmp_path, tasks=["retrieval"])
    with pytest.raises(ValueError, match="models must have different names"):
        evaluate([run, str(run)], [config], tmp_path)


def test_knn_command(clip: dict[str, Any], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from threetowers.eval.cli import EvalFlags, knn

    flags = EvalFlags((str(finished(clip)),), tmp_path / "out", workers=0)
    knn(flags, (str(config),))
    assert "emoji  knn  majority@5/mean_per_class" in capsys.readouterr().out
    (record,) = (tmp_path / "out/records").glob("*.json")
    assert json.loads(record.read_text())["spec"]["task"] == "knn"


def test_task_that_cannot_be_done_is_named_and_the_others_are_done(
    clip: dict[str, Any], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Explicit values that do not fit are refused by name; so are tasks that lack images of a class, or prompts."""
    from threetowers.eval.cli import EvalFlags, suite

    tree = {name: value for name, value in TREE.items() if name != "prompts"} | {
        "classes": {**TREE["classes"], "dragons": "dragon"},
        "tasks": {"retrieval": {}, "zeroshot": {}, "probe": {}, "knn": {"ks": [1, 9999]}, "ood": {}},
    }
    config.write_text(yaml.safe_dump(tree))
    flags = EvalFlags((str(finished(clip)),), tmp_path / "out", workers=0)
    assert suite(flags, (str(config),)) == 1
    printed = capsys.readouterr().out
    markdown = (tmp_path / "out/report.md").read_text()
    for reason in (
        "emoji.yaml: zeroshot: prompts: zero-shot classification needs templates",
        "emoji.yaml: probe: 1 of 8 classes have no training item, the first is class ",
        "emoji.yaml: knn: k of (1, 9999) over 582 training items: expected each from 1 to 582",
    ):
        assert f"not done: {config.parent}/{reason}" in printed
        assert reason.partition(": ")[2].partition(":")[0] in markdown
    assert sorted(path.name.partition("_")[0] for path in (tmp_path / "out/records").glob("*.json")) == [
        "ood",
        "retrieval",
    ]


def small(config: Path, count: int, tmp_path: Path, **changes: Any) -> Path:
    """A data set of two classes with few training images and all defaults."""
    for name, number in (("test", 12), ("train", count)):
        samples = samples_of(0, number)
        for row, (_, members) in enumerate(samples):
            members["cls"] = str(row % 2).encode()
        write_tar(tmp_path / f"{name}.tar", samples)
    tree = {
        "name": "two",
        "tars": ["test.tar"],
        "train": {"tars": ["train.tar"]},
        "classes": ["even", "odd"],
        "prompts": ["{c}"],
        "outliers": {"same": {}},
        "tasks": {"zeroshot": {}, "knn": {}, "fewshot": {}, "ood": {}},
    }
    config.write_text(yaml.safe_dump(tree | changes))
    return config


def test_defaults_fit_the_data_set_and_say_so(clip: dict[str, Any], config: Path, tmp_path: Path) -> None:
    small(config, 15, tmp_path)
    result = evaluate([finished(clip)], [config], tmp_path / "out", options=LoadOptions(workers=0))
    assert result.exit_code == 0
    found = {record.spec.task: record.metrics for record in result.records}
    assert {name for name in found["knn"] if name.endswith("top1") and "majority" in name} == {
        "majority@1/top1",
        "majority@5/top1",
        "majority@10/top1",
    }
    assert {name.partition("/")[0] for name in found["fewshot"]} == {"1-shot", "5-shot"}
    assert "top5" not in found["zeroshot"]
    text = suite_text(result)
    assert "knn: no k of 20, as there are 15 training images" in text
    assert "fewshot: no 10 shots, as the smallest class has 7 training images" in text
    assert "ood: k of 15 instead of 50, as there are 15 training images" in text


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        ("top5", "metric: top5 of 2 classes: every prediction would be right; expected top1 or mean_per_class"),
        ("mean_average_precision", "metric: mean_average_precision needs images with several labels, found one each"),
    ],
)
def test_metric_that_says_nothing_is_refused(
    clip: dict[str, Any], config: Path, tmp_path: Path, metric: str, reason: str
) -> None:
    small(config, 15, tmp_path, metric=metric, tasks={"zeroshot": {}, "knn": {}})
    result = evaluate([finished(clip)], [config], tmp_path / "out", options=LoadOptions(workers=0))
    (line,) = result.refused
    assert reason in line
    rows = [row for row in suite_text(result).splitlines() if row.startswith("two  ")]
    assert any("majority@1/top1" in row for row in rows)  # what the task has in place of the set's metric
    config.write_text(config.read_text().replace("knn: {}, ", "").replace("  knn: {}\n", ""))
    with pytest.raises(DatasetError, match=reason):
        evaluate([finished(clip)], [config], tmp_path / "out")


def test_failure_of_one_model_leaves_the_others(
    clip: dict[str, Any], lit: dict[str, Any], config: Path, tmp_path: Path
) -> None:
    """The LiT run has no rows of these images."""
    result = evaluate([finished(clip), finished(lit)], [config], tmp_path / "out", tasks=["zeroshot"])
    assert [record.spec.model for record in result.records] == ["clip"]
    (line,) = result.refused
    assert line.startswith("lit: emoji: zeroshot: ")
    assert "--cache third=PATH" in line
    assert result.exit_code == 1


def test_what_labels_and_groups_are_read_from_is_in_the_spec(
    clip: dict[str, Any], config: Path, tmp_path: Path
) -> None:
    small(config, 15, tmp_path)
    run, out = finished(clip), tmp_path / "out"
    changes: list[dict[str, Any]] = [
        {},
        {"group_field": "concept"},
        {"label": "cls", "classes": {"0": "even", "1": "odd"}},
        {"label": "cls", "classes": {"1": "even", "0": "odd"}},  # the same names in the same order
    ]
    files = []
    for change in changes:
        small(config, 15, tmp_path, **change)
        files += [r.file_name for r in evaluate([run], [config], out, tasks=["zeroshot"]).records]
    assert files[2] != files[3]
    assert len(set(files)) == 3 + (files[0] != files[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            LoadOptions(caches={"fourth": Path("c")}),
            r"--cache fourth=c: no such tower; .* cached towers \['third'\]",
        ),
        (LoadOptions(device="gpu"), "--device 'gpu': expected cpu, cuda"),
    ],
)
def test_options_that_name_what_is_not_there_are_refused(
    lit: dict[str, Any], tars: list[Path], tmp_path: Path, options: LoadOptions, message: str
) -> None:
    dataset = DatasetConfig(name="all", tars=[str(tar) for tar in tars])
    with pytest.raises(ValueError, match=message):
        evaluate([finished(lit)], [dataset], tmp_path / "out", tasks=["retrieval"], options=options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            LoadOptions(caches={"third": Path("c")}),
            "--cache third=c: no such tower; found no model with",
        ),
        (LoadOptions(live_teacher=True), "--live-teacher: found no model with a cached tower; leave the flag out"),
    ],
)
def test_options_for_cached_towers_need_one(
    clip: dict[str, Any], tars: list[Path], tmp_path: Path, options: LoadOptions, message: str
) -> None:
    dataset = DatasetConfig(name="all", tars=[str(tar) for tar in tars])
    with pytest.raises(ValueError, match=message):
        evaluate([finished(clip)], [dataset], tmp_path / "out", tasks=["retrieval"], options=options)


def test_a_tower_is_given_one_cache() -> None:
    from threetowers.eval.cli import parse_caches

    assert parse_caches(["a=s3://x", "b=y=z"]) == {"a": "s3://x", "b": "y=z"}
    with pytest.raises(ValueError, match="'a' is given twice, first as x"):
        parse_caches(["a=x", "a=y"])

"""The suite end to end on the shipped emoji, with small random towers: results, records, resumption and errors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import balanced_accuracy_score

from tests.eval.runs import finished
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.datasets.dataset_config import DatasetError
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


def test_every_task_end_to_end(clip: dict[str, Any], config: Path, tmp_path: Path) -> None:
    run = finished(clip)
    out = tmp_path / "out"
    result = evaluate([run], [config], out, options=LoadOptions(workers=0, embeddings=out / "embeddings"))
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

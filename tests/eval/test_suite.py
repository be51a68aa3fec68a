"""The suite end to end on the shipped emoji, with small random towers: answers, records, resumption, refusals."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import balanced_accuracy_score

from tests.eval.test_compare import finished
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.datasets.config import BadDescription
from threetowers.eval.datasets.dataset import read_pictures
from threetowers.eval.datasets.evaluation_set import EvaluationSet, Floats, Picture
from threetowers.eval.encoders.encoder import Batched, LoadOptions
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.record import read_items, read_record
from threetowers.eval.suite import run_suite

EMOJI = Path(__file__).parents[2] / "data/emoji"
GROUPS = ["activities", "animals-nature", "food-drink", "objects", "people-body", "smileys-emotion", "symbols"]
TREE: dict[str, Any] = {
    "name": "emoji",
    "tars": [str(EMOJI / "val-000000.tar")],
    "where": {"group": GROUPS},
    "learn": {"tars": [str(EMOJI / "test-000000.tar")]},
    "label": "group",
    "unit": "concept",
    "classes": {group: group.replace("-", " and ") for group in GROUPS},
    "prompts": ["{c}", "a drawing of {c}", "{c} emoji"],
    "metric": "mean_per_class",
    "shifted": {"noto": {"where": {"style": "noto"}}},
    "outliers": {"flags": {"where": {"group": "flags"}}},
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
def described(tmp_path: Path) -> Path:
    path = tmp_path / "emoji.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def test_every_task_end_to_end(clip: dict[str, Any], described: Path, tmp_path: Path) -> None:
    run = finished(clip)
    out = tmp_path / "out"
    suite = run_suite([run], [described], out, loading=LoadOptions(workers=0, embeddings=out / "embeddings"))
    found = {record.question.task: record for record in suite.records}
    assert list(found) == list(TREE["tasks"])
    assert {"zeroshot", "emoji"} <= set(suite.text().split())
    for record in suite.records:
        path = out / "records" / record.file_name
        assert read_record(path) == record
        for name, values in read_items(record, path.parent).items():
            if name in record.metrics:  # what intervals are computed from is what the metric is the mean of
                assert np.nanmean(values) == pytest.approx(record.metrics[name], abs=1e-6)
    assert found["zeroshot"].counts["pictures"] == 434
    assert found["ood"].counts["flags/pictures"] == 25
    assert {f"{k}-shot/top1" for k in (1, 5, 10)} <= found["fewshot"].metrics.keys()
    drop = found["shift"].metrics
    assert drop["noto/top1_drop"] == pytest.approx(drop["original/top1"] - drop["noto/top1"])
    assert found["knn"].metrics["majority@1/top1"] > 1.5 / len(GROUPS)  # even a random network sees colours

    # Zero-shot again, written out.
    encoder = load_encoder(run)
    pictures = read_pictures([index_tar(tar) for tar in TREE["tars"]])
    rows = [i for i, picture in enumerate(pictures.pictures) if picture.fields["group"] in GROUPS]
    label = np.array([GROUPS.index(pictures.pictures[i].fields["group"]) for i in rows])
    classes = []
    for name in TREE["classes"].values():
        texts = encoder.texts([prompt.format(c=name) for prompt in TREE["prompts"]]).astype(np.float64)
        mean = np.mean([text / np.linalg.norm(text) for text in texts], axis=0)
        classes.append(mean / np.linalg.norm(mean))
    scores = encoder.images(pictures, pictures.pictures)[rows] @ np.stack(classes).T
    expected = scores.argmax(axis=1)
    assert found["zeroshot"].counts["tied"] == 0
    assert found["zeroshot"].metrics["top1"] == pytest.approx((expected == label).mean())
    assert found["zeroshot"].metrics["mean_per_class"] == pytest.approx(balanced_accuracy_score(label, expected))
    items = read_items(found["zeroshot"], out / "records")
    np.testing.assert_array_equal(items["predicted"], expected)
    np.testing.assert_array_equal(items["label"][:, 0], label)

    # The styles of one concept belong together, in every answer that intervals are computed from.
    concepts = [pictures.pictures[i].fields["concept"] for i in rows]
    assert len(set(zip(items["group"].tolist(), concepts, strict=True))) == len(set(concepts)) < len(concepts)
    for task, prefix in (("fewshot", "5-shot"), ("knn", "majority@1"), ("shift", "original")):
        np.testing.assert_array_equal(read_items(found[task], out / "records")[f"{prefix}/group"], items["group"])


def test_what_is_answered_is_not_computed_again(
    clip: dict[str, Any], described: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = finished(clip), tmp_path / "out"

    def run_it(**more: Any) -> list[str]:
        loading = LoadOptions(workers=0, embeddings=out / "embeddings")
        suite = run_suite([run], [described], out, loading=loading, tasks=["zeroshot", "knn"], **more)
        return [record.date + str(record.seconds) for record in suite.records]

    first = run_it()
    monkeypatch.setattr(Batched, "image_batches", None)  # any call would fail
    assert run_it() == first
    (out / "records" / next((out / "records").glob("zeroshot*.npz")).name).unlink()
    second = run_it()
    assert second[0] != first[0]  # its items were lost
    assert second[1] == first[1]
    assert not set(run_it(again=True)) & {*first, *second}
    tree = TREE | {"prompts": ["{c}"]}
    described.write_text(yaml.safe_dump(tree))
    assert len(list((out / "records").glob("zeroshot*.json"))) == 1
    run_it()
    assert len(list((out / "records").glob("zeroshot*.json"))) == 2  # other prompts are another question
    assert len(list((out / "records").glob("knn*.json"))) == 1


def test_a_model_without_text_is_asked_what_it_can_answer(described: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
    suite = run_suite(
        [f"timm:test_resnet@32:{weights}"],
        [described],
        tmp_path / "out",
        tasks=["zeroshot", "ood", "retrieval"],
        loading=LoadOptions(workers=0, embeddings=tmp_path / "embeddings"),
    )
    (record,) = suite.records
    assert {name.split("/")[1] for name in record.metrics} == {"knn", "mahalanobis"}
    assert len(suite.left_out) == 2
    assert all("sees images only" in line for line in suite.left_out)


class Broken:
    """An encoder that must not be asked for anything."""

    def images(self, data: EvaluationSet, pictures: Sequence[Picture]) -> Floats:
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
        ({"label": "colour"}, BadDescription, "has no field 'colour'"),
        (
            {"tasks": {"retrieval": {"group_field": "colour"}}},
            ValueError,
            "group_field: sample .* has no field 'colour'",
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
    monkeypatch.setattr("threetowers.eval.suite.load_encoder", lambda *_: Broken())
    path = tmp_path / "emoji.yaml"
    path.write_text(yaml.safe_dump(TREE | change))
    with pytest.raises(error, match=message):
        run_suite(["model"], [path], tmp_path / "out")


def test_what_is_asked_must_be_there(clip: dict[str, Any], described: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one model and one data set"):
        run_suite([], [described], tmp_path)
    with pytest.raises(ValueError, match="'zeroshots' is no task"):
        run_suite(["model"], [described], tmp_path, tasks=["zeroshots"])
    run = finished(clip)
    with pytest.raises(ValueError, match="several of the data sets are called 'emoji'"):
        run_suite([run], [described, described], tmp_path, tasks=["retrieval"])
    with pytest.raises(ValueError, match="models must have different names"):
        run_suite([run, str(run)], [described], tmp_path)


def test_command(clip: dict[str, Any], described: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from threetowers.eval.cli import Described, knn

    flags = Described((str(finished(clip)),), (str(described),), tmp_path / "out", workers=0)
    knn(flags)
    assert "emoji  knn  majority@5/mean_per_class" in capsys.readouterr().out
    (record,) = (tmp_path / "out/records").glob("*.json")
    assert json.loads(record.read_text())["question"]["task"] == "knn"

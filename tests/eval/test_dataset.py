"""Data sets: their configs, the images and labels that they select, CLIP_benchmark's layout."""

import http.server
import io
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.conftest import write_tar
from threetowers.eval.datasets.dataset import DatasetPart, load_dataset_config, open_dataset
from threetowers.eval.datasets.dataset_config import DatasetConfig, DatasetError, parse_dataset_config
from threetowers.eval.metrics.classification import LinearClassifier
from threetowers.eval.tasks.classifier_evaluation import evaluate_classifier
from threetowers.eval.tasks.retrieval import Gallery, captioned_part
from threetowers.eval.tasks.settings import (
    FewShotSettings,
    RetrievalSettings,
    ShiftSettings,
    TasksConfig,
    ZeroShotSettings,
)

ROOT = Path(__file__).parents[2]


def image_bytes(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def samples(rows: list[dict[str, Any]], prefix: str = "s") -> list[tuple[str, dict[str, bytes]]]:
    """Samples with JSON fields; `cls` and `txt` become members of their own."""
    made = []
    for number, fields in enumerate(rows):
        members = {"png": image_bytes(number)}
        members |= {name: str(fields.pop(name)).encode() for name in ("cls", "txt") if name in fields}
        if fields:
            members["json"] = json.dumps(fields).encode()
        made.append((f"{prefix}{number:03d}", members))
    return made


@pytest.fixture
def pets(tmp_path: Path) -> dict[str, Any]:
    """A set of our own tars: kinds in two styles, one sample that cannot be read."""
    rows = [
        {"kind": kind, "style": style, "captions": [f"a {kind}"]}
        for kind in ("cat", "dog", "emu", "fox")
        for style in ("ink", "oil", "ink")
    ]
    made = samples(rows)
    made.append(("broken", {"png": b"not an image", "json": b"{}"}))
    write_tar(tmp_path / "test.tar", made)
    write_tar(tmp_path / "train.tar", samples([dict(row) for row in rows for _ in range(2)], "t"))
    return {
        "name": "pets",
        "tars": ["test.tar"],
        "label": "kind",
        "prompts": ["a {c}"],
        "train": {"tars": ["train.tar"]},
        "shifted": {"oil": {"filter": {"style": "oil"}}},
        "outliers": {"foxes": {"filter": {"kind": "fox"}}},
    }


def parse(tree: dict[str, Any], folder: Path) -> DatasetConfig:
    return parse_dataset_config(tree, str(folder / "pets.yaml"))


def labels(part: DatasetPart) -> list[list[int]]:
    return [[int(label) for label in row if label >= 0] for row in part.labels_NL]


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """CLIP_benchmark's layout: three classes, two test tars and one train tar."""
    root = tmp_path / "animals"
    for split, tars in (("test", ([0, 2], [1, 1, 0])), ("train", ([0, 1, 2, 2, 1, 0],))):
        (root / split).mkdir(parents=True)
        (root / split / "nshards.txt").write_text(f"{len(tars)}\n")
        for number, numbers in enumerate(tars):
            write_tar(root / split / f"{number}.tar", samples([{"cls": n} for n in numbers], f"{split}{number}"))
    (root / "classnames.txt").write_text("cat\ndog\nemu\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    return root


def test_labels_of_a_field(pets: dict[str, Any], tmp_path: Path) -> None:
    opened = open_dataset(parse(pets, tmp_path), "fewshot", FewShotSettings())
    assert opened.class_names == ["cat", "dog", "emu", "fox"]
    assert labels(opened.test) == [[0]] * 3 + [[1]] * 3 + [[2]] * 3 + [[3]] * 3
    assert opened.test.left_out == {"undecodable": 1}
    assert opened.train is not None
    assert len(opened.train.rows) == 24


def test_class_names_by_value_and_subset(pets: dict[str, Any], tmp_path: Path) -> None:
    classes = {"fox": "red fox", "emu": "big bird", "cat": "cat", "dog": "dog"}
    opened = open_dataset(
        parse({**pets, "classes": classes, "subset": ["cat", "red fox"]}, tmp_path), "zeroshot", ZeroShotSettings()
    )
    assert opened.class_names == ["red fox", "cat"]  # in the order of the classes
    assert labels(opened.test) == [[1]] * 3 + [[0]] * 3
    assert opened.test.left_out["outside the subset"] == 6
    assert [p.fields["kind"] for p in opened.test.images()] == ["cat"] * 3 + ["fox"] * 3


def test_parts_inherit_the_keys_they_leave_out(pets: dict[str, Any], tmp_path: Path) -> None:
    tree = {**pets, "filter": {"style": ["ink"], "kind": ["cat", "dog", "emu"]}}
    opened = open_dataset(parse(tree, tmp_path), "shift", ShiftSettings())
    assert len(opened.test.rows) == 6
    assert [p.fields["style"] for p in opened.shifted["oil"].images()] == ["oil"] * 3
    assert opened.shifted["oil"].data is opened.test.data  # read once, embedded once
    opened = open_dataset(parse(tree, tmp_path), "ood", None)
    assert [p.fields["kind"] for p in opened.outliers["foxes"].images()] == ["fox"] * 2
    assert opened.templates == ["a {c}"]
    assert opened.class_names == ["cat", "dog", "emu"]


def test_several_labels_and_none(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"kinds": ["cat", "dog"]}, {"kinds": []}, {"kinds": ["emu"]}, {"kinds": "dog"}]
    write_tar(tmp_path / "test.tar", samples(rows))
    tree = {
        "name": "several",
        "tars": ["test.tar"],
        "label": "kinds",
        "classes": ["cat", "dog", "emu"],
        "prompts": "photo",
    }
    opened = open_dataset(parse(tree, tmp_path), "zeroshot", ZeroShotSettings())
    assert labels(opened.test) == [[0, 1], [2], [1]]
    assert opened.test.left_out["no label"] == 1
    with pytest.raises(ValueError, match="need one label per image"):
        _ = opened.test.label_N


def test_config_of_a_clip_benchmark_folder(layout: Path) -> None:
    config = load_dataset_config(layout)
    assert config.name == "animals"
    tasks = config.tasks
    assert (tasks.zeroshot, tasks.fewshot, tasks.retrieval) == (ZeroShotSettings(), None, None)
    assert tasks.knn is not None
    opened = open_dataset(config, "zeroshot", ZeroShotSettings())
    assert opened.class_names == ["cat", "dog", "emu"]
    assert opened.templates == ["a photo of a {c}.", "{c}"]
    assert labels(opened.test) == [[0], [2], [1], [1], [0]]
    train = open_dataset(config, "knn", tasks.knn).train
    assert train is not None
    assert train.label_N.tolist() == [0, 1, 2, 2, 1, 0]


@pytest.fixture
def served(layout: Path) -> Iterator[str]:
    """The layout's address on a local HTTP server."""

    class Ranged(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is None:
                super().do_GET()
                return
            start, stop = int(wanted[1]), int(wanted[2]) + 1
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data[start:stop])))
            self.end_headers()
            self.wfile.write(data[start:stop])

        def end_headers(self) -> None:
            self.send_header("Accept-Ranges", "bytes")
            super().end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranged, directory=str(layout.parent)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/animals"
    server.shutdown()
    thread.join()
    server.server_close()


def test_clip_benchmark_folder_by_url(served: str) -> None:
    pytest.importorskip("aiohttp")
    opened = open_dataset(load_dataset_config(served), "zeroshot", ZeroShotSettings())
    assert labels(opened.test) == [[0], [2], [1], [1], [0]]


def test_retrieval_in_a_clip_benchmark_folder(tmp_path: Path) -> None:
    root = tmp_path / "captions"
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("retrieval\n")
    write_tar(root / "test" / "0.tar", samples([{"txt": "one\ntwo \n\nthree"}, {"txt": "four"}, {"txt": " "}]))
    config = load_dataset_config(str(root))
    assert config.tasks.retrieval == RetrievalSettings(max_captions=None, duplicate_captions="each")
    opened = open_dataset(config, "retrieval", RetrievalSettings())
    part, problems = captioned_part(opened.test, RetrievalSettings(max_captions=2))
    gallery = Gallery.of(part, RetrievalSettings(max_captions=2))
    assert gallery.captions == ["one", "two", "four"]
    assert gallery.text_group_M.tolist() == [0, 0, 1]
    assert len(problems) == 1
    assert part.left_out == {"no caption": 1}


def test_shifted_part_with_fewer_classes_is_matched_by_name(layout: Path, tmp_path: Path) -> None:
    other = tmp_path / "hard"
    (other / "test").mkdir(parents=True)
    (other / "test" / "nshards.txt").write_text("1")
    (other / "classnames.txt").write_text("emu\ncat\n")
    write_tar(other / "test" / "0.tar", samples([{"cls": 0}, {"cls": 1}, {"cls": 0}]))
    tree = {"name": "animals", "root": "animals", "shifted": {"hard": {"root": "hard"}}}
    opened = open_dataset(parse(tree, tmp_path), "shift", ShiftSettings())
    assert labels(opened.shifted["hard"]) == [[2], [0], [2]]
    assert opened.shifted["hard"].candidate_classes.tolist() == [0, 2]
    (other / "classnames.txt").write_text("emu\nyak\n")
    with pytest.raises(DatasetError, match=r"shifted.hard: \['yak'\] are not classes of the data set"):
        open_dataset(parse(tree, tmp_path), "shift", ShiftSettings())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "x"}, "nam: Unexpected keyword"),
        ({"metric": "accuracy"}, "metric: Input should be"),
        ({"tasks": {"fewshot": {"shots": [0]}}}, r"tasks.fewshot.shots.0: .*greater than or equal to 1"),
        ({"name": ""}, "name: expected the name of the data set"),
        ({"root": "animals"}, "tars, root: found both, expected one of them"),
        ({"tars": []}, "give the tars, or the root"),
        ({"prompts": ["a photo"]}, "prompts: the template 'a photo' has no slot"),
        ({"prompts": "imagnet"}, "prompts: expected a list of templates .*found 'imagnet'"),
        ({"train": None, "tasks": {"knn": {}}}, "tasks.knn: needs training images"),
        ({"shifted": {}, "tasks": {"shift": {}}}, "tasks.shift: needs at least one part"),
        ({"outliers": {}, "tasks": {"ood": {}}}, "tasks.ood: needs at least one part"),
    ],
)
def test_bad_configs_are_refused(pets: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        parse({**pets, **change}, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"label": "sort"},
            r"sample 's000' has no field 'sort' in its .json member \(found \['captions', 'kind', 'style'\]\)",
        ),
        ({"label": None}, "labels are numbers"),
        ({"label": None, "classes": ["a"]}, "has no .cls member"),
        ({"classes": ["cat", "dog"]}, "has the label 'emu', which is none of the 2 classes"),
        ({"classes": "open_clip:cars"}, "expected a list, a mapping"),
        ({"subset": ["cat", "yak"]}, r"subset: \['yak'\] are none of the 4 classes"),
        ({"filter": {"style": "pen"}}, r"test: filter: style: no image has 'pen'; found \['ink', 'oil'\]"),
        ({"filter": {"ink": "oil"}}, "filter: sample 's000' of test.tar has no field 'ink'"),
        ({"tars": ["nothing.tar"]}, "matches no file"),
        ({"prompts": None}, "zero-shot classification needs templates"),
        ({"group_field": "animal"}, "test: group_field: sample 's000' has no field 'animal'"),
    ],
)
def test_data_that_does_not_fit_the_config_is_refused(
    pets: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset(parse({**pets, **change}, tmp_path), "zeroshot", ZeroShotSettings())


@pytest.mark.parametrize(
    ("task", "key"), [("shift", "shifted"), ("ood", "outliers"), ("knn", "train"), ("fewshot", "train")]
)
def test_task_without_its_parts_is_refused(pets: dict[str, Any], tmp_path: Path, task: str, key: str) -> None:
    del pets[key]
    with pytest.raises(DatasetError, match=f"{task} needs .* under {key}"):
        open_dataset(parse(pets, tmp_path), task, None)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test/nshards.txt", "two", "expected test/nshards.txt with the number of its tars, found 'two'"),
        ("test/nshards.txt", None, "found no such file"),
        ("classnames.txt", None, "classes: labels are numbers"),
        ("classnames.txt", "cat\ndog\n", "has the label '2', which is none of the 2 classes"),
        ("zeroshot_classification_templates.txt", "a photo\n", "'a photo' has no slot"),
        ("dataset_type.txt", "regression", "holds 'regression', expected one of"),
    ],
)
def test_bad_clip_benchmark_folders_are_refused(layout: Path, file: str, content: str | None, message: str) -> None:
    if content is None:
        (layout / file).unlink()
    else:
        (layout / file).write_text(content)
    with pytest.raises(DatasetError, match=message):
        open_dataset(load_dataset_config(layout), "zeroshot", ZeroShotSettings())


def test_files_that_are_not_configs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.yaml"
    for content, message in (("- a", "expected a mapping"), ("a: [", "cannot be read as YAML")):
        path.write_text(content)
        with pytest.raises(DatasetError, match=message):
            load_dataset_config(path)
    with pytest.raises(DatasetError, match="cannot be read as YAML"):
        load_dataset_config(tmp_path / "missing.yaml")


def test_values_of_fields_are_compared_as_names(tmp_path: Path) -> None:
    """Labels, filters and groups: numbers however they are written, and null is no value."""
    values = [(1, "a", "x"), (1.0, True, "x"), ("1", "a", None), (2, True, ""), (None, True, "y"), (2, False, "y")]
    samples = []
    for number, (label, flag, group) in enumerate(values):
        fields = json.dumps({"label": label, "flag": flag, "group": group, "caption": None})
        samples.append((f"s{number}", {"png": image_bytes(number), "json": fields.encode()}))
    tar = write_tar(tmp_path / "values.tar", samples)
    tree = {
        "name": "values",
        "tars": [str(tar)],
        "label": "label",
        "classes": {"1": "one", "2": "two"},
        "prompts": ["{c}"],
        "group_field": "group",
        "filter": {"flag": ["a", "true"]},
    }
    part = open_dataset(parse(tree, tmp_path), "zeroshot", ZeroShotSettings()).test
    assert part.labels_NL[:, 0].tolist() == [0, 0, 0, 1]
    assert sum(count for reason, count in part.left_out.items() if "label" in reason) == 1
    assert part.group_N is not None
    assert part.group_N[0] == part.group_N[1]
    assert len(set(part.group_N.tolist())) == 3
    assert part.notes == {"notes/group_field: no value": 2, "notes/json.caption: null": 4}
    for key, value in {"label": "list", "group_field": "list", "filter": {"list": "a"}}.items():
        bad = json.dumps({"label": "1", "flag": "a", "list": {"a": 1}}).encode()
        write_tar(tar, [("s0", {"png": image_bytes(0), "json": bad})])
        one = {**tree, "group_field": None, "filter": {"flag": "a"}, key: value}
        with pytest.raises(DatasetError, match="field 'list' holds an object, expected a text"):
            open_dataset(parse(one, tmp_path), "zeroshot", ZeroShotSettings())


def test_sources_of_captions_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="captions: found 'jpg', expected the extension of a text member"):
        parse({"name": "x", "tars": ["x.tar"], "captions": {"jpg": 1}}, tmp_path)


def npy(value: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(value))
    return file.getvalue()


@pytest.fixture
def multilabel(tmp_path: Path) -> Path:
    """A multi-label folder as `clip_benchmark_export_wds` writes it: a 0 or 1 for each class of each image."""
    root = tmp_path / "voc"
    (root / "test").mkdir(parents=True)
    (root / "test/nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("multilabel\n")
    (root / "classnames.txt").write_text("cat\ndog\nemu\n")
    (root / "zeroshot_classification_templates.txt").write_text("{c}\n")
    vectors = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]]
    made = [(f"s{n}", {"png": image_bytes(n), "npy": npy(vector)}) for n, vector in enumerate(vectors)]
    write_tar(root / "test/0.tar", made)
    return root


def test_label_vectors_of_a_clip_benchmark_folder(multilabel: Path) -> None:
    config = load_dataset_config(multilabel)
    assert config.tasks == TasksConfig(zeroshot=ZeroShotSettings())
    opened = open_dataset(config, "zeroshot", ZeroShotSettings())
    assert labels(opened.test) == [[0], [0, 1], [], [1, 2]]
    assert opened.metric == "mean_average_precision"
    # The mean average precision is clip-benchmark's, an image of no class included.
    peer = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    scores_NC = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    result = evaluate_classifier(LinearClassifier(np.eye(3, dtype=np.float32)), scores_NC, opened.test)
    target = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]])
    expected = peer.average_precision_per_class(torch.from_numpy(scores_NC), target).mean()
    assert result.metrics["mean_average_precision"] == pytest.approx(float(expected), abs=1e-6)
    assert np.isnan(result.items["top1"]).tolist() == [False, False, True, False]
    assert np.nanmean(result.items["top1"]) == pytest.approx(result.metrics["top1"])


class Unpickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy([0, 1, 2]), "other numbers than 0 and 1"),
        (npy([[0, 1, 0]]), r"holds int64 of shape \(1, 3\), expected a vector"),
        (npy(["a", "b", "c"]), "expected a vector"),
        (npy([0, 1, 0])[:-3], "label: "),
        (b"", "label: "),
        (npy(np.array([Unpickled()], dtype=object)), "allow_pickle=False"),
        (npy(np.zeros(200_000)), "has 1600128 bytes, expected at most 1048576"),
    ],
)
def test_bad_label_vector_is_a_bad_sample(
    multilabel: Path, member: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [("s0", {"png": image_bytes(0), "npy": npy([0, 1, 0])}), ("s1", {"png": image_bytes(1), "npy": member})]
    write_tar(multilabel / "test/0.tar", made)
    test = open_dataset(load_dataset_config(multilabel), "zeroshot", ZeroShotSettings()).test
    assert (len(test.rows), sum(test.left_out.values())) == (1, 1)
    assert re.search(message, test.data.skipped[0])
    assert "unpickled" not in capsys.readouterr().out


def test_label_vector_of_another_length_is_refused(multilabel: Path) -> None:
    (multilabel / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(DatasetError, match=r"'s0' of 0\.tar has a vector of 3 labels, expected one for each of 2 cl"):
        open_dataset(load_dataset_config(multilabel), "zeroshot", ZeroShotSettings())


def test_samples_without_a_label_are_counted(layout: Path, tmp_path: Path) -> None:
    made = samples([{"cls": 0}, {"txt": "no label"}, {"cls": 2}])
    write_tar(layout / "test/1.tar", made)
    config = load_dataset_config(layout)
    assert open_dataset(config, "zeroshot", ZeroShotSettings()).test.left_out == {"no label": 1}
    with pytest.raises(DatasetError, match=r"sample 's001' has no \.cls member"):
        open_dataset(replace(config, on_bad="error"), "zeroshot", ZeroShotSettings())


def test_captions_are_needed_for_retrieval(layout: Path) -> None:
    opened = open_dataset(load_dataset_config(layout), "retrieval", RetrievalSettings())
    with pytest.raises(ValueError, match=r"none of 5 images can be used .* 'test0000': no caption"):
        captioned_part(opened.test, RetrievalSettings())
    with pytest.raises(ValueError, match="'test0000': group_field: no field 'concept', only"):
        captioned_part(opened.test, RetrievalSettings(group_field="concept"))


def test_documented_example_is_valid() -> None:
    text = (ROOT / "docs/datasets.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    tasks = parse_dataset_config(yaml.safe_load(example), str(ROOT / "docs/set.yaml")).tasks
    assert tasks.fewshot == FewShotSettings(shots=[1, 5], seeds=[0, 1, 2])


@pytest.mark.parametrize("path", sorted((ROOT / "configs/eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_open(path: Path) -> None:
    config = load_dataset_config(path)
    assert isinstance(config, DatasetConfig)
    for task in ("zeroshot", "ood", "retrieval", "shift"):
        settings = getattr(config.tasks, task)
        if settings is not None:
            assert len(open_dataset(config, task, settings).test.rows) > 300

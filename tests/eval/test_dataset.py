"""Described data sets: what a description may say, which pictures and labels it means, CLIP_benchmark's layout."""

import http.server
import io
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import write_tar
from threetowers.eval.datasets.config import (
    BadDescription,
    Description,
    FewShot,
    Retrieval,
    Shift,
    Source,
    ZeroShot,
    parse_description,
)
from threetowers.eval.datasets.dataset import Part, as_gallery, load_description, open_set

ROOT = Path(__file__).parents[2]


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def samples(rows: list[dict[str, Any]], prefix: str = "s") -> list[tuple[str, dict[str, bytes]]]:
    """Samples with JSON fields; `cls` and `txt` become members of their own."""
    made = []
    for number, fields in enumerate(rows):
        members = {"png": picture(number)}
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
    made.append(("broken", {"png": b"not a picture", "json": b"{}"}))
    write_tar(tmp_path / "test.tar", made)
    write_tar(tmp_path / "train.tar", samples([dict(row) for row in rows for _ in range(2)], "t"))
    return {
        "name": "pets",
        "tars": ["test.tar"],
        "label": "kind",
        "prompts": ["a {c}"],
        "learn": {"tars": ["train.tar"]},
        "shifted": {"oil": {"where": {"style": "oil"}}},
        "outliers": {"foxes": {"where": {"kind": "fox"}}},
    }


def described(tree: dict[str, Any], folder: Path) -> Source:
    return parse_description(tree, str(folder / "pets.yaml"))


def labels(part: Part) -> list[list[int]]:
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
    opened = open_set(described(pets, tmp_path), "fewshot", FewShot())
    assert opened.names == ["cat", "dog", "emu", "fox"]
    assert labels(opened.test) == [[0]] * 3 + [[1]] * 3 + [[2]] * 3 + [[3]] * 3
    assert opened.test.left_out == {"unreadable": 1, "outside_subset": 0, "without_label": 0}
    assert opened.learn is not None
    assert len(opened.learn.rows) == 24


def test_names_by_value_and_a_subset(pets: dict[str, Any], tmp_path: Path) -> None:
    classes = {"fox": "red fox", "emu": "big bird", "cat": "cat", "dog": "dog"}
    opened = open_set(
        described({**pets, "classes": classes, "subset": ["cat", "red fox"]}, tmp_path), "zeroshot", ZeroShot()
    )
    assert opened.names == ["red fox", "cat"]  # in the order of the classes
    assert labels(opened.test) == [[1]] * 3 + [[0]] * 3
    assert opened.test.left_out["outside_subset"] == 6
    assert [p.fields["kind"] for p in opened.test.pictures()] == ["cat"] * 3 + ["fox"] * 3


def test_parts_take_what_they_leave_out_from_the_set(pets: dict[str, Any], tmp_path: Path) -> None:
    tree = {**pets, "where": {"style": ["ink"], "kind": ["cat", "dog", "emu"]}}
    opened = open_set(described(tree, tmp_path), "shift", Shift())
    assert len(opened.test.rows) == 6
    assert [p.fields["style"] for p in opened.shifted["oil"].pictures()] == ["oil"] * 3
    assert opened.shifted["oil"].data is opened.test.data  # read once, embedded once
    opened = open_set(described(tree, tmp_path), "ood", None)
    assert [p.fields["kind"] for p in opened.outliers["foxes"].pictures()] == ["fox"] * 2
    assert opened.templates == ["a {c}"]
    assert opened.names == ["cat", "dog", "emu"]


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
    opened = open_set(described(tree, tmp_path), "zeroshot", ZeroShot())
    assert labels(opened.test) == [[0, 1], [2], [1]]
    assert opened.test.left_out["without_label"] == 1
    with pytest.raises(ValueError, match="need one label a picture"):
        _ = opened.test.label_N


def test_a_folder_in_clip_benchmark_s_layout_describes_itself(layout: Path) -> None:
    source = load_description(layout)
    assert source.description.name == "animals"
    tasks = source.description.tasks
    assert (tasks.zeroshot, tasks.fewshot, tasks.retrieval) == (ZeroShot(), None, None)
    assert tasks.knn is not None
    opened = open_set(source, "zeroshot", ZeroShot())
    assert opened.names == ["cat", "dog", "emu"]
    assert opened.templates == ["a photo of a {c}.", "{c}"]
    assert labels(opened.test) == [[0], [2], [1], [1], [0]]
    learn = open_set(source, "knn", tasks.knn).learn
    assert learn is not None
    assert learn.label_N.tolist() == [0, 1, 2, 2, 1, 0]


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


def test_the_layout_by_url(served: str) -> None:
    pytest.importorskip("aiohttp")
    opened = open_set(load_description(served), "zeroshot", ZeroShot())
    assert labels(opened.test) == [[0], [2], [1], [1], [0]]


def test_retrieval_in_clip_benchmark_s_layout(tmp_path: Path) -> None:
    root = tmp_path / "captions"
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("retrieval\n")
    write_tar(root / "test" / "0.tar", samples([{"txt": "one\ntwo \n\nthree"}, {"txt": "four"}, {"txt": " "}]))
    source = load_description(str(root))
    assert source.description.tasks.retrieval == Retrieval()
    opened = open_set(source, "retrieval", Retrieval())
    gallery = as_gallery(opened.test, None, 2)
    assert [p.captions for p in gallery.pictures] == [("one", "two"), ("four",)]
    assert len({p.group for p in gallery.pictures}) == 2


def test_a_shifted_set_with_fewer_classes_is_matched_by_name(layout: Path, tmp_path: Path) -> None:
    other = tmp_path / "hard"
    (other / "test").mkdir(parents=True)
    (other / "test" / "nshards.txt").write_text("1")
    (other / "classnames.txt").write_text("emu\ncat\n")
    write_tar(other / "test" / "0.tar", samples([{"cls": 0}, {"cls": 1}, {"cls": 0}]))
    tree = {"name": "animals", "root": "animals", "shifted": {"hard": {"root": "hard"}}}
    opened = open_set(described(tree, tmp_path), "shift", Shift())
    assert labels(opened.shifted["hard"]) == [[2], [0], [2]]
    assert opened.shifted["hard"].told_apart.tolist() == [0, 2]
    (other / "classnames.txt").write_text("emu\nyak\n")
    with pytest.raises(BadDescription, match=r"shifted.hard: \['yak'\] are no classes of the set"):
        open_set(described(tree, tmp_path), "shift", Shift())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "x"}, "nam: Unexpected keyword"),
        ({"metric": "accuracy"}, "metric: Input should be"),
        ({"tasks": {"fewshot": {"shots": [0]}}}, r"tasks.fewshot.shots.0: .*greater than or equal to 1"),
        ({"name": ""}, "name: expected the name of the set"),
        ({"root": "animals"}, "tars, root: give one of them"),
        ({"tars": []}, "give the tars, or the root"),
        ({"prompts": ["a photo"]}, "prompts: the template 'a photo' has no slot"),
        ({"prompts": "imagnet"}, "prompts: 'imagnet' is no shipped prompt set"),
        ({"learn": None, "tasks": {"knn": {}}}, "tasks.knn: needs pictures to learn from"),
        ({"shifted": {}, "tasks": {"shift": {}}}, "tasks.shift: needs at least one set"),
        ({"outliers": {}, "tasks": {"ood": {}}}, "tasks.ood: needs at least one set"),
    ],
)
def test_bad_descriptions_are_refused(
    pets: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadDescription, match=message):
        described({**pets, **change}, tmp_path)


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
        ({"where": {"style": "pen"}}, "set: none of 12 pictures is left .*the first of 1 problems: .*broken"),
        ({"where": {"ink": "oil"}}, "where: sample 's000' of test.tar has no field 'ink'"),
        ({"tars": ["nothing.tar"]}, "matches no file"),
        ({"prompts": None}, "zero-shot classification needs templates"),
        ({"unit": "animal"}, "set: unit: sample 's000' has no field 'animal'"),
    ],
)
def test_sets_that_do_not_fit_are_refused(
    pets: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadDescription, match=message):
        open_set(described({**pets, **change}, tmp_path), "zeroshot", ZeroShot())


@pytest.mark.parametrize(
    ("task", "key"), [("shift", "shifted"), ("ood", "outliers"), ("knn", "learn"), ("fewshot", "learn")]
)
def test_a_task_without_its_pictures_is_refused(pets: dict[str, Any], tmp_path: Path, task: str, key: str) -> None:
    del pets[key]
    with pytest.raises(BadDescription, match=f"{task} needs .* under {key}"):
        open_set(described(pets, tmp_path), task, None)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test/nshards.txt", "two", "expected test/nshards.txt with the number of its tars, found 'two'"),
        ("test/nshards.txt", None, "found no such file"),
        ("classnames.txt", None, "classes: labels are numbers"),
        ("classnames.txt", "cat\ndog\n", "has the label '2', which is none of the 2 classes"),
        ("zeroshot_classification_templates.txt", "a photo\n", "'a photo' has no slot"),
        ("dataset_type.txt", "multilabel", "says 'multilabel', expected one of"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: Path, file: str, content: str | None, message: str) -> None:
    if content is None:
        (layout / file).unlink()
    else:
        (layout / file).write_text(content)
    with pytest.raises(BadDescription, match=message):
        open_set(load_description(layout), "zeroshot", ZeroShot())


def test_a_file_that_is_no_description_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.yaml"
    for content, message in (("- a", "expected a mapping"), ("a: [", "cannot be read as YAML")):
        path.write_text(content)
        with pytest.raises(BadDescription, match=message):
            load_description(path)
    with pytest.raises(BadDescription, match="cannot be read as YAML"):
        load_description(tmp_path / "missing.yaml")


def test_captions_are_needed_for_retrieval(layout: Path) -> None:
    opened = open_set(load_description(layout), "retrieval", Retrieval())
    with pytest.raises(ValueError, match="none of 5 pictures has a caption"):
        as_gallery(opened.test, None, 5)
    with pytest.raises(ValueError, match="group_field: sample 'test0000' has no field 'concept', only"):
        as_gallery(opened.test, "concept", 5)


def test_the_documented_description_is_one() -> None:
    text = (ROOT / "docs/datasets.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    tasks = parse_description(yaml.safe_load(example), str(ROOT / "docs/set.yaml")).description.tasks
    assert tasks.fewshot == FewShot(shots=[1, 5], seeds=[0, 1, 2])


@pytest.mark.parametrize("path", sorted((ROOT / "configs/eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_descriptions_open(path: Path) -> None:
    source = load_description(path)
    assert isinstance(source.description, Description)
    for task in ("zeroshot", "ood", "retrieval", "shift"):
        settings = getattr(source.description.tasks, task)
        if settings is not None:
            assert len(open_set(source, task, settings).test.rows) > 300

"""The report: complete or with any part missing, safe with hostile text, and free of outside requests."""

import dataclasses
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from threetowers.eval.metrics.recall import evaluate_retrieval
from threetowers.eval.record import EvalRecord, EvalSpec, Example, ExampleItem, TarRef, digest
from threetowers.eval.report.page import render
from threetowers.eval.report.results import RunResult
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.report.training_curves import MAX_POINTS, gallery_panel, read_metrics, thinned, training_panels

HOSTILE = """</span><script>alert(1)</script><img src="x" onerror='y'> | `$x^2$` & *b* \ud800 font: 3px"""
VOID = {"meta", "img", "br", "link", "input", "hr"}


def png(colour: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (colour, 40, 90)).save(buffer, "PNG")
    return buffer.getvalue()


Items = dict[str, np.ndarray[Any, Any]]


def retrieval_record(run: str, gallery: str, noise: float) -> tuple[EvalRecord, Items]:
    rng = np.random.default_rng(len(gallery))
    image = rng.standard_normal((41, 12))
    text = np.repeat(image, 3, axis=0) + noise * rng.standard_normal((123, 12))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    result = evaluate_retrieval(image, text, np.arange(41), np.repeat(np.arange(41), 3), image_hashes=range(41))
    spec = EvalSpec("retrieval", gallery, run, f"model-{run}", 90, (TarRef("t.tar", "ff", 41),), "crop", "float32")
    record = EvalRecord(spec, result.metrics(), result.counts(), digest([gallery]), digest(["c"]), 1.0)
    groups = {"image_to_text/group": np.arange(41), "text_to_image/group": np.repeat(np.arange(41), 3)}
    return record, dict(result.items()) | groups


def with_examples(record: EvalRecord, thumbnails: list[str]) -> EvalRecord:
    answers = tuple(ExampleItem(HOSTILE, thumbnails[i], 0.5, i == 1) for i in range(5))
    texts = Example("Caption → images", ExampleItem(HOSTILE), answers, 2)
    images = Example(
        "Image → captions", ExampleItem(HOSTILE, thumbnails[5]), (ExampleItem(HOSTILE, None, 0.25, True),), 1
    )
    return dataclasses.replace(record, examples=(texts, images))


def write_metrics(path: Path, steps: int, terms: tuple[str, ...]) -> Path:
    lines = []
    for step in range(1, steps + 1):
        entry: dict[str, Any] = {"step": step, "loss": 5 / step, "lr": 0.1, "images_per_s": 99.0, "grad_norm": None}
        entry |= {"data_wait": 0.1, "surprise": 3, "note": "text", "flag": True, "nested": {"a": 1}}
        for term in terms:
            entry |= {f"terms/{term}/{kind}": 1.0 + step for kind in ("loss", "accuracy", "scale", "unheard_of")}
        lines.append(json.dumps(entry))
    path.write_text("\n".join([*lines, '{"step": 9'] if steps else []))
    return path


def full_run(name: str, noise: float, folder: Path, galleries: tuple[str, ...] = ("noto", "twemoji")) -> RunResult:
    thumbnails = ThumbnailStore(folder / "thumbnails")
    names = [thumbnails.add(png(number)) for number in range(6)]
    found = [retrieval_record(name, gallery, noise) for gallery in galleries]
    records = [with_examples(found[0][0], names), *(record for record, _ in found[1:])]
    return RunResult(
        name=name,
        method="3T",
        records=records,
        items={record.file_name: items for record, (_, items) in zip(records, found, strict=True)},
        thumbnails={name_: str(thumbnails.data_uri(name_)) for name_ in names},
        metrics=read_metrics(write_metrics(folder / f"{name[:9]}.jsonl", 40, ("image-text", "text-third"))),
        stage_seconds={"cache": 61.0, "train": 3723.0},
        note=HOSTILE,
    )


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def rendered(results: list[RunResult], folder: Path, **options: str) -> tuple[Page, str, str]:
    paths = render(results, folder / "report", **options)
    html, markdown = paths.html.read_text("utf-8"), paths.markdown.read_text("utf-8")
    return Page(html), html, markdown


def test_page_makes_no_outside_requests(tmp_path: Path) -> None:
    page, html, _ = rendered([full_run("clip", 1.5, tmp_path), full_run("3t", 0.7, tmp_path)], tmp_path)
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    targets = [(tag, value) for tag, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert {tag for tag, _ in targets} == {"img", "use"}
    assert all(value.startswith(("data:image/", "#")) for _, value in targets)
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    run = dataclasses.replace(full_run("a", 1.0, tmp_path, (HOSTILE, "noto")), name=HOSTILE, method=HOSTILE)
    page, html, markdown = rendered([run], tmp_path, title=HOSTILE, description=HOSTILE)
    assert "<script" not in html
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    visible = HOSTILE.replace("\ud800", "?")
    assert page.text.count(visible) >= 5  # title, heading, description, run, query, captions
    assert "<script" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and "script" in line]
    assert rows[0].replace("\\|", "").count("|") == 1 + 2 + 9  # the comparison: two heads and nine values


def test_best_values_are_marked_and_chance_is_shown(tmp_path: Path) -> None:
    good, bad = full_run("good", 0.5, tmp_path), full_run("bad", 2.5, tmp_path)
    _, html, markdown = rendered([bad, good], tmp_path)
    table = [line for line in markdown.splitlines() if line.startswith(("| good | 3T", "| bad | 3T", "| chance"))]
    assert "**" not in table[0]
    assert table[1].count("**") == 2 * 8
    mean = np.mean([record.metrics["text_to_image/recall@1"] for record in good.records])
    assert f"| good | 3T | **{100 * mean:.1f}** |" in table[1]
    assert table[2].startswith(f"| chance |  | {100 / 41:.1f} |")
    assert "(best)" in html
    assert "1 h 02 min" in html


def test_warns_of_different_data_and_missing_galleries(tmp_path: Path) -> None:
    first = full_run("first", 1.0, tmp_path, ("noto", "twemoji", "fluent"))
    second = full_run("second", 1.0, tmp_path, ("noto", "twemoji"))
    other_set = dataclasses.replace(second.records[0], sample_ids=digest(["other"]))
    second = dataclasses.replace(second, records=[other_set, *second.records[1:]])
    page, _, markdown = rendered([first, second, RunResult("empty", "CLIP", [])], tmp_path)
    for text in (" ".join(page.text), markdown):
        assert "second was not evaluated on fluent; the means leave these out." in text
        assert "The runs saw different samples of noto: their numbers are not comparable." in text
        assert "empty has no retrieval result." in text
        assert "different samples of twemoji" not in text
    assert "mean of 2 galleries" in markdown


def test_warns_of_ties(tmp_path: Path) -> None:
    collapsed = np.ones((9, 1))
    result = evaluate_retrieval(collapsed, collapsed, np.arange(9), np.arange(9))
    record = dataclasses.replace(
        retrieval_record("x", "noto", 1.0)[0], metrics=result.metrics(), counts=result.counts()
    )
    _, _, markdown = rendered([RunResult("x", "CLIP", [record])], tmp_path)
    assert "Ties decide 100.0 points of x's recall of noto, text → image; they count against it." in markdown
    assert "| noto | x | 9 of 9 | 0.0 | 100.0 | 9 of 9 | 0.0 | 100.0 |" in markdown
    assert "| x | CLIP | 0.0 |" in markdown


@pytest.mark.parametrize("missing", ["records", "items", "metrics", "stage_seconds", "thumbnails"])
def test_any_part_may_be_missing(missing: str, tmp_path: Path) -> None:
    empty: dict[str, Any] = {"metrics": None, "stage_seconds": {}, "items": {}, "thumbnails": {}}
    runs = [full_run("one", 1.0, tmp_path), full_run("two", 1.0, tmp_path)]
    lacking = dataclasses.replace(runs[0], **{missing: empty.get(missing, ())})
    sections = []
    for results in ([lacking], [lacking, runs[1]]):
        page, _, _ = rendered(results, tmp_path)
        sections.append({value for tag, name, value in page.attributes if (tag, name) == ("section", "id")})
    everything = {"retrieval", "significance", "galleries", "examples", "training", "time", "definitions"}
    gone = {
        "records": {"galleries", "significance", "examples"},
        "items": {"significance"},
        "metrics": {"training"},
        "stage_seconds": {"time"},
    }
    assert sections == [everything - gone.get(missing, set()), everything]


def test_run_without_records_and_with_empty_metrics(tmp_path: Path) -> None:
    nothing = RunResult("n", "CLIP", [], metrics=read_metrics(write_metrics(tmp_path / "empty.jsonl", 0, ())))
    page, _, markdown = rendered([nothing], tmp_path)
    assert "No retrieval results to compare." in page.text
    assert "has no retrieval result" not in markdown  # where nobody has one, that is no warning


def test_verdicts_on_differences(tmp_path: Path) -> None:
    runs = [full_run(name, noise, tmp_path) for name, noise in (("good", 0.5), ("bad", 3.5), ("same", 0.5))]
    _, html, markdown = rendered(runs, tmp_path)
    rows = [line for line in markdown.splitlines() if "| text\\_to\\_image/recall@1 |" in line and " over " in line]
    lines = {line.split(" | ")[3]: line for line in rows}
    assert "**real**" in lines["good over bad"]
    assert "**" not in lines["good over same"]
    assert "| +0.0 |" in lines["good over same"]
    assert "may be chance" in lines["good over same"]
    assert "Recall against k" in html


def other(task: str, run: str, metrics: dict[str, float]) -> EvalRecord:
    record, _ = retrieval_record(run, "emoji", 1.0)
    return dataclasses.replace(record, spec=dataclasses.replace(record.spec, task=task), metrics=metrics)


def test_other_tasks_have_their_table_and_plots(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    results = []
    for name in ("a", "b"):
        zeroshot = other("zeroshot", name, {"top1": 0.51234})
        shots = {f"{k}-shot/top1": 0.1 * k for k in (1, 5)} | {"1-shot/top1_deviation": 0.02, "1-shot/top1_seed3": 0.1}
        fewshot = other("fewshot", name, shots)
        judged = {"confidence": rng.random(60, np.float32), "top1": (rng.random(60) < 0.5).astype(np.float32)}
        results.append(RunResult(name, "CLIP", [zeroshot, fewshot], items={zeroshot.file_name: judged}))
    page, html, markdown = rendered(results, tmp_path)
    assert "| zeroshot | emoji | top1 | 0.5123 | 0.5123 |" in markdown
    assert "1-shot/top1\\_deviation" in markdown
    assert "seed3" not in markdown
    assert {"Few-shot, emoji", "Calibration of zeroshot, emoji"} <= set(page.text)
    assert html.count("training images a class") == 1


def test_thumbnails_are_stored_once_and_small(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    thumbnails = ThumbnailStore(tmp_path / "thumbnails")
    large, small = thumbnails.add(buffer.getvalue()), thumbnails.add(png(3))
    assert thumbnails.add(png(3)) == small
    assert sorted(p.name for p in thumbnails.folder.iterdir()) == sorted([large, small])
    uri = thumbnails.data_uri(large)
    assert uri is not None
    assert uri.startswith("data:image/webp;base64,")
    assert len(uri) < 100_000 < len(buffer.getvalue())
    with pytest.raises(ValueError, match="cannot be decoded"):
        thumbnails.add(b"<svg onload='x'/>")
    (tmp_path / "secret.png").write_bytes(png(1))
    assert thumbnails.data_uri("../secret.png") is None
    assert thumbnails.data_uri("missing.png") is None


def test_bad_results_are_refused(tmp_path: Path) -> None:
    run = full_run("a", 1.0, tmp_path)
    with pytest.raises(ValueError, match="a different name for each, got \\['a', 'a'\\]"):
        render([run, run], tmp_path)
    with pytest.raises(ValueError, match="at least one run"):
        render([], tmp_path)
    twice = dataclasses.replace(run, records=[run.records[0], run.records[0]])
    with pytest.raises(ValueError, match="run 'a' has two retrieval records of gallery 'noto'"):
        render([twice], tmp_path)


def test_read_metrics_with_gaps_and_unknown_names(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.0, "x/y": 1}\n{"step": 2, "loss": null}\n\nnot json\n{"loss": 1}\n[1]\n'
        '{"step": 3, "loss": NaN, "flag": true}\n{"step": 4, "loss": 1.5}\n{"step": 5, "lo'
    )
    metrics = read_metrics(path)
    assert metrics.unreadable == 4
    assert set(metrics.curves) == {"loss", "x/y"}
    steps, values = metrics.curves["loss"]
    assert steps.tolist() == [1, 4]
    assert values.tolist() == [2.0, 1.5]


def test_training_panels_show_every_run_and_thin_long_ones(tmp_path: Path) -> None:
    short = read_metrics(write_metrics(tmp_path / "a", 3, ("image-text",)))
    long = read_metrics(write_metrics(tmp_path / "b", 9000, ("image-text", "text-third")))
    sections = training_panels([short, None, long])
    panels = {(heading, panel.title): panel.svg for heading, group in sections.items() for panel in group}
    shared = panels["Loss of each pair term", "image-text"]
    assert "var(--run-0)" in shared
    assert "var(--run-2)" in shared
    assert "var(--run-1)" not in shared
    assert "var(--run-0)" not in panels["Scale", "text-third"]
    drawn = thinned(long)
    assert len(drawn["loss"][0]) <= 4 * MAX_POINTS
    assert "surprise" not in drawn
    assert "terms/text-third/scale" in drawn
    assert not any("surprise" in title or "unheard" in title for _, title in panels)
    assert all(svg.count(" L ") < 3 * MAX_POINTS for svg in panels.values())


def test_names_in_plots_are_escaped() -> None:
    names = ["$x_2$ <b>&", "font: 3px; #010203", "a name of more than eighteen letters"]
    svg = gallery_panel("R@1", names, [[0.1, 0.2, float("nan")]], [0.0, 0.1, 0.2]).svg
    page = Page(svg)
    assert [text for text in page.text if text.strip() and not text[0].isdigit()] == [
        "R@1 in percent",
        "$x_2$ <b>&",
        "font: 3px; #010203",
        "a name of more th…",
    ]

"""The report from a few made-up results: its content and its order."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from reproduce.claims import load_claims
from reproduce.experiment import VALIDATION
from reproduce.folder import Folder, read_json, write_json
from reproduce.plan import Experiment, Plan, load_plan
from reproduce.report.page import write_report
from reproduce.scores import choose_rates
from tests.reproduce.factories import finish

CONFIGS = Path(__file__).parents[2] / "configs/reproduce"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(CONFIGS / "experiments.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> Folder:
    """CLIP 0.5; LiT and 3T by teacher; an ablation that is better than what it ablates."""
    folder = Folder(tmp_path_factory.mktemp("out"))
    write_json(folder["data/splits.json"], {"styles": {}, "samples": {"train": 1234, "teacher": 56}})
    quality = {"in-domain": (0.6, 0.7), "fashion": (0.3, 0.55), "random": (0.2, 0.5)}
    for seed in (0, 1, 2):
        finish(folder, Experiment("clip", None, None, seed), 0.5)
        for teacher, (lit, three) in quality.items():
            finish(folder, Experiment("lit", teacher, None, seed), lit)
            finish(folder, Experiment("3t", teacher, None, seed), three, [("0.5", 0.8), ("1", 0.6)])
    finish(folder, Experiment("3t", "in-domain", "no-text-third", 0), 0.9)
    finish(folder, Experiment("3t", "in-domain", "live", 0), 0.7)
    finish(folder, Experiment("lit", "in-domain", "double-lit", 0), 0.4)
    finish(folder, Experiment("3t", "in-domain", "double-3t", 0), 0.8)
    for number, teacher in enumerate(quality):
        write_json(folder[f"fits/{teacher}.json"], {"fit": 0.6 - 0.2 * number, "record": ""})
    return folder


@pytest.fixture(scope="module")
def texts(plan: Plan, folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    claims, missing = load_claims(CONFIGS / "claims.yaml"), {"lite0": "no such package"}
    docs = tmp_path_factory.mktemp("docs")
    write_report(plan.without(list(missing)), claims, folder, docs, missing)
    for name in re.findall(r"\]\((results/.*?)\)", (docs / "RESULTS.md").read_text()):
        assert ElementTree.parse(docs / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    return (docs / "RESULTS.md").read_text(), (docs / "results.html").read_text()


def row(markdown: str, start: str) -> str:
    found: str = re.findall(rf"^\| (?:\d+\. )?{re.escape(start)}.*$", markdown, re.MULTILINE)[0]
    return found


def test_differences_from_the_papers_come_first(texts: tuple[str, str]) -> None:
    headings = re.findall(r"^#+ (.*)$", texts[0], re.MULTILINE)
    assert headings[1:3] == ["What differs from the papers", "Claims"]
    assert "1,234 emoji drawings of 48 pixels" in texts[0]
    assert "teacher `lite0`, which could not be had on this machine (no such package)" in texts[0]


def test_claims_of_every_verdict_are_listed(texts: tuple[str, str]) -> None:
    markdown = texts[0]
    assert "| holds |" in row(markdown, "3T retrieves better than LiT where the teacher has the main tower")
    assert "| holds |" in row(markdown, "3T is not hurt by a useless teacher")
    assert "| does not hold |" in row(markdown, "Dropping the text-third term hurts retrieval")
    assert "cannot be told here" in row(markdown, "3T retrieves better than training from scratch")
    assert re.search(r"\| Of all claims that were measured \| \d+ \|\n.*\n\| holds \| [1-9]", markdown)
    assert "Not measured: retrieval with lite2" in row(markdown, "3T retrieves better than training from scratch")
    assert "Not measured in this run: " in markdown
    assert "MS-CLIP classifies better" in markdown.partition("Not measured in this run: ")[2]


def test_numbers_are_those_of_the_records(texts: tuple[str, str], folder: Folder) -> None:
    facts = read_json(folder.finished("clip-seed0"))
    record = read_json(folder["records"] / facts["records"]["0"]["retrieval"])
    sides = [record["metrics"][f"original/{side}/recall@1"] for side in ("image_to_text", "text_to_image")]
    assert f"| clip | - | {100 * sum(sides) / 2:.1f} \\[" in texts[0]
    assert re.search(r"Of retrieval, R@1: \d+ items of \d+ concepts; ", texts[0])
    assert "25 of" in texts[0]  # 3 of clip, 2 x 3 x 3, and four ablations


def test_trends_show_measured_conditions_only(texts: tuple[str, str]) -> None:
    rows = texts[0].partition("3T over LiT as training grows")[2].partition("###")[0]
    assert "| twice as many |" in rows
    assert "| four cached random crops |" not in texts[0]


def test_slopes_are_those_of_the_teachers(texts: tuple[str, str]) -> None:
    """Fits 0.6, 0.4, 0.2; 3T 0.7, 0.55, 0.5; LiT 0.6, 0.3, 0.2: for ten points of fit 5, 10 and -5 points."""
    rows = texts[0].partition("### 3T over LiT by the teacher's fit")[2].partition("##")[0]
    line = next(line for line in rows.splitlines() if line.startswith("| all | retrieval, R@1 |"))
    first, second, difference = (float(cell.split()[0]) for cell in line.split(" | ")[2:5])
    assert (first, second, difference) == pytest.approx((5, 10, -5), abs=0.7)
    assert first - second == pytest.approx(difference, abs=0.11)
    assert "| large arm | " not in rows  # one of them was to be had, which makes no line


def test_page_has_all_plots_and_no_outside_request(texts: tuple[str, str]) -> None:
    markdown, page = texts
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(titles) == page.count("<svg") == 8
    assert "retrieval, R@1 against the seconds spent; hollow: a live teacher, by arithmetic" in titles
    assert markdown.count("](results/") == 8
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "<script" not in page


def test_rates_are_chosen_by_validation(plan: Plan, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for trial in plan.trials():
        finish(folder, trial, {3e-4: 0.2, 1e-3: 0.6, 3e-3: 0.4}[trial.rate or 0])
    assert choose_rates(plan, folder) == {method: 1e-3 for method in plan.methods}
    tried = read_json(folder["rates.json"])["tried"]["lit"]
    assert list(tried) == ["0.0003", "0.001", "0.003"]
    assert VALIDATION in read_json(folder.finished(plan.trials()[0].name))["records"]["0"]

"""The committed emoji set, read as a user reads it: plain webdataset, PIL and the README's numbers."""

import gc
import io
import json
import re
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

FOLDER = Path(__file__).parents[2] / "data" / "emoji"
STATS: dict[str, Any] = json.loads((FOLDER / "stats.json").read_text())
PLAN: dict[str, str] = json.loads((FOLDER / "splits.json").read_text())
FIELDS = {"captions", "concept", "label", "style", "group", "subgroup"}


def tars(split: str) -> list[Path]:
    return sorted(FOLDER.glob(f"{split}-*.tar"))


@pytest.fixture(scope="module")
def samples() -> dict[str, list[dict[str, Any]]]:
    """Every sample of every split: key, WebP bytes, and the JSON's fields."""
    found: dict[str, list[dict[str, Any]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing its tars to the garbage collector
        for split in STATS["splits"]:
            stream = webdataset.WebDataset([str(path) for path in tars(split)], shardshuffle=False)
            found[split] = [{"key": s["__key__"], "webp": s["webp"], **json.loads(s["json"])} for s in stream]
        del stream
        gc.collect()
    return found


def test_the_tars_are_those_of_the_stats() -> None:
    for split, row in STATS["splits"].items():
        assert [path.name for path in tars(split)] == [f"{split}-{i:06d}.tar" for i in range(row["tars"])]
        assert sum(path.stat().st_size for path in tars(split)) == row["bytes"]


def test_counts_equal_the_stats(samples: dict[str, list[dict[str, Any]]]) -> None:
    for split, row in STATS["splits"].items():
        captions = {sample["concept"]: sample["captions"] for sample in samples[split]}
        assert Counter(sample["style"] for sample in samples[split]) == row["images"]
        assert len(captions) == row["concepts"]
        assert sum(map(len, captions.values())) == row["captions"]


def test_every_image_decodes_to_128_rgb(samples: dict[str, list[dict[str, Any]]]) -> None:
    for sample in (sample for split in samples.values() for sample in split):
        with Image.open(io.BytesIO(sample["webp"]), formats=["WEBP"]) as image:
            image.load()
            assert (image.size, image.mode) == ((128, 128), "RGB"), sample["key"]
            assert len(set(image.tobytes())) > 1, f"{sample['key']} is blank"


def test_every_record_is_whole(samples: dict[str, list[dict[str, Any]]]) -> None:
    for sample in (sample for split in samples.values() for sample in split):
        key = sample["key"]
        assert sample.keys() == FIELDS | {"key", "webp"}, key
        assert key == f"{sample['concept']}-{sample['style']}"
        assert re.fullmatch(r"[0-9A-F]{4,6}(-[0-9A-F]{4,6})*", sample["concept"]), key
        assert all(isinstance(sample[field], str) and sample[field] for field in FIELDS - {"captions"}), key
        captions = sample["captions"]
        assert 1 <= len(captions) <= 5, key
        assert all(isinstance(text, str) and text == " ".join(text.split()) != "" for text in captions), key
        assert len({text.lower() for text in captions}) == len(captions), key


def test_keys_are_unique_and_a_concept_has_one_text(samples: dict[str, list[dict[str, Any]]]) -> None:
    flat = [sample for split in samples.values() for sample in split]
    assert len({sample["key"] for sample in flat}) == len(flat)
    texts = defaultdict(set)
    for sample in flat:
        texts[sample["concept"]].add(json.dumps([sample["captions"], sample["label"], sample["subgroup"]]))
    assert {len(variants) for variants in texts.values()} == {1}


def test_splits_share_no_concept_and_follow_the_plan(samples: dict[str, list[dict[str, Any]]]) -> None:
    concepts = {split: {sample["concept"] for sample in found} for split, found in samples.items()}
    assert sum(map(len, concepts.values())) == len(set.union(*concepts.values()))
    for split, members in concepts.items():
        assert members == {concept for concept, planned in PLAN.items() if planned == split}
    assert sum(planned == "dropped" for planned in PLAN.values()) == STATS["left_out"]["look-alike concepts"]


def test_no_caption_and_no_held_out_image_fits_two_concepts(samples: dict[str, list[dict[str, Any]]]) -> None:
    concepts_of = defaultdict(set)
    for sample in (sample for split in samples.values() for sample in split):
        for text in sample["captions"]:
            concepts_of[text.lower()].add(sample["concept"])
    assert [text for text, concepts in concepts_of.items() if len(concepts) > 1] == []
    train = {sample["webp"] for sample in samples["train"]}
    for split in ("val", "test"):
        images = [sample["webp"] for sample in samples[split]]
        assert len(set(images)) == len(images)
        assert train.isdisjoint(images)


def test_the_readme_states_the_stats() -> None:
    readme = (FOLDER / "README.md").read_text()
    for split, row in STATS["splits"].items():
        images = [row["images"][style] for style in STATS["styles"]]
        cells = [row["tars"], row["concepts"], row["captions"], *images, sum(images)]
        assert f"| {split} | {' | '.join(f'{cell:,}' for cell in cells)} |" in readme
    for why, count in STATS["left_out"].items():
        assert f"- {why}: {count}\n" in readme
    for package in STATS["packages"]:
        assert package.rpartition("@")[0] in readme


def test_every_licence_the_readme_names_is_here() -> None:
    named = set(re.findall(r"\(LICENSES/([^)]+)\)", (FOLDER / "README.md").read_text()))
    assert named == {path.name for path in (FOLDER / "LICENSES").iterdir()}

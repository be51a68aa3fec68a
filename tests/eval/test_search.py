"""Search by free text: the images found, their forms, and bad queries."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import samples_of, write_tar
from tests.eval.runs import finished
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.datasets.image_set import ImageSet, read_images
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.search.search import SearchHit, SearchResults, find, half_blocks

QUERIES = ["a red disc", "<b>blue & bar</b>"]


@pytest.fixture
def gallery(tmp_path: Path) -> ImageSet:
    """Twelve images, of which half have no caption."""
    samples = [(key, m if i % 2 else {"png": m["png"]}) for i, (key, m) in enumerate(samples_of(0, 12))]
    tar = write_tar(tmp_path / "gallery.tar", samples)
    return read_images([index_tar(tar)])


def test_nearest_images_are_found_and_shown(clip: dict[str, Any], gallery: ImageSet, tmp_path: Path) -> None:
    encoder = load_encoder(finished(clip), LoadOptions(embeddings=tmp_path / "embeddings", workers=0))
    assert len(gallery.images) == 12
    results = find(encoder, gallery, QUERIES, 3)
    scores = encoder.images(gallery, gallery.images) @ encoder.texts(QUERIES).T
    for number, hits in enumerate(results.hits):
        best = np.argsort(-scores[:, number])[:3]
        assert [hit.image.key for hit in hits] == [gallery.images[i].key for i in best]
        assert [hit.score for hit in hits] == pytest.approx(scores[best, number], abs=1e-6)
    text = results.text(columns=8)
    assert "gallery.tar:s00" in text
    assert text.count("▀") == 2 * 3 * 8 * 4
    page = results.write(tmp_path / "out").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "&lt;b&gt;blue &amp; bar" in page
    approximate = find(encoder, gallery, QUERIES, 3, index="IVF2,Flat", parameters="nprobe=2")
    assert [[hit.image.key for hit in hits] for hits in approximate.hits] == [
        [hit.image.key for hit in hits] for hits in results.hits
    ]
    assert "approximate search" in approximate.text()


def test_captions_are_shown_on_one_line(tmp_path: Path) -> None:
    captions = {"s0": b"two\nlines", "s1": b"word " * 100}
    (_, image), *_ = samples_of(0, 1)
    tar = write_tar(tmp_path / "x.tar", [(key, {"png": image["png"], "txt": text}) for key, text in captions.items()])
    images = read_images([index_tar(tar)])
    hits = [SearchHit(image, 0.5) for image in images.images]
    first, second = SearchResults("m", images, ("q",), [hits], True).text().splitlines()[1:-1]
    assert first.endswith("x.tar:s0  two lines")
    assert (second[-1], len(second) < 250) == ("…", True)


def test_bad_queries_are_refused(clip: dict[str, Any], cache: Path, gallery: ImageSet) -> None:
    encoder = load_encoder(finished(clip), LoadOptions(workers=0))
    with pytest.raises(ValueError, match="--k: found 13, expected 1 to 12, the images of the gallery"):
        find(encoder, gallery, QUERIES, 13)
    with pytest.raises(ValueError, match="1 of 2 queries are empty"):
        find(encoder, gallery, ["a", " "], 2)
    with pytest.raises(ValueError, match="search by text needs a text tower"):
        find(load_encoder(f"cache:{cache}"), gallery, QUERIES, 2)


def test_half_blocks_keep_colours_and_shape(gallery: ImageSet) -> None:
    lines = half_blocks(gallery.encoded(gallery.images[0]), 6)
    assert len(lines) == 3
    assert all(line.count("▀") == 6 and line.endswith("\x1b[0m") for line in lines)


def test_command_prints_hits_and_writes_a_page(clip: dict[str, Any], gallery: ImageSet, tmp_path: Path) -> None:
    path = finished(clip)
    command = [sys.executable, "-m", "threetowers", "eval", "search", str(path), "--tars", gallery.tars[0].location]
    done = subprocess.run(
        [*command, "--query", "a red disc", "--k", "2", "--output-dir", str(tmp_path / "out"), "--workers", "0"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[0] == "“a red disc”"
    assert (tmp_path / "out" / "search.html").exists()

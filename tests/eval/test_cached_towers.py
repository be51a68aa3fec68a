"""Runs whose deployed heads stand on cached encoders, of text or of both sides: by a cache, live, and by no other."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import samples_of, write_tar
from tests.eval.runs import finished
from tests.trainer.cached_runs import both_cached, cached_text, pair_caches
from threetowers.cache.encoders import live as live_teachers
from threetowers.cache.encoders.encoder import FrozenEncoder
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.cache.webdataset.sample import read_image
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.datasets.dataset_config import DatasetConfig
from threetowers.eval.datasets.image_set import ImageSet, read_images
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.ensemble import EnsembleOptions
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.suite import SuiteResult, evaluate
from threetowers.trainer.export.trained_model import load_model

KINDS = {"text": cached_text, "both": both_cached}
LIVE = LoadOptions(live_teacher=True, workers=0)


@pytest.fixture(scope="module")
def caches(tars: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Caches of the tars that runs are trained on."""
    return pair_caches(tars, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Path]]:
    """A tar of which the runs know nothing, and caches of it."""
    folder = tmp_path_factory.mktemp("heldout")
    tar = write_tar(folder / "heldout.tar", samples_of(100, 12))
    return tar, pair_caches([tar], folder, dtype="float32")


def options_of(kind: str, caches: Mapping[str, Path], **changes: Any) -> LoadOptions:
    """The options that name caches of the towers of such a run."""
    named = {"words": caches["text"]} | ({"image": caches["image"]} if kind == "both" else {})
    return LoadOptions(caches=named, workers=0, **changes)


def retrieve(run: Path, tar: Path, out: Path, options: LoadOptions) -> SuiteResult:
    return evaluate([run], [DatasetConfig(name="all", tars=[str(tar)])], out, tasks=["retrieval"], options=options)


def captions_of(data: ImageSet) -> list[str]:
    return [caption for image in data.images for caption in image.captions]


@pytest.mark.parametrize("kind", KINDS)
def test_cache_and_live_encoder_find_the_same(
    kind: str,
    clip: dict[str, Any],
    caches: Mapping[str, Path],
    heldout: tuple[Path, Mapping[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = finished(KINDS[kind](clip, caches, tmp_path))
    tar, held = heldout
    loaded = 0

    def load(*args: Any) -> FrozenEncoder:
        nonlocal loaded
        loaded += 1
        return load_frozen_encoder(*args)

    monkeypatch.setattr(live_teachers, "load_frozen_encoder", load)
    (by_cache,) = retrieve(run, tar, tmp_path / "out", options_of(kind, held)).records
    assert loaded == 0
    (live,) = retrieve(run, tar, tmp_path / "live", LIVE).records
    assert loaded == 1, "the sides stand on one encoder"
    assert by_cache.metrics == live.metrics
    assert by_cache.counts["images"] == live.counts["images"] == 12
    assert by_cache.spec.model_fingerprint != live.spec.model_fingerprint
    described = "; captions: test:pair pooled ({}): captions of up to 8 tokens, pooled by mean"
    assert by_cache.spec.preprocessing.endswith(described.format("cached"))
    assert live.spec.preprocessing.endswith(described.format("live"))
    assert len((by_cache.spec.cache_manifest or "").split()) == (2 if kind == "both" else 1)
    # The report tells of the caches
    (metadata,) = (json.loads(path.read_text()) for path in (tmp_path / "live" / "models").glob("*.json"))
    assert metadata["method"].endswith(" (cached: image, text)" if kind == "both" else " (cached: text)")
    costs = {cost["of"]: cost["rows"] for cost in metadata["caches"]}
    assert costs == {"text": 90} | ({"image": 45} if kind == "both" else {})


def test_rows_are_those_of_the_captions(
    clip: dict[str, Any], caches: Mapping[str, Path], tars: list[Path], tmp_path: Path
) -> None:
    """The cache of training answers for its own tars, and the rows are what the encoder says of the words."""
    run = finished(both_cached(clip, caches, tmp_path))
    data = read_images([index_tar(tars[1])])
    captions = captions_of(data)[::-1]
    found = load_encoder(run, LoadOptions(batch_size=7)).captions(data, captions)
    live = load_encoder(run, LIVE)
    np.testing.assert_allclose(found, live.texts(captions), atol=2e-3)
    text = load_frozen_encoder("test:pair").side("text")
    model = load_model(run)
    expected = model.encode_tokens(text.embed(captions))
    np.testing.assert_allclose(live.texts(captions), expected.numpy(), atol=1e-6)
    image = load_frozen_encoder("test:pair").side("image")
    pixels = [torch.from_numpy(image.transform(read_image(data.tars[p.tar], p.ordinal, 10**6))) for p in data.images]
    features = model.encode_images(image.embed(torch.stack(pixels)))
    np.testing.assert_allclose(live.images(data, data.images), features.numpy(), atol=1e-6)


def test_prompts_need_the_live_encoder(
    clip: dict[str, Any], caches: Mapping[str, Path], heldout: tuple[Path, Mapping[str, Path]], tmp_path: Path
) -> None:
    """A cache may be given as well: then images and captions are read from it, and prompts are embedded live."""
    run = finished(both_cached(clip, caches, tmp_path))
    tar, held = heldout
    data = read_images([index_tar(tar)])
    only_cache = load_encoder(run, options_of("both", held))
    with pytest.raises(
        ValueError, match=r"rows of test:pair, .* class names, prompts or queries: .* \(--live-teacher\)"
    ):
        only_cache.texts(["a photo of a disc"])
    both = load_encoder(run, options_of("both", held, live_teacher=True))
    live = load_encoder(run, LIVE)
    assert np.array_equal(both.texts(["a photo of a disc"]), live.texts(["a photo of a disc"]))
    assert np.array_equal(both.captions(data, captions_of(data)), only_cache.captions(data, captions_of(data)))
    assert "(cached)" in both.info.preprocessing


@pytest.mark.parametrize(
    ("built", "difference"),
    [
        ({"encoder": "test:pair:seed:1"}, "weights_digest"),
        ({"feature": "projected"}, "feature: expected pooled, found projected"),
        ({"prompt": "a photo of "}, "text.prompt: expected , found a photo of"),
        ({"max_length": 5}, "text.max_length: expected 8, found 5"),
    ],
)
def test_another_encoder_is_refused(
    clip: dict[str, Any],
    caches: Mapping[str, Path],
    heldout: tuple[Path, Mapping[str, Path]],
    tmp_path: Path,
    built: dict[str, Any],
    difference: str,
) -> None:
    run = finished(cached_text(clip, caches, tmp_path))
    other = pair_caches([heldout[0]], tmp_path, **built)
    with pytest.raises(ManifestError, match=f"not the teacher that .*cached-text was trained on: .*{difference}"):
        retrieve(run, heldout[0], tmp_path / "out", options_of("text", other))
    with pytest.raises(ManifestError, match=r"was trained on: of: expected text, found image"):
        retrieve(run, heldout[0], tmp_path / "out", LoadOptions(caches={"words": heldout[1]["image"]}))


def test_another_live_encoder_is_refused(
    clip: dict[str, Any], caches: Mapping[str, Path], heldout: tuple[Path, Mapping[str, Path]], tmp_path: Path
) -> None:
    tree = cached_text(clip, caches, tmp_path)
    tree["towers"]["words"]["weights"] = "seed:1"
    with pytest.raises(ManifestError, match=r"this teacher \(seed:1\) is not the one of the cache: weights_digest"):
        retrieve(finished(tree), heldout[0], tmp_path / "out", LIVE)


def test_tars_and_captions_without_rows_are_named(
    clip: dict[str, Any], caches: Mapping[str, Path], heldout: tuple[Path, Mapping[str, Path]], tmp_path: Path
) -> None:
    run = finished(cached_text(clip, caches, tmp_path))
    tar, held = heldout
    ways = (
        r".* rows for the evaluation captions: build a cache of them and give it as --cache words=PATH, or use --live"
    )
    with pytest.raises(ManifestError, match=r"heldout\.tar: not among the 2 tars" + ways):
        retrieve(run, tar, tmp_path / "out", LoadOptions(workers=0))
    data = read_images([index_tar(tar)], CaptionFormat({"json.concept": 1.0}))
    encoder = load_encoder(run, options_of("text", held))
    message = r"no row of 12 of 12 captions, as of 'red disc': its 1 tars have rows of 24 captions, from txt, .*"
    with pytest.raises(ManifestError, match=message + ways):
        encoder.captions(data, captions_of(data))


def test_what_a_cache_of_text_cannot_be(
    clip: dict[str, Any], caches: Mapping[str, Path], cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match=r"expected a cache of images, found one of text: .* \(test:pair\)"):
        load_encoder(f"cache:{caches['text']}")
    tree = cached_text(clip, caches, tmp_path)
    tree["towers"]["third"] = {"kind": "cache", "path": str(cache)}
    tree["heads"] |= {"h": {"of": "third"}}
    tree["terms"] |= {"text-third": {"x": "h", "y": "g"}}
    run = finished(tree)
    with pytest.raises(ValueError, match=r"needs a cached tower of images, .*; 'words' is of text; found \['third'\]"):
        load_encoder(run, ensemble=EnsembleOptions("words", 0.5))
    mixed = load_encoder(run, ensemble=EnsembleOptions("third", 0.5, "logit"))
    data = read_images([index_tar(tar) for tar in map(Path, tree["data"]["tars"])])
    captions = captions_of(data)
    third, main = (load_encoder(run, ensemble=EnsembleOptions("third", weight, "logit")) for weight in (1.0, 0.0))
    parts = [part.images(data, data.images) @ part.captions(data, captions).T for part in (main, third)]
    scores = mixed.images(data, data.images) @ mixed.captions(data, captions).T
    np.testing.assert_allclose(scores, 0.5 * parts[0] + 0.5 * parts[1], atol=1e-5)
    assert len((mixed.info.cache_manifest or "").split()) == 2

"""Views in training: the image tower sees what the teacher embedded, crop, operations and interpolation alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tests.trainer.loading import load_batches, loader_of, open_run
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.encoder import ImageEncoder
from threetowers.cache.encoders.live import live_teacher
from threetowers.cache.format.views import Views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.trainer.config import ConfigError

SIDE = 64  # of the teacher; it resizes bilinearly
VIEWS = Views("crops:3", seed=4, scale=0.4, augment="randaugment:2:14")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def augmented(tars: list[Path], weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of augmented crops of the small tars."""
    folder = tmp_path_factory.mktemp("augmented")
    teacher = f"timm:test_resnet@{SIDE}:{weights}"
    build_cache(BuildConfig(tars=[str(tar) for tar in tars], output_dir=folder, encoder=teacher, views=VIEWS))
    return folder


@pytest.fixture
def teacher(augmented: Path, weights: str) -> ImageEncoder:
    return live_teacher(EmbeddingCache.open(augmented).manifest, weights).side("image")


@pytest.mark.parametrize("access", ["random", "sequential"])
def test_the_teacher_gives_the_stored_rows_for_what_the_image_tower_sees(
    three: dict[str, Any], augmented: Path, teacher: ImageEncoder, access: str
) -> None:
    """Cosine of at least 0.9999 in each of the three epochs, which show a view each."""
    assert teacher.preprocessing.interpolation == "bilinear"
    three["towers"]["third"]["path"] = str(augmented)
    three["data"] |= {"image_size": SIDE, "access": access}
    seen = set()
    samples = open_run(three)
    assert "views: crops:3, seed 4, scale 0.4, augment randaugment:2:14; an epoch shows one of the 3" in samples.notes()
    for batch in loader_of(three, samples, stop=9):
        images, rows = batch.inputs["image"], batch.inputs["third"].float()
        assert images.dtype == torch.uint8
        embedded = teacher.embed(images).float()
        assert cosine_similarity(embedded, rows).min() >= 0.9999
        mirrored = teacher.embed(images.flip(-1)).float()
        assert cosine_similarity(mirrored, rows).min() < 0.9999
        seen |= {tuple(row.tolist()) for row in rows}
    assert len(seen) == 108, "nine batches of twelve, no view twice"


def test_a_row_that_is_missing_is_made_of_the_view_that_it_would_have_had(
    three: dict[str, Any], augmented: Path, tars: list[Path], weights: str, tmp_path: Path
) -> None:
    """A cache of one tar, and the other's rows live: the same rows as those of the cache of both."""
    part = tmp_path / "part"
    encoder = f"timm:test_resnet@{SIDE}:{weights}"
    build_cache(BuildConfig(tars=[str(tars[0])], output_dir=part, encoder=encoder, views=VIEWS))
    data = {name: value for name, value in three["data"].items() if name != "tars"}
    halves = {name: {"tars": [str(tar)], "weight": 0.5} for name, tar in zip(("a", "b"), tars, strict=True)}
    three["data"] = data | {"image_size": SIDE, "datasets": halves}
    batches = []
    for third in ({"path": str(augmented)}, {"path": str(part), "on_missing_row": "live", "weights": weights}):
        three["towers"]["third"] |= third
        batches.append(load_batches(three, stop=3))
    for ours, theirs in zip(*batches, strict=True):
        assert ours.inputs["image"].equal(theirs.inputs["image"])
        assert cosine_similarity(ours.inputs["third"].float(), theirs.inputs["third"].float()).min() >= 0.9999


def test_caches_of_other_augmentation_are_refused(
    three: dict[str, Any], augmented: Path, tars: list[Path], weights: str, tmp_path: Path
) -> None:
    encoder = f"timm:test_resnet@{SIDE}:{weights}"
    plain = Views(VIEWS.policy, VIEWS.seed, VIEWS.scale)
    build_cache(BuildConfig(tars=[str(tar) for tar in tars], output_dir=tmp_path / "c", encoder=encoder, views=plain))
    three["towers"]["third"]["path"] = str(augmented)
    three["towers"]["other"] = {"kind": "cache", "path": str(tmp_path / "c")}
    three["heads"]["h_o"] = {"of": "other"}
    three["terms"]["image-other"] = {"x": "f_h", "y": "h_o"}
    with pytest.raises(ConfigError, match=r"different views: third: .*augment randaugment:2:14, other: .*scale 0.4;"):
        load_batches(three, stop=1)

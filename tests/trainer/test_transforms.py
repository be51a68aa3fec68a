"""Augmentation: its transforms, that it depends on the sample alone, and what is refused beside a cache."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from tests.trainer.loading import load_batches
from threetowers.trainer.config import Augment, ConfigError, parse
from threetowers.trainer.data.batch import prefetch_to_device
from threetowers.trainer.data.transforms import augment
from threetowers.trainer.estimate.summary import _augmentation

IMAGE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 17, 12), dtype=np.uint8))
EVERYTHING = {"flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter": 0.8,
              "grayscale": 0.2, "blur": 0.5}  # fmt: skip


def change(seed: int = 0, **options: float) -> torch.Tensor:
    return augment(IMAGE, Augment(**options), np.random.default_rng(seed))


def test_without_options_the_image_is_returned_and_no_random_number_taken() -> None:
    rng = np.random.default_rng(0)
    assert augment(IMAGE, Augment(flip=0, grayscale=0, jitter=0), rng) is IMAGE
    assert rng.random() == np.random.default_rng(0).random()


def test_each_transform_is_that_of_torchvision() -> None:
    assert change(flip=1).equal(IMAGE.flip(-1))
    assert change(grayscale=1).equal(F.rgb_to_grayscale(IMAGE, 3))
    for name in ("brightness", "contrast", "saturation", "hue"):
        grown = [change(seed, **{name: 0.3}) for seed in range(12)]
        factors = torch.linspace(-0.3, 0.3, 601) + (name != "hue")
        candidates = torch.stack([getattr(F, f"adjust_{name}")(IMAGE, float(f)) for f in factors]).float()
        for image in grown:  # one of the family, within a rounding of the factor
            assert (candidates - image.float()).abs().amax((1, 2, 3)).min() <= 2
        assert len({image.numpy().tobytes() for image in grown}) == 12
    assert change(blur=1).float().std() < IMAGE.float().std()


def test_probabilities_are_kept_and_a_seed_repeats_the_image() -> None:
    flipped = sum(change(seed, flip=0.3).equal(IMAGE.flip(-1)) for seed in range(400))
    assert 80 < flipped < 160
    assert 240 < sum(not change(seed, brightness=0.9, jitter=0.75).equal(IMAGE) for seed in range(400)) < 345
    assert change(7, **EVERYTHING).equal(change(7, **EVERYTHING))
    assert change(7, **EVERYTHING).shape == IMAGE.shape
    assert change(7, **EVERYTHING).dtype == torch.uint8


def test_workers_and_resume_change_no_image_and_augmentation_no_caption(clip: dict[str, Any]) -> None:
    plain = load_batches(clip, stop=5)
    clip["data"]["augment"] = EVERYTHING
    whole = load_batches(clip, stop=5)
    clip["data"]["workers"] = 2
    for batch, again in zip(whole[2:], load_batches(clip, start=2, stop=5), strict=True):
        assert again.inputs["image"].equal(batch.inputs["image"])
    for batch, before in zip(whole, plain, strict=True):
        assert not batch.inputs["image"].equal(before.inputs["image"])
        assert batch.inputs["text"].equal(before.inputs["text"])


def test_beside_a_cache_flips_are_refused_and_colour_is_reported(three: dict[str, Any], clip: dict[str, Any]) -> None:
    three["data"]["augment"] = {"flip": 0.5}
    with pytest.raises(ConfigError, match=r"data\.augment\.flip: found 0\.5, .*--views center\+flip"):
        parse(three)
    three["data"]["augment"] = {"hue": 0.1, "grayscale": 0.2}
    (line,) = _augmentation(parse(three))
    assert line == "augmentation: hue 0.1, grayscale 0.2; the rows of third are of images without it"
    three["data"]["augment"] = {}
    assert _augmentation(parse(three)) == []
    clip["data"] |= {"augment": {"flip": 0.5}, "crop_scale": 0.6}
    assert _augmentation(parse(clip)) == ["augmentation: crops of 0.6 to 1 of the area, flip 0.5"]


def test_prefetching_to_a_cpu_yields_the_batches_themselves(clip: dict[str, Any]) -> None:
    found = load_batches(clip, stop=5)
    assert [id(b) for b in prefetch_to_device(found, torch.device("cpu"))] == [id(b) for b in found]


def test_captions_are_chosen_by_seed_epoch_and_sample(clip: dict[str, Any]) -> None:
    """Each sample has two captions: both are drawn, epochs differ, and no sample gets the caption of another."""
    clip["data"]["group_field"] = None
    clip["global_batch_size"] = 45
    by_epoch = []
    for batch in load_batches(clip, stop=5):
        order = batch.groups_b.argsort()
        by_epoch.append(batch.inputs["text"][order])
    changed = [int((a != b).any(1).sum()) for a, b in pairwise(by_epoch)]
    assert all(5 < count < 40 for count in changed)
    stacked = torch.stack(by_epoch, dim=1)
    assert all(len({tuple(row) for row in sample.tolist()}) <= 2 for sample in stacked)

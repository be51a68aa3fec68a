"""Augmentation of bytes: what it does, that it depends on the sample alone, and what it may not do beside a cache."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from threetowers.trainer.config import Augment, ConfigError, parse
from threetowers.trainer.data.augmentation import augmented
from threetowers.trainer.data.device_prefetch import prefetched
from threetowers.trainer.data.loader import Batch, training_loader
from threetowers.trainer.data.sample_set import open_samples
from threetowers.trainer.estimate.summary import _augmentation
from threetowers.trainer.tokenizer import Tokenizer

PICTURE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 17, 12), dtype=np.uint8))
EVERYTHING = {"flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter": 0.8,
              "grayscale": 0.2, "blur": 0.5}  # fmt: skip


def change(seed: int = 0, **options: float) -> torch.Tensor:
    return augmented(PICTURE, Augment(**options), np.random.default_rng(seed))


def test_nothing_is_asked_for_nothing_is_done() -> None:
    rng = np.random.default_rng(0)
    assert augmented(PICTURE, Augment(flip=0, grayscale=0, jitter=0), rng) is PICTURE
    assert rng.random() == np.random.default_rng(0).random()


def test_single_changes_are_torchvisions() -> None:
    assert change(flip=1).equal(PICTURE.flip(-1))
    assert change(grayscale=1).equal(F.rgb_to_grayscale(PICTURE, 3))
    for name in ("brightness", "contrast", "saturation", "hue"):
        grown = [change(seed, **{name: 0.3}) for seed in range(12)]
        factors = torch.linspace(-0.3, 0.3, 601) + (name != "hue")
        candidates = torch.stack([getattr(F, f"adjust_{name}")(PICTURE, float(f)) for f in factors]).float()
        for picture in grown:  # one of the family, within a rounding of the factor
            assert (candidates - picture.float()).abs().amax((1, 2, 3)).min() <= 2
        assert len({picture.numpy().tobytes() for picture in grown}) == 12
    assert change(blur=1).float().std() < PICTURE.float().std()


def test_probabilities_and_seeds() -> None:
    flipped = sum(change(seed, flip=0.3).equal(PICTURE.flip(-1)) for seed in range(400))
    assert 80 < flipped < 160
    assert 240 < sum(not change(seed, brightness=0.9, jitter=0.75).equal(PICTURE) for seed in range(400)) < 345
    assert change(7, **EVERYTHING).equal(change(7, **EVERYTHING))
    assert change(7, **EVERYTHING).shape == PICTURE.shape
    assert change(7, **EVERYTHING).dtype == torch.uint8


def batches(tree: dict[str, Any], start: int = 0) -> list[Batch]:
    run = parse(tree)
    samples = open_samples(run, Path(run.output_dir))
    return list(training_loader(run, samples, Tokenizer.load(run.data.tokenizer), 0, 1, start, 5))


def test_workers_and_resume_change_nothing_and_neither_do_captions(clip: dict[str, Any]) -> None:
    plain = batches(clip)
    clip["data"]["augment"] = EVERYTHING
    whole = batches(clip)
    clip["data"]["workers"] = 2
    for batch, again in zip(whole[2:], batches(clip, start=2), strict=True):
        assert again.inputs["image"].equal(batch.inputs["image"])
    for batch, before in zip(whole, plain, strict=True):
        assert not batch.inputs["image"].equal(before.inputs["image"])
        assert batch.inputs["text"].equal(before.inputs["text"])


def test_beside_a_cache(three: dict[str, Any], clip: dict[str, Any]) -> None:
    three["data"]["augment"] = {"flip": 0.5}
    with pytest.raises(ConfigError, match=r"data\.augment\.flip: found 0\.5, .*--views center\+flip"):
        parse(three)
    three["data"]["augment"] = {"hue": 0.1, "grayscale": 0.2}
    (line,) = _augmentation(parse(three))
    assert line == "augmentation: hue 0.1, grayscale 0.2; the rows of third are of pictures without"
    three["data"]["augment"] = {}
    assert _augmentation(parse(three)) == []
    clip["data"] |= {"augment": {"flip": 0.5}, "crop_scale": 0.6}
    assert _augmentation(parse(clip)) == ["augmentation: crops of 0.6 to 1 of the area, flip 0.5"]


def test_prefetching_does_nothing_on_a_cpu(clip: dict[str, Any]) -> None:
    found = batches(clip)
    assert [id(b) for b in prefetched(found, torch.device("cpu"))] == [id(b) for b in found]


def test_captions_are_chosen_by_seed_epoch_and_sample(clip: dict[str, Any]) -> None:
    """Two captions a sample: both come up, another one in another epoch, and each is one that the sample has."""
    clip["data"]["group_field"] = None
    clip["global_batch_size"] = 45
    by_epoch = []
    for batch in batches(clip):
        order = batch.concepts_b.argsort()
        by_epoch.append(batch.inputs["text"][order])
    changed = [int((a != b).any(1).sum()) for a, b in pairwise(by_epoch)]
    assert all(5 < count < 40 for count in changed)
    stacked = torch.stack(by_epoch, dim=1)
    assert all(len({tuple(row) for row in sample.tolist()}) <= 2 for sample in stacked)

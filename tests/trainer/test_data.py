"""Samples and batches: what they hold, which samples are refused and how, and the transforms of images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import picture, samples_of, write_tar
from tests.trainer.loading import load_batches, same
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.sample import read_annotation, read_image
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.trainer.config import parse
from threetowers.trainer.data.loader import RandomAccessDataset, TrainingSample
from threetowers.trainer.data.sample_set import SampleSet
from threetowers.trainer.data.transforms import center_crop, random_crop


def test_batches_hold_the_inputs_of_all_towers(clip: dict[str, Any]) -> None:
    batch = load_batches(clip, stop=1)[0]
    assert batch.inputs["image"].shape == (12, 3, 32, 32)
    assert batch.inputs["image"].dtype == torch.uint8
    assert batch.inputs["text"].shape == (12, 8)
    assert batch.groups_b.dtype == torch.int64
    assert len(set(batch.groups_b.tolist())) < 12  # 20 groups, 12 of 45 samples: this batch has repeats
    assert batch.bad == ()


def test_ranks_workers_and_resume_do_not_change_the_samples(clip: dict[str, Any]) -> None:
    clip["data"]["crop_scale"] = 0.5
    whole = load_batches(clip, stop=4)
    assert not whole[0].inputs["image"].equal(whole[3].inputs["image"])
    assert all(same(a, b) for a, b in zip(load_batches(clip, start=2, stop=4), whole[2:], strict=True))
    halves = [load_batches(clip, rank, 2, stop=4) for rank in range(2)]
    for step, batch in enumerate(whole):
        for name, tensor in batch.inputs.items():
            assert torch.cat([half[step].inputs[name] for half in halves]).equal(tensor)
    clip["data"]["workers"] = 2
    assert all(same(a, b) for a, b in zip(load_batches(clip, stop=4), whole, strict=True))


def test_a_run_without_an_image_tower_decodes_no_image(clip: dict[str, Any], tmp_path: Path) -> None:
    blind = [(key, members | {"png": b"not an image"}) for key, members in samples_of(0, 12)]
    clip["data"]["tars"] = [str(write_tar(tmp_path / "blind.tar", blind))]
    clip["towers"]["image"] = {"kind": "text", "width": 16, "depth": 1, "heads": 2}
    config = parse(clip | {"towers": clip["towers"] | {"image": {"kind": "cache", "path": "none"}}})
    samples = SampleSet([index_tar(tar) for tar in config.data.tars], {})
    sample = RandomAccessDataset(config, samples)[(0, 3)]
    assert isinstance(sample, TrainingSample)
    assert sample.image is None


def test_bad_samples_are_named_and_counted(clip: dict[str, Any], tmp_path: Path) -> None:
    samples = samples_of(0, 12)
    samples[4][1]["png"] = samples[4][1]["png"][:60]
    samples[7][1]["json"] = b'{"captions": []}'
    clip["data"]["tars"] = [str(write_tar(tmp_path / "bad.tar", samples))]
    (batch,) = load_batches(clip, stop=1)
    assert len(batch) == len(batch.inputs["image"]) == 10
    assert len(batch.bad) == 2
    broken, without_caption = sorted(batch.bad, key=lambda reason: "s0007" in reason)
    assert "bad.tar: sample 's0004': " in broken
    assert "bad.tar: sample 's0007': no caption (json.captions: empty); found members" in without_caption


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"png": b""}, r"sample 'k': no caption; found members \['png'\], expected a caption in txt, json"),
        ({"png": b"", "txt": b"  \n"}, "no caption"),
        ({"png": b"", "txt": b"\xff"}, "neither UTF-8 nor UTF-16"),
        ({"png": b"", "json": b"{"}, r"sample 'k': no caption \(json: not JSON\)"),
        ({"png": b"", "json": b"[1]"}, "json: not an object"),
        ({"png": b"", "json": b'{"captions": [1]}'}, "json.captions: not text"),
    ],
)
def test_annotations_that_cannot_be_used_are_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    tar = index_tar(write_tar(tmp_path / "t.tar", [("k", members)]))
    with pytest.raises(BadSample, match=message):
        read_annotation(tar, 0)


def test_captions_and_fields_are_read_from_txt_and_json(tmp_path: Path) -> None:
    both = {"png": b"", "txt": b"from txt", "json": b'{"caption": "from json", "n": 3}'}
    tar = index_tar(
        write_tar(
            tmp_path / "t.tar",
            [
                ("a", {"png": b"", "txt": "café \n".encode()}),
                ("b", both),
                ("c", {"png": b"", "txt": b"x", "json": b"{}"}),
            ],
        )
    )
    assert read_annotation(tar, 0).captions == ("café",)
    assert read_annotation(tar, 1).captions == ("from txt",)
    assert read_annotation(tar, 1).fields["n"] == 3
    assert read_annotation(tar, 2).captions == ("x",)


def test_an_image_too_large_to_decode_is_refused(tmp_path: Path) -> None:
    tar = index_tar(write_tar(tmp_path / "t.tar", [("k", {"png": picture("red", "disc", 0), "txt": b"x"})]))
    assert read_image(tar, 0, 32 * 32).size == (32, 32)
    with pytest.raises(BadSample, match=r"t\.tar: sample 'k': .*1023"):
        read_image(tar, 0, 32 * 32 - 1)


def test_fewer_samples_than_a_batch_are_refused(clip: dict[str, Any]) -> None:
    clip["global_batch_size"] = 46
    with pytest.raises(
        ValueError, match="a batch of 46 needs at least 46 samples, the tars hold 45; lower global_batch_size"
    ):
        load_batches(clip, stop=4)


def test_center_crop_is_the_central_square() -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 255
    assert center_crop(Image.fromarray(pixels), 20).eq(255).all()
    assert center_crop(Image.fromarray(pixels), 7).shape == (3, 7, 7)


def test_random_crops_stay_inside_and_vary() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 17, 3), dtype=np.uint8))
    crops = [random_crop(image, 16, 0.3, np.random.default_rng(seed)) for seed in range(20)]
    assert all(crop.shape == (3, 16, 16) for crop in crops)
    assert len({crop.numpy().tobytes() for crop in crops}) == 20
    assert random_crop(image, 16, 0.3, np.random.default_rng(3)).equal(crops[3])


def test_fields_survive_json(tars: list[Path]) -> None:
    fields = read_annotation(index_tar(tars[0]), 0).fields
    assert json.loads(json.dumps(dict(fields))) == fields

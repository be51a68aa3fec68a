"""Frozen encoders in evaluation: a joint space, images alone, or text alone, whatever library they are of."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from tests.cache.tiny_open_clip import save_open_clip
from tests.cache.tiny_transformers import save_image_model, save_pair_model, save_text_model
from threetowers.cache.encoders.names import EncoderName, load_frozen_encoder
from threetowers.cache.webdataset.sample import read_image
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.datasets.image_set import ImageSet, read_images
from threetowers.eval.encoders.encoder import LoadOptions, NoTextTower
from threetowers.eval.encoders.frozen_model import short_name
from threetowers.eval.encoders.load import load_encoder

CAPTIONS = ["a red disc", "a photo of a green bar on a bench", "blue"]
PLAIN = LoadOptions(workers=0, device="cpu")


@pytest.fixture
def data(tars: list[Path]) -> ImageSet:
    return read_images([index_tar(tars[0])])


def unit(x_ND: Any) -> np.ndarray:
    x_ND = x_ND if isinstance(x_ND, torch.Tensor) else torch.from_numpy(np.array(x_ND))
    return torch.nn.functional.normalize(x_ND, dim=-1).numpy()


def test_a_joint_space_is_what_is_compared(data: ImageSet, tmp_path: Path) -> None:
    folders = [save_pair_model("clip", tmp_path / "hf"), tmp_path / "open_clip"]
    save_open_clip(folders[1])
    for kind, folder in zip(("hf", "open_clip"), folders, strict=True):
        model = load_encoder(f"{kind}:{folder}", PLAIN)
        encoder = load_frozen_encoder(f"{kind}:{folder}")
        image, text = encoder.side("image"), encoder.side("text")
        views = [image.transform(read_image(data.tars[p.tar], p.ordinal, 10**6)) for p in data.images]
        pixels = torch.from_numpy(np.stack(views))
        assert model.sees_text
        assert model.logit_scale == encoder.logit_scale != 1.0
        assert (model.info.name, model.info.digest) == (f"{kind}:{kind}", encoder.weights_digest)
        found = model.images(data, data.images), model.features(data, data.images), model.texts(CAPTIONS)
        np.testing.assert_allclose(found[0], unit(image.embed(pixels, "projected")), atol=1e-6)
        np.testing.assert_allclose(found[1], image.embed(pixels, "pooled"), atol=1e-6)
        np.testing.assert_allclose(found[2], unit(text.embed(CAPTIONS, "projected")), atol=1e-6)
        moved = shutil.copytree(folder, tmp_path / f"moved {kind}")
        assert load_encoder(f"{kind}:{moved}", PLAIN).info.fingerprint == model.info.fingerprint


def test_without_a_joint_space_there_are_images_alone(data: ImageSet, tmp_path: Path) -> None:
    model = load_encoder(f"hf:{save_image_model('vit', tmp_path / 'vit')}", PLAIN)
    assert not model.sees_text
    np.testing.assert_allclose(model.images(data, data.images), unit(model.features(data, data.images)), atol=1e-6)
    with pytest.raises(NoTextTower, match="hf:vit sees images only"):
        model.texts(CAPTIONS)


def test_text_alone_is_refused(tmp_path: Path) -> None:
    folder = save_text_model("bert", tmp_path / "bert")
    with pytest.raises(
        ValueError, match=r"bert: reads text only, and all tasks need images: evaluate an encoder of both"
    ):
        load_encoder(f"hf:{folder}", PLAIN)


@pytest.mark.parametrize("precision", ["mixed", "bfloat16", "float16"])
def test_precisions_of_timm(precision: Any, data: ImageSet, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "w.pt")
    exact, half = (
        load_encoder(f"timm:test_vit@64:{tmp_path}/w.pt", LoadOptions(workers=0, device="cpu", precision=p))
        for p in (None, precision)
    )
    found, expected = (model.images(data, data.images) for model in (half, exact))
    assert not np.array_equal(found, expected)
    assert (found * expected).sum(1).min() > 0.999
    assert (exact.info.precision, half.info.precision) == ("float32", precision)
    assert exact.info.fingerprint != half.info.fingerprint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm:resnet50", "timm:resnet50"),
        ("timm:hf-hub:org/name@96", "timm:name"),
        ("timm:tf_efficientnet_lite0@160:package:efficientnet-lite0", "timm:tf_efficientnet_lite0:efficientnet-lite0"),
        ("open_clip:ViT-L-14:openai=weights/finetuned.pt#state_dict", "open_clip:ViT-L-14:finetuned"),
        ("open_clip:ViT-B-32:openai", "open_clip:ViT-B-32:openai"),
        ("st:package:all-minilm-l6-v2", "st:all-minilm-l6-v2"),
    ],
)
def test_names_in_tables(name: str, expected: str) -> None:
    assert short_name(EncoderName.parse(name)) == expected

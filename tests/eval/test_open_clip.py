"""open_clip's models in evaluation: their own preprocessing, weights in wrappers, and precisions."""

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tests.cache.tiny_open_clip import COCA, TIMM, TINY, save_open_clip
from threetowers.cache.encoders.openclip.loading import load_open_clip_model
from threetowers.cache.webdataset.sample import read_image
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.datasets.image_set import read_images
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.frozen_model import FrozenModel
from threetowers.eval.encoders.load import load_encoder


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Weights of a small model that stands in for the architectures of open_clip, whose tags stay as they are."""
    for name in ("MobileCLIP-S1", "PE-Core-B-16", "ViT-B-32", "ViT-L-14", "ViT-S-16"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, deepcopy(TINY))
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32").state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *args, **kwargs: str(tmp_path / "weights.pt"))
    return tmp_path / "weights.pt"


def encoder_of(spec: str) -> FrozenModel:
    encoder = load_encoder(spec, LoadOptions(workers=0))
    assert isinstance(encoder, FrozenModel)
    return encoder


@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")
@pytest.mark.parametrize(
    ("name", "tag", "source"),
    [
        ("MobileCLIP-S1", "datacompdr", ""),  # mean 0, std 1, bilinear
        ("PE-Core-B-16", "meta", ""),  # mean 0.5, bilinear, squash
        ("ViT-B-32", "openai", ""),
        ("ViT-L-14", "openai", "openai="),
        ("ViT-L-14", "laion2b_s32b_b82k", "laion2b_s32b_b82k="),  # mean 0.5
        ("ViT-S-16", None, ""),  # no tags: open_clip's default
        ("ViT-L-14", None, "default="),
    ],
)
def test_a_file_has_the_preprocessing_that_open_clip_gives_its_tag(
    name: str, tag: str | None, source: str, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, theirs = open_clip.create_model_and_transforms(name, pretrained=tag or str(weights))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        encoder = encoder_of(f"open_clip:{name}:{source}{weights}")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    pixels_3HW = torch.from_numpy(np.ascontiguousarray(encoder.image.transform(image)))
    torch.testing.assert_close(theirs.transforms[-1](pixels_3HW / 255), theirs(image), atol=1e-6, rtol=0)
    normalize = theirs.transforms[-1]
    preprocessing = encoder.image.preprocessing
    assert (preprocessing.mean, preprocessing.std) == (tuple(normalize.mean), tuple(normalize.std))
    assert f"mean {normalize.mean[0]:.4g}, " in encoder.info.preprocessing
    assert ("is taken to be" in caplog.text) == (source == "")
    assert "andomly" not in caplog.text


@pytest.mark.parametrize(
    ("source", "quick"), [("openai=", True), ("laion2b_s34b_b79k=", False), ("default=", False), ("", False)]
)
def test_weights_of_a_tag_have_the_activation_that_they_were_trained_with(
    source: str, quick: bool, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """open_clip itself only warns that OpenAI's weights need QuickGELU, and takes the GELU of the model's config."""
    with caplog.at_level(logging.INFO):
        model = load_open_clip_model("ViT-B-32", f"{source}{weights}").model
    assert ("QuickGELU in place of the GELU of its config, as the weights 'openai' need it" in caplog.text) == quick
    images_b3HW, tokens_bL = torch.randn(2, 3, 32, 32), open_clip.tokenize(["a red disc", "a dog"], 16)
    for force in (quick, not quick):
        theirs = open_clip.create_model("ViT-B-32", force_quick_gelu=force).eval()
        theirs.load_state_dict(torch.load(weights))
        with torch.no_grad():
            for ours, other in (
                (model.encode_image(images_b3HW), theirs.encode_image(images_b3HW)),
                (model.encode_text(tokens_bL), theirs.encode_text(tokens_bL)),
            ):
                assert torch.allclose(ours, other, rtol=1e-5, atol=1e-6) == (force == quick)


def test_architectures_whose_tags_disagree_want_a_tag(weights: Path) -> None:
    with pytest.raises(ValueError, match=r"ViT-L-14 differ: mean .*openai.*; or mean .*as open_clip:ViT-L-14:"):
        encoder_of(f"open_clip:ViT-L-14:{weights}")
    with pytest.raises(ValueError, match="'nothing' is neither a file nor a pretrained tag of it"):
        encoder_of(f"open_clip:ViT-L-14:nothing={weights}")


def test_wrapped_and_averaged_weights(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights)
    averaged = {key: value * 0.5 if value.is_floating_point() else value for key, value in state.items()}
    wrapped = tmp_path / "epoch_1.pt"
    torch.save({"state_dict": {f"module.{key}": v for key, v in state.items()}, "state_dict_ema": averaged}, wrapped)
    digests = {
        spec: encoder_of(f"open_clip:ViT-B-32:{spec}").info.digest
        for spec in (str(weights), str(wrapped), f"{wrapped}#state_dict")
    }
    assert digests[str(weights)] == digests[f"{wrapped}#state_dict"] != digests[str(wrapped)]
    save_open_clip(tmp_path / "folder")
    folder = encoder_of(f"open_clip:{tmp_path / 'folder'}:{weights}")
    assert (folder.info.name, folder.info.digest) == ("open_clip:folder:weights", digests[str(weights)])
    assert "mean 0.1, 0.2, 0.3" in folder.info.preprocessing


def test_weights_that_do_not_fit_are_refused_in_one_line(weights: Path, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt does not fit open_clip:ViT-B-32: of its tensors \d+ of"):
        encoder_of(f"open_clip:ViT-B-32:{tmp_path / 'other.pt'}")
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match="open_clip cannot load local-dir:"):
        encoder_of(f"open_clip:{tmp_path}")


@torch.inference_mode()
@pytest.mark.parametrize("config", [TINY, COCA, TIMM], ids=["vit", "coca", "timm"])
def test_embeddings_and_features_are_those_of_open_clip(
    config: dict[str, Any], tars: list[Path], tmp_path: Path
) -> None:
    save_open_clip(tmp_path, config)
    data = read_images([index_tar(tars[0])])
    captions = ["a red disc", "", "a very long caption " * 9]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    x_b3HW = torch.stack([transform(read_image(data.tars[p.tar], p.ordinal, 10**6)) for p in data.images])
    images = model.eval().encode_image(x_b3HW, normalize=True)
    texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(captions), normalize=True)
    encoder = encoder_of(f"open_clip:{tmp_path}")
    assert (encoder.sees_text, encoder.dim) == (True, 24)
    np.testing.assert_allclose(encoder.images(data, data.images), images, atol=1e-6)
    np.testing.assert_allclose(encoder.texts(captions), texts, atol=1e-6)
    projection = model.visual.trunk.get_classifier().weight.T if config is TIMM else model.visual.proj
    features = torch.from_numpy(np.array(encoder.features(data, data.images)))
    projected = torch.nn.functional.normalize(features @ projection, dim=-1)
    if config is TIMM:
        projected = torch.nn.functional.normalize(
            features @ projection + model.visual.trunk.get_classifier().bias, dim=-1
        )
    torch.testing.assert_close(projected, images, atol=1e-5, rtol=1e-4)
    for precision in ("mixed", "bfloat16", "float16"):
        half = load_encoder(f"open_clip:{tmp_path}", LoadOptions(workers=0, precision=precision))  # type: ignore[arg-type]
        assert half.info.fingerprint != encoder.info.fingerprint
        assert half.logit_scale == encoder.logit_scale
        for found, expected in ((half.images(data, data.images), images), (half.texts(captions), texts)):
            assert not np.array_equal(found, expected)
            assert (found * expected.numpy()).sum(1).min() > 0.999
    with pytest.raises(ValueError, match="--runtime onnx: expected --precision float32, found float16"):
        load_encoder(f"open_clip:{tmp_path}", LoadOptions(workers=0, precision="float16", runtime="onnx", device="cpu"))

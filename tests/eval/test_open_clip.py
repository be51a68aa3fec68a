"""open_clip's models: their own preprocessing, weights in wrappers, and features of every kind of image tower."""

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tests.eval.tiny_open_clip import COCA, TIMM, TINY, save_open_clip
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.encoders.open_clip_encoder import OpenClipEncoder


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Weights of a small model that stands in for the architectures of open_clip, whose tags stay as they are."""
    for name in ("MobileCLIP-S1", "PE-Core-B-16", "ViT-B-32", "ViT-L-14", "ViT-S-16"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, deepcopy(TINY))
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32").state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *args, **kwargs: str(tmp_path / "weights.pt"))
    return tmp_path / "weights.pt"


def encoder_of(spec: str) -> OpenClipEncoder:
    encoder = load_encoder(spec, LoadOptions(workers=0))
    assert isinstance(encoder, OpenClipEncoder)
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
    assert encoder.transform(image).equal(theirs(image))
    assert str(theirs.transforms[-1]) in encoder.info.preprocessing
    assert ("is taken to be" in caplog.text) == (source == "")
    assert "andomly" not in caplog.text


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
    assert "mean=[0.1, 0.2, 0.3]" in folder.info.preprocessing


def test_weights_that_do_not_fit_are_refused_in_one_line(weights: Path, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt does not fit open_clip:ViT-B-32: of its tensors \d+ of"):
        encoder_of(f"open_clip:ViT-B-32:{tmp_path / 'other.pt'}")
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match="open_clip cannot load local-dir:"):
        encoder_of(f"open_clip:{tmp_path}")


@torch.inference_mode()
def test_features_are_what_the_projection_maps(tmp_path: Path) -> None:
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def of(config: dict[str, Any]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_open_clip(folder, config)
        encoder = encoder_of(f"open_clip:{folder}")
        return encoder.model.visual, encoder._features(pixels), encoder._embed(pixels)

    for config in (TINY, COCA):
        visual, features, embeddings = of(config)
        projected = features @ visual.proj
        if config is COCA:  # which normalizes by itself
            projected = torch.nn.functional.normalize(projected, dim=-1)
        torch.testing.assert_close(projected, embeddings, atol=1e-5, rtol=1e-4)
    visual, features, embeddings = of(TIMM)
    torch.testing.assert_close(visual.trunk.get_classifier()(features), embeddings, atol=1e-5, rtol=1e-4)

"""Runs and exports as encoders: the embeddings of the trained model, before normalisation."""

import dataclasses
import pickle
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from tests.trainer.finished_runs import finished_run
from threetowers.cache.encoders import live
from threetowers.cache.encoders.encoder import FrozenEncoder, ImageEncoder, TextEncoder
from threetowers.cache.encoders.names import EncoderName, EncoderOptions, load_frozen_encoder
from threetowers.cache.format.manifest import CaptionSources, Manifest, Side
from threetowers.trainer.data.transforms import center_crop
from threetowers.trainer.export.export import export
from threetowers.trainer.export.run_encoder import load_run_encoder
from threetowers.trainer.export.trained_model import load_model

SIDES: tuple[Side, ...] = ("image", "text")
CAPTIONS = ["a red disc", "cross, blue", "grey dot " * 9, ""]


def encoder_of(name: Path | str, **options: Any) -> FrozenEncoder:
    return load_run_encoder(EncoderName.parse(f"run:{name}"), EncoderOptions(**options))


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in ((32, 32), (50, 33), (20, 61))
    ]


def test_both_sides_are_those_of_the_trained_model(three: dict[str, Any], tmp_path: Path) -> None:
    three["engine"] = {"precision": "float32"}
    folder = finished_run(three)
    trained = load_model(folder)
    encoder = encoder_of(folder)
    image, text = encoder.side("image"), encoder.side("text")
    crops = torch.stack([center_crop(picture, 32) for picture in pictures()])
    pixels = np.stack([pickle.loads(pickle.dumps(image.transform))(picture) for picture in pictures()])
    assert np.array_equal(pixels, crops.numpy())
    found = image.embed(crops, "projected")
    torch.testing.assert_close(F.normalize(found, dim=-1), trained.encode_images(crops), rtol=0, atol=1e-6)
    assert (found.norm(dim=1) - 1).abs().min() > 0.01  # raw, not normalised
    words = text.embed(CAPTIONS, "projected")
    torch.testing.assert_close(F.normalize(words, dim=-1), trained.encode_texts(CAPTIONS), rtol=0, atol=1e-6)
    assert encoder.logit_scale == pytest.approx(float(trained.model.log_scales["scale"].detach().exp()))

    assert image.features == ("pooled", "projected", "head:f", "head:f_h")
    assert text.features == ("pooled", "projected", "head:g", "head:g_h")
    with torch.inference_mode():
        tower = trained.model.towers["image"](crops)
        embedding = trained.model.embed({"image": crops}, ["f_h"])["f_h"]
    pooled, projected, other, same = image.forward(crops, ("pooled", "projected", "head:f_h", "head:f"))
    torch.testing.assert_close(pooled, tower, rtol=0, atol=1e-6)
    assert same.equal(projected)
    torch.testing.assert_close(F.normalize(other, dim=-1), embedding, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"run:.*: feature: expected one of pooled, .*, found 'head:h_f'"):
        image.width("head:h_f")

    export(folder, tmp_path / "export")
    exported = encoder_of(tmp_path / "export")
    assert exported.side("image").embed(crops, "projected").equal(found)
    assert exported.side("text").embed(CAPTIONS, "projected").equal(words)


def test_preprocessing_is_stated_in_the_terms_of_timm(clip: dict[str, Any]) -> None:
    clip["towers"]["image"]["model"] = "test_resnet"
    preprocessing = encoder_of(finished_run(clip)).side("image").preprocessing
    assert (preprocessing.input_size, preprocessing.crop_mode, preprocessing.crop_pct) == ((32, 32), "center", 1.0)
    assert preprocessing.mean == pytest.approx(timm.create_model("test_resnet").pretrained_cfg["mean"])
    # The same square by timm's own transform: the resampling differs by parts of a pixel.
    transform = timm.data.create_transform(
        input_size=(3, 32, 32), interpolation="bicubic", crop_pct=1.0, crop_mode="center", use_prefetcher=True
    )
    smooth = Image.fromarray(np.linspace(0, 255, 60 * 80 * 3).reshape(60, 80, 3).astype(np.uint8))
    difference = np.abs(np.asarray(transform(smooth)).astype(int) - center_crop(smooth, 32).numpy().astype(int))
    assert difference.max() <= 3


@pytest.mark.parametrize("changes", [{}, {"pool": "last"}, {"mask_padding": False}, {"causal": True, "pool": "mean"}])
def test_no_caption_depends_on_those_beside_it(changes: dict[str, Any], clip: dict[str, Any]) -> None:
    clip["towers"]["text"] |= changes
    clip["data"]["context_length"] = 16
    folder = finished_run(clip)
    text = encoder_of(folder).side("text")
    together = text.embed(CAPTIONS, "projected")
    alone = torch.cat([text.embed([caption], "projected") for caption in CAPTIONS])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    expected = load_model(folder, precision="float32").encode_texts(CAPTIONS)
    torch.testing.assert_close(F.normalize(alone, dim=-1), expected, rtol=0, atol=2e-6)
    assert text.processing.pooling == changes.get("pool", "eos")
    assert [tokens.cut for tokens in text.tokenize(CAPTIONS)] == [False, False, True, False]


def test_a_prompt_is_part_of_the_caption(clip: dict[str, Any]) -> None:
    folder = finished_run(clip)
    plain, prompted = encoder_of(folder).side("text"), encoder_of(folder, prompt="a red ").side("text")
    assert prompted.embed(["disc"]).equal(plain.embed(["a red disc"]))
    assert prompted.processing.prompt == "a red "
    assert encoder_of(folder, max_length=8).side("text").processing == plain.processing
    with pytest.raises(ValueError, match="--max-length: found 4, expected that of the run, 8"):
        encoder_of(folder, max_length=4)


def test_lit_sees_images_through_its_frozen_encoder(lit: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    weights = cache.parent / "teacher.safetensors"
    folder = finished_run(lit)
    with pytest.raises(ValueError, match=r"takes rows of timm:test_resnet, .* needed to make them: .*name its weights"):
        encoder_of(folder)
    encoder = load_run_encoder(EncoderName("run", str(folder), None, str(weights)), EncoderOptions())
    lit["towers"]["third"]["weights"] = str(weights)
    lit["output_dir"] = str(tmp_path / "stated")
    stated = encoder_of(finished_run(lit))
    assert encoder.weights == str(folder)

    trained = load_model(folder)
    teacher = timm.create_model("test_resnet", pretrained=False).eval()
    from safetensors.torch import load_file

    teacher.load_state_dict(load_file(weights))
    image = encoder.side("image")
    assert image.preprocessing.input_size == (64, 64)
    pixels = torch.from_numpy(np.stack([image.transform(picture) for picture in pictures()]))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (image.preprocessing.mean, image.preprocessing.std))
    with torch.inference_mode():
        x_b3HW = (pixels / 255 - mean) / std
        rows = teacher.forward_head(teacher.forward_features(x_b3HW), pre_logits=True)
        expected = trained.encode_images(rows)
    found = F.normalize(image.embed(pixels, "projected"), dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert image.features == ("pooled", "projected", "head:h")
    assert image.width("pooled") == rows.shape[1]
    assert stated.side("image").embed(pixels, "projected").equal(image.embed(pixels, "projected"))
    assert stated.weights_digest == encoder.weights_digest


def manifest_of(encoder: FrozenEncoder, of: Side, feature: str) -> Manifest:
    """The manifest of a cache of one feature of an encoder."""
    side = encoder.side(of)
    return Manifest(
        encoder=encoder.name,
        weights=encoder.weights,
        weights_digest=encoder.weights_digest,
        feature=feature,
        dim=side.width(feature),
        dtype="float16",
        samples_per_tar=64,
        rows_per_tar=64,
        chunk_rows=64,
        versions={},
        of=of,
        preprocessing=side.preprocessing if isinstance(side, ImageEncoder) else None,
        text=side.processing if isinstance(side, TextEncoder) else None,
        captions=CaptionSources() if of == "text" else None,
    )


def both_cached(clip: dict[str, Any]) -> dict[str, Any]:
    """A run whose towers are both cached, which reads neither pictures nor words."""
    data = {key: value for key, value in clip["data"].items() if key not in ("tokenizer", "image_size")}
    towers = {of: {"kind": "cache", "of": of, "path": f"cache-of-{of}"} for of in ("image", "text")}
    return clip | {"data": data, "towers": towers, "output_dir": clip["output_dir"] + "-cached"}


def test_both_sides_may_be_those_of_a_frozen_encoder(clip: dict[str, Any]) -> None:
    options = EncoderOptions(prompt="a photo of ", max_length=6)
    pair = load_frozen_encoder("test:pair", options)
    manifests = {"image": manifest_of(pair, "image", "projected"), "text": manifest_of(pair, "text", "pooled")}
    folder = finished_run(both_cached(clip), manifests)
    trained, encoder = load_model(folder), encoder_of(folder)
    image, text = encoder.side("image"), encoder.side("text")
    words = F.normalize(text.embed(CAPTIONS[:3], "projected"), dim=-1)
    rows = pair.side("text").embed(CAPTIONS[:3])
    torch.testing.assert_close(words, trained.encode_tokens(rows), rtol=0, atol=1e-6)
    assert text.processing == pair.side("text").processing
    assert text.features == ("pooled", "projected", "head:g")
    assert [tokens.cut for tokens in text.tokenize(CAPTIONS[:3])] == [False, False, True]
    pixels = torch.from_numpy(np.stack([image.transform(picture) for picture in pictures()]))
    found = F.normalize(image.embed(pixels, "projected"), dim=-1)
    expected = trained.encode_images(pair.side("image").embed(pixels, "projected"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert encoder.weights_digest != pair.weights_digest

    same = encoder_of(folder, prompt="a photo of ", max_length=6)
    assert same.side("text").processing == text.processing
    with pytest.raises(ValueError, match="--prompt: found 'a ', expected that of the cached rows, 'a photo of '"):
        encoder_of(folder, prompt="a ")
    with pytest.raises(ValueError, match="--max-length: found 7, expected that of the cached rows, 6"):
        encoder_of(folder, max_length=7)
    with pytest.raises(ValueError, match=r"its image side takes rows of test:pair, .* weights_digest: expected"):
        encoder_of(f"{folder}:seed:1")


def test_weights_by_name_are_those_of_both_sides(clip: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder of both sides is loaded once; where there are two, the weights are those of the image side's."""
    loaded: list[EncoderName] = []
    real = load_frozen_encoder

    def load(name: EncoderName, options: EncoderOptions) -> FrozenEncoder:
        loaded.append(name)
        return real(name, options)

    monkeypatch.setattr(live, "load_frozen_encoder", load)
    pair, other = real("test:pair:seed:4"), real("test:bag")
    # As after a build from a file, of which a manifest has the name alone
    manifests = {of: manifest_of(pair, of, "pooled") for of in SIDES}
    manifests = {of: dataclasses.replace(each, weights="file:pair.pt") for of, each in manifests.items()}
    folder = finished_run(both_cached(clip), manifests)
    with pytest.raises(ValueError, match=r"its image side .* 'pair\.pt': give its .* as towers\.image\.weights"):
        encoder_of(folder)
    encoder = encoder_of(f"{folder}:seed:4")
    assert loaded == [EncoderName("test", "pair", 16, "seed:4")]
    rows = pair.side("text").embed(CAPTIONS[:3])
    words = F.normalize(encoder.side("text").embed(CAPTIONS[:3], "projected"), dim=-1)
    torch.testing.assert_close(words, load_model(folder).encode_tokens(rows), rtol=0, atol=1e-6)

    clip["output_dir"] += "-two"
    two = finished_run(both_cached(clip), manifests | {"text": manifest_of(other, "text", "pooled")})
    assert encoder_of(f"{two}:seed:4").side("text").embed(CAPTIONS[:1]).shape == (1, 24)
    assert loaded[1:] == [EncoderName("test", "pair", 16, "seed:4"), EncoderName("test", "bag")]


def test_what_is_no_run_is_refused(clip: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished run"):
        encoder_of(tmp_path)
    folder = finished_run(clip)
    assert encoder_of(f"{folder}@32").weights_digest == encoder_of(folder).weights_digest
    with pytest.raises(ValueError, match="expected images of the run's own size, 32x32: leave out @64"):
        encoder_of(f"{folder}@64")


def test_every_kind_of_encoder_is_where_the_package_says() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    kinds = project["entry-points"]["threetowers.encoders"]
    assert {"timm", "hf", "st", "run"} <= set(kinds)
    for target in kinds.values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))

"""open_clip's models as encoders, against what open_clip computes itself."""

import json
import pickle
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.cache.tiny_open_clip import (
    COCA,
    NORM_AFTER,
    RESNET,
    TEXT,
    TIMM,
    TIMM_VIT,
    TINY,
    hf_config,
    save_open_clip,
    save_words,
)
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.encoder import FrozenEncoder
from threetowers.cache.encoders.live import live_teacher
from threetowers.cache.encoders.names import EncoderOptions, load_frozen_encoder
from threetowers.cache.encoders.openclip.open_clip_encoder import open_clip_preprocessing, uint8_transform
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.verify.verify import verify

Draw = Callable[..., Image.Image]
Tree = dict[str, Any]
TIMM_LINEAR: Tree = TIMM | {"vision_cfg": TIMM["vision_cfg"] | {"timm_proj": "linear"}}
TIMM_ATTENTION: Tree = TIMM | {
    "vision_cfg": {"timm_model_name": "resnet10t", "timm_pool": "abs_attn", "timm_proj": "", "image_size": 224}
}
TOWERS = {
    "vit": TINY,
    "coca": COCA,
    "resnet": RESNET,
    "norm after pooling": NORM_AFTER,
    "timm": TIMM,
    "timm vit": TIMM_VIT,
    "timm linear": TIMM_LINEAR,
    "timm attention": TIMM_ATTENTION,
}
CAPTIONS = ["a red disc", "", "A PHOTO of a dog &amp; a cat, " * 9, "naïve café", "x y z x y z x"]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """saved(config, **preprocess): the folder of a small model."""

    def save(config: Tree, **preprocess: Any) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.glob('model*')))}"
        save_open_clip(folder, config, preprocess)
        return folder

    return save


def theirs(folder: Path) -> Any:
    """The model as open_clip loads it."""
    model = open_clip.create_model(f"local-dir:{folder}")
    return model.eval()


def load(folder: Path, **options: Any) -> FrozenEncoder:
    return load_frozen_encoder(f"open_clip:{folder}", EncoderOptions(**options))


def pixels(encoder: FrozenEncoder, count: int = 3) -> Tensor:
    size = encoder.side("image").preprocessing.input_size
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(encoder: FrozenEncoder, images_b3HW: Tensor) -> Tensor:
    p = encoder.side("image").preprocessing
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (p.mean, p.std))
    return (images_b3HW / 255 - mean) / std


def output_of(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a module gives while something runs."""
    found = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    run()
    handle.remove()
    return found[0]


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS)
@torch.inference_mode()
def test_projected_is_the_embedding_of_open_clip(config: Tree, saved: Callable[..., Path]) -> None:
    folder = saved(config, size=config["vision_cfg"]["image_size"])
    encoder, model = load(folder), theirs(folder)
    x, images = normalised(encoder, pixels(encoder)), pixels(encoder)
    features = encoder.side("image").features
    assert features[:2] == ("projected", "pooled")
    found = dict(zip(features, encoder.side("image").forward(images, features), strict=True))
    torch.testing.assert_close(found["projected"], model.encode_image(x, normalize=False), atol=1e-5, rtol=1e-4)
    texts = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    expected = model.encode_text(texts, normalize=False)
    torch.testing.assert_close(encoder.side("text").embed(CAPTIONS), expected, atol=1e-5, rtol=1e-4)
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    for feature, x_bD in found.items():
        assert encoder.side("image").width(feature) == x_bD.shape[1]
        torch.testing.assert_close(encoder.side("image").embed(images, feature), x_bD, atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_pooled_is_what_the_projection_maps(saved: Callable[..., Path]) -> None:
    for config, project in (
        (TINY, lambda model, x: x @ model.visual.proj),
        (COCA, lambda model, x: x @ model.visual.proj),
        (TIMM, lambda model, x: model.visual.trunk.get_classifier()(x)),
        (TIMM_LINEAR, lambda model, x: model.visual.head(x)),
        (TIMM_ATTENTION, lambda model, x: x),
        (RESNET, lambda model, x: x),
    ):
        folder = saved(config, size=config["vision_cfg"]["image_size"])
        encoder, model = load(folder), theirs(folder)
        pooled, projected = encoder.side("image").forward(pixels(encoder), ["pooled", "projected"])
        torch.testing.assert_close(project(model, pooled), projected, atol=1e-5, rtol=1e-4)
    folder = saved(TINY)
    encoder, model = load(folder), theirs(folder)
    pooled, projected = (encoder.side("text").embed(CAPTIONS, feature) for feature in ("pooled", "projected"))
    torch.testing.assert_close(pooled @ model.text_projection, projected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [TINY, NORM_AFTER, TIMM_VIT], ids=["vit", "norm after pooling", "timm vit"])
@torch.inference_mode()
def test_tokens_of_vision_transformers(config: Tree, saved: Callable[..., Path]) -> None:
    folder = saved(config, size=config["vision_cfg"]["image_size"])
    encoder, visual = load(folder), theirs(folder).visual
    x = normalised(encoder, pixels(encoder))
    if config is TIMM_VIT:
        tokens = visual.trunk.forward_features(x)
        block, layer = visual.trunk.blocks[0], "layer:trunk.blocks.0"
    else:
        tokens = output_of(visual.transformer, lambda: visual(x))
        tokens = tokens if config is NORM_AFTER else visual.ln_post(tokens)
        block, layer = visual.transformer.resblocks[0], "layer:transformer.resblocks.0"
    expected = {
        "cls": tokens[:, 0],
        "mean_patch": tokens[:, 1:].mean(1),
        "cls+mean_patch": torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1),
        layer: output_of(block, lambda: visual(x))[:, 1:].mean(1),
    }
    image = encoder.side("image")
    assert image.features == ("projected", "pooled", *list(expected)[:3])
    counted: list[int] = []
    image.model.get_submodule(f"tower.visual.{layer.removeprefix('layer:')}").register_forward_hook(
        lambda *_: counted.append(1)
    )
    found = image.forward(pixels(encoder), [*expected, "pooled"])
    assert len(counted) == 1
    for (feature, wanted), x_bD in zip(expected.items(), found, strict=False):
        torch.testing.assert_close(x_bD, wanted, atol=1e-5, rtol=1e-4, msg=feature)
        assert image.width(feature) == wanted.shape[1]


@torch.inference_mode()
def test_layers_that_are_maps(saved: Callable[..., Path]) -> None:
    folder = saved(RESNET, size=64)
    encoder, visual = load(folder), theirs(folder).visual
    x = normalised(encoder, pixels(encoder))
    expected = output_of(visual.layer4, lambda: visual(x)).mean((2, 3))
    torch.testing.assert_close(encoder.side("image").embed(pixels(encoder), "layer:layer4"), expected)
    with pytest.raises(ValueError, match="expected one of projected, pooled, layer:NAME, found 'cls'"):
        encoder.side("image").width("cls")


SIZES = [(32, 32), (50, 70), (71, 33), (9, 200), (31, 64)]


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("target", [33, (24, 40)], ids=str)
def test_the_transform_and_the_normalisation_are_those_of_open_clip(
    mode: str, interpolation: str, target: Any, draw: Draw
) -> None:
    config = PreprocessCfg(
        target, mean=(0.1, 0.5, 0.4), std=(0.2, 0.3, 0.4), interpolation=interpolation, resize_mode=mode, fill_color=7
    )
    whole = image_transform_v2(config, is_train=False)
    preprocessing = open_clip_preprocessing(vars(config), whole, "pillow")
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (preprocessing.mean, preprocessing.std))
    transform = pickle.loads(pickle.dumps(uint8_transform(whole)))
    for height, width in SIZES:
        image = draw(height + width, (width, height))
        found = transform(image)
        assert (found.dtype, found.shape[1:]) == (np.uint8, preprocessing.input_size)
        x = torch.from_numpy(np.ascontiguousarray(found)).float().div(255).sub(mean).div(std)
        torch.testing.assert_close(x, whole(image), atol=1e-6, rtol=0)
    assert preprocessing.crop_mode == {"shortest": "center", "longest": "border-7", "squash": "squash"}[mode]
    square = isinstance(target, int)
    expected = "bilinear" if interpolation == "bilinear" and (square or mode != "shortest") else "bicubic"
    assert preprocessing.interpolation == expected
    resampling = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[expected]
    if mode == "squash":  # stated as it is
        image = draw(5, (70, 50))
        height, width = preprocessing.input_size
        assert np.array_equal(
            np.asarray(image.resize((width, height), resampling)), transform(image).transpose(1, 2, 0)
        )


def test_a_transform_without_normalisation_is_refused() -> None:
    from torchvision.transforms import Compose, Resize, ToTensor

    with pytest.raises(ValueError, match="expected an evaluation transform that ends in ToTensor and Normalize"):
        uint8_transform(Compose([Resize(3), ToTensor()]))


TEXTS: dict[str, tuple[Tree, bool]] = {  # and whether padding is trimmed
    "clip": (TINY, True),
    "custom": (TINY | {"custom_text": True}, True),
    "first": (TINY | {"text_cfg": TEXT | {"pool_type": "first"}}, True),
    "last": (TINY | {"text_cfg": TEXT | {"pool_type": "last"}}, False),
    "no causal mask": (TINY | {"custom_text": True, "text_cfg": TEXT | {"no_causal_mask": True}}, False),
    "siglip": (
        TINY
        | {"custom_text": True, "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}},
        False,
    ),
    "no projection": (TINY | {"custom_text": True, "text_cfg": TEXT | {"width": 24, "proj_type": "none"}}, True),
    "coca": (COCA, False),
}


@pytest.mark.parametrize(("config", "trimmed"), TEXTS.values(), ids=TEXTS)
@torch.inference_mode()
def test_text_towers_are_exact_under_padding(config: Tree, trimmed: bool, saved: Callable[..., Path]) -> None:
    folder = saved(config)
    text, model = load(folder).side("text"), theirs(folder)
    tokens = text.tokenize(CAPTIONS)
    ids_bL = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    for row, ids_L in zip(tokens, ids_bL, strict=True):
        assert list(row.ids) == ids_L[: len(row.ids)].tolist()
        assert not ids_L[len(row.ids) :].any()
    assert [row.cut for row in tokens] == [False, False, True, False, False]
    expected = model.encode_text(ids_bL, normalize=False)
    torch.testing.assert_close(text.embed(CAPTIONS), expected, atol=1e-5, rtol=1e-4)
    short = [row for row in tokens if len(row.ids) < 8]
    assert len(short) == 3
    assert text.model.collate(short)["ids"].shape[1] == (max(len(row.ids) for row in short) if trimmed else 16)
    for i, caption in enumerate(CAPTIONS):
        torch.testing.assert_close(text.embed([caption])[0], expected[i], atol=1e-5, rtol=1e-4)
    for feature, x_bD in zip(text.features, text.forward(tokens, text.features), strict=True):
        assert text.width(feature) == x_bD.shape[1]


@pytest.mark.parametrize(
    ("kind", "pooler"), [("bert", "mean_pooler"), ("roberta", "mean_pooler"), ("bert", "cls_pooler")]
)
@torch.inference_mode()
def test_towers_of_transformers(kind: str, pooler: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_words(folder)
    save_open_clip(folder, hf_config(tmp_path, kind, pooler))
    text, model = load(folder).side("text"), theirs(folder)
    ids_bL = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    tokens = text.tokenize(CAPTIONS)
    for row, ids_L in zip(tokens, ids_bL, strict=True):
        assert list(row.ids) == ids_L[: len(row.ids)].tolist()
    assert [row.cut for row in tokens] == [False, False, True, False, False]
    expected = model.encode_text(ids_bL, normalize=False)
    torch.testing.assert_close(text.embed(CAPTIONS), expected, atol=1e-5, rtol=1e-4)
    short = [tokens[0], tokens[1]]
    assert text.model.collate(short)["ids"].shape == (2, 5)
    torch.testing.assert_close(text.forward(short, ["projected"])[0], expected[:2], atol=1e-5, rtol=1e-4)
    pooled = text.embed(CAPTIONS, "pooled")
    torch.testing.assert_close(model.text.proj(pooled), expected, atol=1e-5, rtol=1e-4)
    assert text.processing.pooling == {"mean_pooler": "MeanPooler", "cls_pooler": "ClsPooler"}[pooler]


@pytest.mark.parametrize(
    ("change", "saving", "trimmed"),
    [
        ({"pool_type": "eos", "eos_id": 3}, {}, True),
        ({"pool_type": "eos", "eos_id": 19}, {}, False),  # which no caption has: open_clip takes the first token
        ({"pool_type": "last", "tokenizer_kwargs": {"strip_sep_token": True}}, {}, False),
        ({"pool_type": "argmax"}, {}, True),
        ({"pool_type": "argmax"}, {"padding_side": "left"}, False),
        ({"pool_type": "last", "tokenizer_mode": "clips"}, {}, False),
    ],
    ids=str,
)
@torch.inference_mode()
def test_tokenizers_of_transformers(change: Tree, saving: Tree, trimmed: bool, tmp_path: Path) -> None:
    save_words(tmp_path, **saving)
    config = TINY | {"text_cfg": TEXT | {"vocab_size": 20, "hf_tokenizer_name": "words"} | change}
    save_open_clip(tmp_path, config)
    text, model = load(tmp_path).side("text"), theirs(tmp_path)
    ids_bL = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(CAPTIONS)
    tokens = text.tokenize(CAPTIONS)
    assert text.model.collate(tokens)["ids"].tolist() == ids_bL.tolist()
    assert [row.cut for row in tokens] == [False, False, True, False, False]
    assert (text.model.collate(tokens[:2])["ids"].shape[1] < 16) == trimmed
    expected = model.encode_text(ids_bL, normalize=False)
    for i, caption in enumerate(CAPTIONS):
        torch.testing.assert_close(text.embed([caption])[0], expected[i], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_prompt_and_length(saved: Callable[..., Path]) -> None:
    folder = saved(TINY)
    plain = load(folder).side("text")
    text = load(folder, prompt="a photo of ", max_length=6).side("text")
    assert (text.processing.prompt, text.processing.max_length) == ("a photo of ", 6)
    assert (plain.processing.prompt, plain.processing.max_length) == ("", 16)
    assert text.processing.tokenizer_digest == plain.processing.tokenizer_digest
    assert (plain.processing.pooling, plain.processing.normalize) == ("argmax", False)
    short, long = text.tokenize(["dog", "dog cat"])
    assert (short.cut, long.cut, len(short.ids), len(long.ids)) == (False, True, 6, 6)
    assert list(short.ids) == list(plain.tokenize(["a photo of dog"])[0].ids)
    torch.testing.assert_close(
        text.embed(["dog", "dog cat"]), plain.embed(["a photo of dog"] * 2), atol=1e-5, rtol=1e-4
    )
    for length in (2, 17):
        with pytest.raises(ValueError, match=f"--max-length: expected 3 to 16, the model's own, found {length}"):
            load(folder, max_length=length)


def test_the_digest_of_a_tokenizer_is_of_what_decides_the_ids(saved: Callable[..., Path], tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return load(folder).side("text").processing.tokenizer_digest

    def words(number: int, text: Tree, **saving: Any) -> Path:
        folder = tmp_path / f"words{number}"
        save_words(folder, **saving)
        save_open_clip(folder, TINY | {"text_cfg": TEXT | {"vocab_size": 20, "hf_tokenizer_name": "words"} | text})
        return folder

    base = digest(saved(TINY))
    assert digest(saved(COCA)) == base  # another model, the same tokens
    whitespace = TINY | {"text_cfg": TEXT | {"tokenizer_kwargs": {"clean": "whitespace"}}}
    longer = TINY | {"text_cfg": TEXT | {"context_length": 20}}
    stripped: Tree = {"tokenizer_kwargs": {"strip_sep_token": True}}
    first = words(0, {})
    others = [words(2, stripped), words(3, {"tokenizer_mode": "clips"}), words(4, {}, padding_side="left")]
    found = [base, *map(digest, [saved(whitespace), saved(longer), first, *others])]
    assert len(set(found)) == len(found)
    assert digest(words(1, {})) == digest(first)
    encoder = load(first)
    before = encoder.side("text").processing.tokenizer_digest
    encoder.side("text").embed(CAPTIONS)  # a tokenizer keeps the length that it last cut to
    assert load(first).side("text").processing.tokenizer_digest == before


def test_a_tokenizer_that_drops_words_at_random_is_refused(saved: Callable[..., Path]) -> None:
    folder = saved(TINY | {"text_cfg": TEXT | {"tokenizer_kwargs": {"reduction_mask": "random"}}})
    with pytest.raises(ValueError, match=r"tokenizer_kwargs\.reduction_mask: expected none"):
        load(folder)


@pytest.mark.parametrize("config", [TINY, TIMM, RESNET], ids=["vit", "timm", "resnet"])
def test_onnx_runtime_gives_the_same(config: Tree, saved: Callable[..., Path]) -> None:
    folder = saved(config, size=config["vision_cfg"]["image_size"])
    plain, onnx = load(folder), load(folder, runtime="onnx")
    layer = {"vit": "layer:transformer", "timm": "layer:trunk.layer2", "resnet": "layer:layer2"}
    name = next(name for name, one in (("vit", TINY), ("timm", TIMM), ("resnet", RESNET)) if one is config)
    features = [*plain.side("image").features, layer[name]]
    for count in (1, 3):
        pairs = zip(*(one.side("image").forward(pixels(plain, count), features) for one in (plain, onnx)), strict=True)
        for expected, found in pairs:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_precisions(saved: Callable[..., Path]) -> None:
    folder = saved(TINY)
    exact = load(folder)
    expected = exact.side("image").embed(pixels(exact)), exact.side("text").embed(CAPTIONS)
    near = [
        load(folder, precision="bfloat16"),
        *(load(folder).with_weights(d) for d in (torch.bfloat16, torch.float16)),
    ]
    for encoder in near:
        found = encoder.side("image").embed(pixels(exact)), encoder.side("text").embed(CAPTIONS)
        for x_bD, y_bD in zip(found, expected, strict=True):
            assert x_bD.dtype == torch.float32
            assert not x_bD.equal(y_bD)
            assert torch.cosine_similarity(x_bD, y_bD).min() > 0.999


def test_caches_of_open_clip_and_their_live_teachers(
    saved: Callable[..., Path], tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(TINY)
    build_cache(
        BuildConfig(tars=tars, output_dir=tmp_path / "cache", encoder=f"open_clip:{folder}", feature="cls+mean_patch")
    )
    manifest = EmbeddingCache.open(tmp_path / "cache").manifest
    assert (manifest.encoder, manifest.weights, manifest.dim) == (f"open_clip:{folder}", str(folder), 64)
    assert "open_clip_torch" in manifest.versions
    assert live_teacher(manifest).weights_digest == manifest.weights_digest
    assert verify(tmp_path / "cache", tars, depth="recompute").ok
    # Of a tag, a file, and a model of the hub
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-S-16", deepcopy(TINY))
    weights = folder / "open_clip_model.safetensors"
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *args, **kwargs: str(weights))
    monkeypatch.setattr(
        "open_clip.factory.get_pretrained_cfg", lambda model, tag: {"hf_hub": "some/where"} if tag == "some" else {}
    )
    monkeypatch.setattr("open_clip.get_pretrained_cfg", open_clip.factory.get_pretrained_cfg)
    by_tag = load_frozen_encoder("open_clip:ViT-S-16:some")
    assert (by_tag.name, by_tag.weights, by_tag.weights_digest) == (
        "open_clip:ViT-S-16",
        "some",
        manifest.weights_digest,
    )
    by_file = load_frozen_encoder(f"open_clip:ViT-S-16:{weights}")
    assert by_file.weights == "file:open_clip_model.safetensors"


def test_what_cannot_be_used_is_said_in_one_line(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(TINY)
    assert load_frozen_encoder(f"open_clip:local-dir:{folder}").name == f"open_clip:{folder}"
    config = json.loads((folder / "open_clip_config.json").read_text())
    for size in ("@64", "@32"):
        name = f"open_clip:{folder}"
        from threetowers.cache.encoders.names import EncoderName

        asked = EncoderName("open_clip", str(folder), int(size[1:]))
        if size == "@32":
            assert load_frozen_encoder(asked).name == name
        else:
            with pytest.raises(ValueError, match="expected the model's own size, 32 x 32, found @64: leave it out"):
                load_frozen_encoder(asked)
    state = theirs(folder).state_dict()
    state["visual.proj"][0, 0] = float("nan")
    save_file({name: value.clone() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="NaN or infinity in 1 of its tensors"):
        load(folder)
    config["preprocess_cfg"]["resize_mode"] = "stretch"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="open_clip cannot load local-dir:"):
        load(folder)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"open_clip not found: pip install 'threetowers\[open_clip\]'"):
        load_frozen_encoder("open_clip:ViT-B-32")

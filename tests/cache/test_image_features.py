"""Features of timm models beside the pooled, against timm's own ways to them."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from threetowers.cache.encoders.encoder import ImageEncoder
from threetowers.cache.encoders.image_features import ImageLayout, mean_over_image
from threetowers.cache.encoders.names import EncoderName, EncoderOptions, load_frozen_encoder

Weights = Callable[..., str]
TOKENS = ("cls", "mean_patch", "cls+mean_patch")


def encoder_of(model: str, weights: str, size: int | None = None, **options: Any) -> ImageEncoder:
    return load_frozen_encoder(EncoderName("timm", model, size, weights), EncoderOptions(**options)).side("image")


def images(size: tuple[int, int], count: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(encoder: ImageEncoder, images_b3HW: Tensor) -> Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (encoder.preprocessing.mean, encoder.preprocessing.std))
    return (images_b3HW / 255 - mean) / std


def reference_model(model: str, weights: str, **arguments: Any) -> Any:
    reference = timm.create_model(model, pretrained=False, **arguments).eval()
    reference.load_state_dict(load_file(weights))
    return reference


@torch.inference_mode()
def test_tokens_are_those_after_the_final_norm(weights: Weights) -> None:
    encoder = encoder_of("test_vit", weights("test_vit"))
    assert encoder.features == ("pooled", *TOKENS)
    model = reference_model("test_vit", weights("test_vit"))
    pixels = images(encoder.preprocessing.input_size)
    x = normalised(encoder, pixels)
    tokens, pairs = model.forward_intermediates(x, norm=True, return_prefix_tokens=True, output_fmt="NLC")
    patches, prefix = pairs[-1]
    cls, mean = prefix[:, 0], patches.mean(1)
    torch.testing.assert_close(tokens[:, 0], cls)
    expected = [model.forward_head(tokens, pre_logits=True), cls, mean, torch.cat([cls, mean], 1)]
    for found, wanted, feature in zip(
        encoder.forward(pixels, encoder.features), expected, encoder.features, strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        assert encoder.width(feature) == found.shape[1]
        torch.testing.assert_close(encoder.embed(pixels, feature), wanted, atol=1e-5, rtol=1e-4)
    for layer, (patches, _) in enumerate(
        model.forward_intermediates(x, return_prefix_tokens=True, output_fmt="NLC")[1]
    ):
        found = encoder.embed(pixels, f"layer:blocks.{layer}")
        torch.testing.assert_close(found, patches.mean(1), atol=1e-5, rtol=1e-4)
    embedded = model.patch_embed(x)  # (b, H, W, D), no class token yet
    torch.testing.assert_close(encoder.embed(pixels, "layer:patch_embed"), embedded.mean((1, 2)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "size", "offered", "prefix"),
    [
        ("deit_tiny_distilled_patch16_224", 32, TOKENS, 2),
        ("vit_small_patch14_reg4_dinov2", 28, TOKENS, 5),
        ("eva02_tiny_patch14_224", 28, TOKENS, 1),
        ("vit_relpos_small_patch16_224", 224, ("mean_patch",), 0),  # patches alone
        ("vit_medium_patch16_reg4_gap_256", 64, ("mean_patch",), 4),  # registers, and no class token
        ("hiera_tiny_224", 224, ("mean_patch",), 0),  # which does not say that it has no prefix
        ("pit_ti_224", 224, (), 0),  # gives class tokens alone
    ],
)
@torch.inference_mode()
def test_prefix_tokens_are_no_patches(
    model: str, size: int, offered: tuple[str, ...], prefix: int, tmp_path: Any
) -> None:
    reference: Any = timm.create_model(model, pretrained=False).eval()
    torch.save(reference.state_dict(), tmp_path / "w.pt")
    encoder = encoder_of(model, str(tmp_path / "w.pt"), size)
    assert encoder.features == ("pooled", *offered)
    if size != 224:
        reference.set_input_size(img_size=size)
    pixels = images((size, size), 1)
    tokens = reference.forward_features(normalised(encoder, pixels))
    if "mean_patch" in offered:
        torch.testing.assert_close(
            encoder.embed(pixels, "mean_patch"), tokens[:, prefix:].mean(1), atol=1e-4, rtol=1e-4
        )
    if "cls" in offered:
        torch.testing.assert_close(encoder.embed(pixels, "cls"), tokens[:, 0], atol=1e-4, rtol=1e-4)


def outputs_by_hooks(model: nn.Module, x: Tensor, layers: list[str]) -> dict[str, Tensor]:
    found = {}
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(
            lambda _m, _i, out, layer=layer: found.update({layer: out.clone()})
        )
    with torch.inference_mode():
        model(x)
    return found


@pytest.mark.parametrize(
    ("model", "axes"),
    [
        ("test_resnet", {"layer2": (2, 3), "layer1.0.bn1": (2, 3), "layer1.0.act1": (2, 3)}),  # acts work in place
        ("test_convnext", {"stages.1": (2, 3), "stages.1.blocks.0.mlp.fc1": (1, 2), "stem": (2, 3)}),
        ("swin_tiny_patch4_window7_224", {"layers.1": (1, 2), "patch_embed.proj": (2, 3), "norm": (1, 2)}),
    ],
)
def test_maps_are_averaged_over_space(model: str, axes: dict[str, tuple[int, int]], tmp_path: Any) -> None:
    torch.manual_seed(0)
    reference = timm.create_model(model, pretrained=False).eval()
    torch.save(reference.state_dict(), tmp_path / "w.pt")
    encoder = encoder_of(model, str(tmp_path / "w.pt"))
    assert encoder.features == ("pooled",)
    pixels = images(encoder.preprocessing.input_size, 2)
    outputs = outputs_by_hooks(reference, normalised(encoder, pixels), list(axes))
    found = encoder.forward(pixels, [f"layer:{layer}" for layer in axes])
    for x_bD, (layer, space) in zip(found, axes.items(), strict=True):
        torch.testing.assert_close(x_bD, outputs[layer].mean(space), atol=1e-5, rtol=1e-4)


def test_several_features_take_one_pass(weights: Weights) -> None:
    encoder = encoder_of("test_vit", weights("test_vit"), 64)
    features = [*encoder.features, "layer:blocks.0", "layer:blocks.0.attn", "layer:fc_norm"]
    alone = [encoder.embed(images((64, 64)), feature) for feature in features]
    passes = []
    encoder.model.model.norm.register_forward_hook(lambda *_: passes.append(1))
    together = encoder.forward(images((64, 64)), features)
    assert len(passes) == 1
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("model", "size"), [("test_vit", 64), ("test_convnext", 64)])
@pytest.mark.parametrize(
    "options", [{"runtime": "onnx"}, pytest.param({"compiled": True}, marks=pytest.mark.slow)], ids=str
)
def test_other_runtimes_give_the_same(model: str, size: int, options: dict[str, Any], weights: Weights) -> None:
    plain, other = (encoder_of(model, weights(model), size, **o) for o in ({}, options))
    layers = ["blocks.0", "patch_embed"] if model == "test_vit" else ["stages.1", "stages.1.blocks.0.mlp.fc1"]
    features = [*plain.features, *(f"layer:{layer}" for layer in layers)]
    for batch in (1, 3):
        pixels = images((size, size), batch)
        pairs = zip(other.forward(pixels, features), plain.forward(pixels, features), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "feature", "message"),
    [
        (
            "test_vit",
            "projected",
            "expected one of pooled, cls, .*layer:NAME, found 'projected': a timm model has no joint",
        ),
        ("test_resnet", "cls", "test_resnet: feature: expected one of pooled, layer:NAME, found 'cls'"),
        ("test_vit", "layer:blocks.99", "layer:blocks.99: expected the name of a module, as one of blocks.0, "),
        ("test_vit", "layer:", "expected the name of a module, as one of patch_embed, "),
        ("test_resnet", "layer:fc", "expected a module that runs once for an image, found one that does not run"),
        ("test_vit", "layer:patch_embed.proj.weight", "expected the name of a module"),
    ],
)
def test_features_that_a_model_does_not_have(model: str, feature: str, message: str, weights: Weights) -> None:
    encoder = encoder_of(model, weights(model), 64)
    for ask in (encoder.width, lambda feature: encoder.embed(images((64, 64)), feature)):
        with pytest.raises(ValueError, match=message):
            ask(feature)
    assert encoder.width() == encoder.embed(images((64, 64))).shape[1]  # of use as before


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.act(x))


def test_a_module_that_runs_twice_is_refused(weights: Weights) -> None:
    encoder = encoder_of("test_resnet", weights("test_resnet"), 64)
    encoder.model.model.layer1 = nn.Sequential(encoder.model.model.layer1, Twice())
    with pytest.raises(ValueError, match=r"layer:layer1\.1\.act: .* several times: choose the block"):
        encoder.width("layer:layer1.1.act")


def test_shapes() -> None:
    layout = ImageLayout((32, 48), prefix=2, tokens=8)
    maps = torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(mean_over_image(maps, layout), maps.mean((2, 3)))
    torch.testing.assert_close(mean_over_image(maps.permute(0, 2, 3, 1), layout), maps.mean((2, 3)))
    odd = torch.randn(2, 5, 3, 4)  # of 3 x 4.5
    torch.testing.assert_close(mean_over_image(odd, layout), odd.mean((2, 3)))
    cube = torch.randn(2, 4, 4, 4)  # could be either
    for last, axes in ((False, (2, 3)), (True, (1, 2))):
        torch.testing.assert_close(mean_over_image(cube, ImageLayout((32, 32), channels_last=last)), cube.mean(axes))
    tokens = torch.randn(2, 8, 5)
    torch.testing.assert_close(mean_over_image(tokens, layout), tokens[:, 2:].mean(1))
    torch.testing.assert_close(mean_over_image(tokens[:, 2:], layout), tokens[:, 2:].mean(1))
    for bad, found in (
        (torch.randn(2, 7, 5), "found 7"),
        (torch.randn(2, 3, 9, 3), r"\(2, 3, 9, 3\)"),
        ((maps,), "tuple"),
    ):
        with pytest.raises(ValueError, match=found):
            mean_over_image(bad, layout)

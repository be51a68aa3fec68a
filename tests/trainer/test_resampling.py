"""Weights of another image size or context length: resampled as timm and open_clip do, and said; else refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.trainer.launches import TRAIN, read_metrics, run_command, write_config
from tests.trainer.small_models import SPECIALIZED, VIT, inputs_of, model_of
from tests.trainer.test_config import changed
from tests.trainer.test_export import finished_run
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.export.export import export
from threetowers.trainer.export.trained_model import load_model
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.state_dict import deduplicated_state_dict
from threetowers.trainer.run.run_folder import RunFolder

SWIN = {
    "kind": "timm",
    "model": "swin_tiny_patch4_window7_224",
    "args": {"depths": [1, 1], "embed_dim": 24, "num_heads": [1, 2]},
}
CAIT = {"kind": "timm", "model": "cait_xxs24_224", "args": {"depth": 1, "embed_dim": 48}}
TEXT = {"kind": "text", "width": 16, "depth": 2, "heads": 2}


def image_model(image: dict[str, Any], size: int, **args: Any) -> TowerModel:
    tree = changed("towers.image", image | {"args": image.get("args", {}) | {"img_size": size} | args})
    return model_of(tree | {"data": tree["data"] | {"image_size": size}})


def text_model(text: dict[str, Any], context_length: int) -> TowerModel:
    tree = changed("towers.text", text)
    return model_of(tree | {"data": tree["data"] | {"context_length": context_length}})


def saved(model: TowerModel, folder: Path) -> str:
    """Write the weights of a run, with noise on them; return the file."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    save_file(deduplicated_state_dict(model), folder / "run.safetensors")
    return str(folder / "run.safetensors")


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # in timm's interpolation
@pytest.mark.parametrize(
    ("image", "sizes", "args", "resampled"),
    [
        (VIT, (32, 64), ({}, {}), ["pos_embed from 1 x 17 x 32 to 1 x 65 x 32"]),
        (VIT, (64, 32), ({}, {}), ["pos_embed from 1 x 65 x 32 to 1 x 17 x 32"]),
        (
            SWIN,
            (64, 128),
            ({"window_size": 4}, {"window_size": 8}),
            [
                "layers.0.blocks.0.attn.relative_position_bias_table from 49 x 1 to 225 x 1",
                "layers.1.blocks.0.attn.relative_position_bias_table from 49 x 2 to 225 x 2",
            ],
        ),
    ],
)
def test_image_towers_are_resampled_as_timm_does(
    tmp_path: Path, image: dict[str, Any], sizes: tuple[int, int], args: tuple[Any, Any], resampled: list[str]
) -> None:
    source = image_model(image, sizes[0], **args[0])
    file = saved(source, tmp_path)
    target = image_model(image | {"init": f"{file}#towers.image"}, sizes[1], **args[1])
    notes = target.load_initial_weights()
    assert notes == [f"towers.image.init: resampled model.{name}" for name in resampled]
    # The same through a file of timm's, by timm's own loading of a file for a model of another size.
    weights = source.towers["image"].model.state_dict()  # type: ignore[union-attr]
    save_file(weights, tmp_path / "timm.safetensors")
    own = {**image["args"], "img_size": sizes[1], **args[1]}
    overlay = {"file": str(tmp_path / "timm.safetensors"), "num_classes": 0}
    theirs = timm.create_model(image["model"], pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **own)
    for name, tensor in theirs.state_dict().items():
        assert target.towers["image"].model.state_dict()[name].equal(tensor), name  # type: ignore[union-attr]
    by_file = image_model(image | {"init": str(tmp_path / "timm.safetensors")}, sizes[1], **args[1])
    assert by_file.load_initial_weights() == notes
    assert all(a.equal(b) for a, b in zip(by_file.towers.parameters(), target.towers.parameters(), strict=True))


def test_weights_of_the_same_size_are_taken_as_they_are(tmp_path: Path) -> None:
    source = image_model(VIT, 32)
    target = image_model(VIT | {"init": f"{saved(source, tmp_path)}#towers.image"}, 32)
    assert target.load_initial_weights() == []
    assert all(
        a.equal(b)
        for a, b in zip(source.towers["image"].parameters(), target.towers["image"].parameters(), strict=True)
    )


def test_positions_of_a_specialised_tower_are_resampled(tmp_path: Path) -> None:
    source = image_model(SPECIALIZED, 32)
    target = image_model(SPECIALIZED | {"init": f"{saved(source, tmp_path)}#towers.image"}, 64)
    assert target.load_initial_weights() == [
        "towers.image.init: resampled model.vit.pos_embed from 1 x 17 x 32 to 1 x 65 x 32"
    ]
    before, after = (dict(model.towers["image"].named_parameters()) for model in (source, target))
    expected = timm.layers.resample_abs_pos_embed(before["model.vit.pos_embed"], [8, 8], num_prefix_tokens=1)
    torch.testing.assert_close(after.pop("model.vit.pos_embed"), expected)
    assert all(p.equal(before[name]) for name, p in after.items())
    inputs = inputs_of(2) | {"image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8)}
    assert target(inputs).embeddings["f"].isfinite().all()


@pytest.mark.parametrize(("before", "after"), [(8, 12), (12, 5)])
def test_text_positions_are_interpolated_as_open_clip_does(tmp_path: Path, before: int, after: int) -> None:
    open_clip_model = pytest.importorskip("open_clip.model")
    source = text_model(TEXT, before)
    target = text_model(TEXT | {"init": f"{saved(source, tmp_path)}#towers.text"}, after)
    notes = target.load_initial_weights()
    assert notes == [f"towers.text.init: resampled position from 1 x {before} x 16 to 1 x {after} x 16"]
    positions: dict[str, Tensor] = {"positional_embedding": source.towers["text"].position[0].detach()}  # type: ignore[index, union-attr]
    shape = SimpleNamespace(positional_embedding=torch.empty(after, 16))
    open_clip_model.resize_text_pos_embed(positions, shape)
    assert target.towers["text"].position[0].equal(positions["positional_embedding"])  # type: ignore[index]
    assert target.towers["text"].embed.weight.equal(source.towers["text"].embed.weight)  # type: ignore[union-attr, operator, arg-type]


@pytest.mark.parametrize(
    ("tower", "found", "expected", "message"),
    [
        (
            "image",
            VIT,
            VIT | {"args": VIT["args"] | {"depth": 3}},
            "model.blocks: 4 found, 3 expected; change the tower",
        ),
        (
            "image",
            VIT,
            VIT | {"args": VIT["args"] | {"embed_dim": 48}},
            r"model\.cls_token: 1 x 1 x 32 found, 1 x 1 x 48 expected; .*; \d+ more of another shape; change the tower",
        ),
        (
            "image",
            VIT,
            {"kind": "timm", "model": "test_resnet"},
            r"missing model\.conv1.* and \d+ more; unexpected model\.",
        ),
        ("text", TEXT, TEXT | {"depth": 1}, "blocks: 2 found, 1 expected; change"),
        (
            "text",
            TEXT,
            TEXT | {"width": 32},
            r"position: 1 x 32 x 16 found, 1 x 32 x 32 expected; embed\.weight: 48 x 16 ",
        ),
    ],
)
def test_another_depth_or_width_is_refused(
    tmp_path: Path, tower: str, found: dict[str, Any], expected: dict[str, Any], message: str
) -> None:
    file = saved(model_of(changed(f"towers.{tower}", found)), tmp_path)
    target = model_of(changed(f"towers.{tower}", expected | {"init": f"{file}#towers.{tower}"}))
    with pytest.raises(ValueError, match=rf"towers\.{tower}\.init: .* does not fit the tower: {message}") as raised:
        target.load_initial_weights()
    assert "\n" not in str(raised.value)


def test_a_family_that_timm_does_not_resample_is_refused(tmp_path: Path) -> None:
    file = saved(image_model(CAIT, 32), tmp_path)
    target = image_model(CAIT | {"init": f"{file}#towers.image"}, 64)
    with pytest.raises(ValueError, match=r"model\.pos_embed: 1 x 4 x 48 found, 1 x 16 x 48 expected; change the tower"):
        target.load_initial_weights()


def test_a_run_of_another_size_names_the_way_on(clip: dict[str, Any], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(parse(clip), {}, {})
    for key in ("image_size", "context_length"):
        with pytest.raises(
            ConfigError, match=rf"(?s)data\.{key}: .*`init` of its towers, as in towers\.NAME\.init=.*/run/mod"
        ):
            folder.check(parse(clip | {"data": clip["data"] | {key: 64}}))
    with pytest.raises(ConfigError, match=r"or remove the folder$"):
        folder.check(parse(clip | {"seed": 9}))


@pytest.mark.distributed
def test_going_on_at_a_higher_resolution_with_longer_captions(clip: dict[str, Any], tmp_path: Path) -> None:
    """A run from the weights of another; it is evaluated, loaded and exported like any other."""
    clip["towers"]["image"] |= {"args": {"img_size": 32}}
    low = finished_run(clip | {"output_dir": str(tmp_path / "low")})
    clip["data"] |= {"image_size": 48, "context_length": 12}
    clip["towers"]["image"] |= {"args": {"img_size": 48}, "init": f"{low}/model.safetensors#towers.image"}
    clip["towers"]["text"] |= {"init": f"{low}/model.safetensors#towers.text"}
    clip |= {"duration": {"steps": 2}, "evaluation": {"tars": clip["data"]["tars"][:1], "every": {"steps": 1}}}
    high, out = write_config(clip, tmp_path, "high")
    done = run_command([*TRAIN, high])
    assert "towers.image.init: resampled model.pos_embed from 1 x 5 x 64 to 1 x 10 x 64" in done.stderr
    assert "towers.text.init: resampled position from 1 x 8 x 16 to 1 x 12 x 16" in done.stderr
    assert any("retrieval/text_to_image/recall@1" in line for line in read_metrics(out))
    model = load_model(out)
    assert model.encode_images(torch.zeros(2, 3, 48, 48, dtype=torch.uint8)).shape == (2, 16)
    for form in ("threetowers", "timm"):
        assert export(out, tmp_path / form, form).difference == 0  # type: ignore[arg-type]

"""Weights that a tower inherits from a larger one: which blocks, channels and heads, and what is refused."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.trainer.finished_runs import finished_run
from tests.trainer.small_models import SPECIALIZED, VIT, inputs_of, model_of
from tests.trainer.test_config import changed
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.export.export import export
from threetowers.trainer.export.trained_model import load_model
from threetowers.trainer.model.initial.inheritance import inherited_weights
from threetowers.trainer.model.initial.initial_weights import load_initial
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.towers.text_transformer import TextTransformer

TEXT = {"kind": "text", "width": 40, "depth": 7, "heads": 5, "mlp_ratio": 3}
SMALL_TEXT = TEXT | {"width": 24, "depth": 3, "heads": 3, "mlp_ratio": 2}


def text_tower(config: dict[str, Any]) -> nn.Module:
    return model_of(changed("towers.text", config)).towers["text"]


def vit(**args: Any) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, **{"img_size": 32, "patch_size": 8, "num_heads": 2, **args}
    )


def element_by_element(tower: nn.Module, source: nn.Module, blocks: dict[int, int], head_width: int) -> None:
    """Compare each number of a transformer with the one that it is in the larger transformer."""
    own, larger = tower.state_dict(), source.state_dict()
    for name, tensor in own.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str(blocks[int(parts[1])])
        found = larger[".".join(parts)]
        for index in itertools.product(*map(range, tensor.shape)):
            at = list(index)
            if ".qkv." in name:  # queries, keys and values, each head by head
                part, row = divmod(at[0], len(tensor) // 3)
                head, row = divmod(row, head_width)
                at[0] = part * (len(found) // 3) + head * head_width + row
            assert tensor[index] == found[tuple(at)], (name, index)


def noise(tower: nn.Module) -> nn.Module:
    """The tower with other numbers everywhere."""
    with torch.no_grad():
        for tensor in (*tower.parameters(), *tower.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return tower


def test_a_text_tower() -> None:
    source, tower = noise(text_tower(TEXT)), text_tower(SMALL_TEXT)
    weights, notes = inherited_weights(tower, source)
    tower.load_state_dict(weights)
    element_by_element(tower, source, {0: 0, 1: 2, 2: 4}, head_width=8)
    count = sum(p.numel() for p in tower.parameters())
    total = sum(p.numel() for p in source.parameters())
    assert notes == ["blocks 0, 2, 4 of 7", f"{count:,} of {total:,} parameters"]
    assert tower(inputs_of(2)["text"]).shape == (2, 24)


def test_a_vision_transformer() -> None:
    source = noise(vit(embed_dim=36, depth=5, num_heads=3, init_values=0.1))
    tower = vit(embed_dim=24, depth=2, num_heads=2, init_values=0.1, mlp_ratio=2)
    tower.load_state_dict(inherited_weights(tower, source)[0])
    element_by_element(tower, source, {0: 0, 1: 2}, head_width=12)


def test_all_of_a_tower_of_the_same_shape() -> None:
    source, tower = noise(vit(embed_dim=24, depth=2)), vit(embed_dim=24, depth=2)
    weights, notes = inherited_weights(tower, source)
    assert all(tensor.equal(source.state_dict()[name]) for name, tensor in weights.items())
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("larger", "smaller", "blocks"),
    [
        (
            ("resnet18d", {"stem_width": 16, "channels": [32, 40, 48, 64]}),
            ("resnet10t", {"stem_width": 8, "channels": [16, 24, 24, 40]}),
            {"layer1.0": "layer1.0", "layer4.0": "layer4.0"},
        ),
        (
            ("tf_efficientnet_lite2", {}),
            ("tf_efficientnet_lite0", {}),
            {"blocks.2.1": "blocks.2.1", "blocks.5.3": "blocks.5.3", "blocks.5.2": "blocks.5.2"},
        ),
    ],
)
def test_convolutional_towers(
    larger: tuple[str, dict[str, Any]], smaller: tuple[str, dict[str, Any]], blocks: dict[str, str]
) -> None:
    """The first channels of filters, norms and running moments; strided first blocks of stages stay the first."""
    source, tower = (timm.create_model(name, num_classes=0, **args) for name, args in (larger, smaller))
    noise(source)
    tower.load_state_dict(inherited_weights(tower, source)[0])
    for own_name, name in blocks.items():
        own, found = tower.get_submodule(own_name).state_dict(), source.get_submodule(name).state_dict()
        assert own.keys() == found.keys()
        for key, tensor in own.items():
            assert tensor.equal(found[key][tuple(slice(size) for size in tensor.shape)]), key
    tower.eval()
    assert tower(torch.rand(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize(
    ("larger", "smaller", "message"),
    [
        ({"embed_dim": 24, "depth": 2}, {"embed_dim": 24, "depth": 3}, "blocks: 2 blocks found, 3 expected; name a de"),
        ({"embed_dim": 24}, {"embed_dim": 36, "num_heads": 3}, r"cls_token: 1 x 1 x 24 found, 1 x 1 x 36 expected; na"),
        ({"embed_dim": 24}, {"embed_dim": 18}, r"blocks\.0\.attn: heads of width 12 found, 9 expected; whole heads"),
        ({"embed_dim": 24}, {"embed_dim": 24, "mlp_ratio": 5}, r"blocks\.0\.mlp\.fc1\.weight: 96 x 24 found, 120 x 24"),
        (
            {"embed_dim": 24},
            {"embed_dim": 24, "reg_tokens": 1},
            r"the tower has the weights \['cls_token', 'reg_token'",
        ),
        ({"embed_dim": 24}, {"embed_dim": 24, "qkv_bias": False}, r"attn\.qkv\.has the weights"),
        ({"embed_dim": 24}, {"embed_dim": 24, "init_values": 0.1}, r"blocks\.0\.ls1"),
        (
            {"embed_dim": 24, "mlp_layer": timm.layers.GluMlp},
            {"embed_dim": 24},
            r"blocks\.0\.mlp is a GluMlp; expected timm's plain Block, with an Mlp",
        ),
    ],
)
def test_what_is_no_part_of_a_vision_transformer_is_refused(
    larger: dict[str, Any], smaller: dict[str, Any], message: str
) -> None:
    source, tower = (vit(**{"depth": 2} | args) for args in (larger, smaller))
    with pytest.raises(ValueError, match=message):
        inherited_weights(tower, source)


@pytest.mark.parametrize(
    ("larger", "smaller", "message"),
    [
        ("test_vit", "resnet10t", "found a VisionTransformer for a ResNet; expected two of one family, which are Text"),
        ("test_convnext", "test_convnext", "found a ConvNeXt for a ConvNeXt; expected two of one family"),
        ("resnext50_32x4d", "resnet50", r"layer1\.0\.conv2 convolves in 32 groups, of which no first channels"),
        ("resnet10t", "resnet18", r"conv1|the tower has the modules"),
        ("tf_efficientnet_lite0", "mobilenetv2_050", r"blocks"),
    ],
)
def test_other_families_are_refused(larger: str, smaller: str, message: str) -> None:
    source, tower = (timm.create_model(name, num_classes=0) for name in (larger, smaller))
    with pytest.raises(ValueError, match=message):
        inherited_weights(tower, source)


def test_stages_are_not_left_out() -> None:
    source = timm.create_model("test_efficientnet", num_classes=0)
    tower = timm.create_model("test_efficientnet", num_classes=0)
    del tower.blocks[-1]
    with pytest.raises(ValueError, match=r"blocks: \d modules found, \d expected, and none can be left out"):
        inherited_weights(tower, source)


def test_another_vocabulary_is_refused() -> None:
    config = parse(changed("towers.text", TEXT)).towers["text"]
    source, tower = (TextTransformer(config, rows, 8) for rows in (50, 48))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"embed\.weight: a vocabulary of 50 found, 48 expected; use the tokenizer"):
        inherited_weights(tower, source)


def test_towers_of_a_run(clip: dict[str, Any], tmp_path: Path) -> None:
    """Both towers of a smaller run, with longer captions and larger images, by `init` and `inherit`."""
    clip["towers"]["image"] = VIT | {"args": VIT["args"] | {"embed_dim": 48, "num_heads": 3, "img_size": 32}}
    clip["towers"]["text"] |= {"width": 24, "heads": 3, "depth": 4}
    clip["data"] |= {"image_size": 32}
    folder = finished_run(clip)
    teacher = load_model(folder)
    from_run = {"init": f"run:{folder}", "inherit": "even"}
    clip["towers"]["image"] |= from_run | {"args": VIT["args"] | {"img_size": 64, "depth": 2}}
    clip["towers"]["text"] |= from_run | {"width": 16, "heads": 2, "depth": 2}
    clip["data"] |= {"image_size": 64, "context_length": 12}
    model = TowerModel(parse(clip), teacher.tokenizer.embedding_rows(None), {})
    notes = model.load_initial_weights()
    assert [note.split(" parameters")[0].rpartition(" of ")[0] for note in notes if " parameters" in note] == [
        f"towers.{name}.init: inherited {sum(p.numel() for p in tower.parameters()) - extra:,}"
        for (name, tower), extra in zip(model.towers.items(), (48 * 32, 4 * 16), strict=True)
    ]
    assert "towers.image.init: inherited blocks 0, 2 of 4" in notes
    assert "towers.image.init: resampled model.pos_embed from 1 x 17 x 32 to 1 x 65 x 32" in notes
    assert "towers.text.init: resampled position from 1 x 8 x 16 to 1 x 12 x 16" in notes
    source: Any = teacher.model.towers
    own: Any = model.towers
    assert own["text"].blocks[1].mlp.fc1.weight.equal(source["text"].blocks[2].mlp.fc1.weight[:64, :16])
    assert own["image"].model.blocks[1].norm1.weight.equal(source["image"].model.blocks[2].norm1.weight[:32])


def test_an_export_needs_no_larger_tower(clip: dict[str, Any], tmp_path: Path) -> None:
    """What a run inherited lies in its weights: an export is loaded, and compared, without the larger run."""
    from_run = {"init": f"run:{tmp_path / 'gone'}", "inherit": "even"}
    for tower in ("image", "text"):
        clip["towers"][tower] |= from_run
    exported = load_model(export(finished_run(clip), tmp_path / "exported").folder)
    for tower in ("image", "text"):
        found: Any = exported.config.towers[tower]
        assert (found.init, found.inherit) == (None, None)


def test_a_tower_inherits_from_a_model_of_timm(tmp_path: Path) -> None:
    source = noise(timm.create_model("test_vit", num_classes=5))
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    args = {"depth": 3, "embed_dim": 32, "num_heads": 1, "img_size": 160}
    image = {"kind": "timm", "model": "test_vit", "args": args, "inherit": "even"}
    tree = changed("towers.image", image | {"init": f"timm:test_vit:{tmp_path / 'vit.safetensors'}"})
    config = parse(tree).towers["image"]
    tower: Any = model_of(tree | {"data": tree["data"] | {"image_size": 160}}).towers["image"]
    notes = load_initial(tower, config, "towers.image.init")  # type: ignore[arg-type]
    assert notes[0].startswith("towers.image.init: inherited blocks 0, 2, 4 of 6")
    fc1: Tensor = source.get_submodule("blocks.4.mlp.fc1").weight  # type: ignore[assignment]
    assert tower.model.blocks[2].mlp.fc1.weight.equal(fc1[: len(tower.model.blocks[2].mlp.fc1.weight), :32])


@pytest.mark.parametrize(
    ("tower", "config", "message"),
    [
        ("text", TEXT | {"inherit": "even"}, r"towers\.text\.inherit: .* by towers\.text\.init: run:; found null"),
        ("text", TEXT | {"inherit": "even", "init": "a.safetensors"}, r"init: run:; found a\.safetensors"),
        ("image", VIT | {"inherit": "even", "init": "a.pt"}, r"init: pretrained, package:, timm:, run:; found a\.pt"),
        ("image", SPECIALIZED | {"inherit": "even", "init": "run:x"}, "a tower with specialize inherits no weights"),
    ],
)
def test_configs_without_a_larger_tower_are_refused(tower: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(changed(f"towers.{tower}", config))

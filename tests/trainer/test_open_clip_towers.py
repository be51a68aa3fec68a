"""Towers of open_clip's models: the same embeddings as there, trained, saved, and begun from each kind of weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from tests.cache.tiny_open_clip import COCA, RESNET, TEXT, TIMM, TIMM_VIT, TINY, hf_config, save_open_clip, save_words
from tests.trainer.open_clip_runs import open_clip_model, open_clip_run, their_embeddings
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.encoders.tokenizers.names import load_named_tokenizer
from threetowers.trainer.config import ConfigError, OpenClipTower, TrainConfig, parse
from threetowers.trainer.export.trained_model import load_model
from threetowers.trainer.model.initial.initial_weights import load_initial
from threetowers.trainer.model.initial.open_clip_weights import named_model, source_config
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.towers.tokenizer_fit import check_tokenizer
from threetowers.trainer.train import train

Tree = dict[str, Any]
TWO_WAY = {"custom_text": True, "text_cfg": TEXT | {"no_causal_mask": True}}
MODELS: dict[str, tuple[Tree, int]] = {
    "clip": (TINY, 32),
    "quick gelu": (TINY | {"quick_gelu": True}, 32),
    "resnet": (RESNET, 64),
    "coca": (COCA, 32),
    "siglip": (
        TIMM_VIT | {"text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}},
        160,
    ),
    "mobileclip": (TIMM | TWO_WAY, 32),
    "norms of queries and keys": (
        TINY | {"vision_cfg": TINY["vision_cfg"] | {"qk_norm": True}, "text_cfg": TEXT | {"qk_norm": True}},
        32,
    ),
    "scalars": (TIMM | {"vision_cfg": TIMM["vision_cfg"] | {"timm_model_name": "test_nfnet"}}, 64),
}
TRAINED = ("clip", "coca", "siglip", "scalars")  # the others differ from them in no step
CAPTIONS = ["a red disc", "", "a photo of a dog and a cat " * 9, "naïve café", "x y z x y z x"]


def inputs_of(config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of noise, and tokens of captions in their full length."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, config.data.side, config.data.side), generator=generator, dtype=torch.uint8)
    assert config.data.tokenizer is not None
    return images, load_named_tokenizer(config.data.tokenizer).encode(CAPTIONS, config.data.context_length)


def built(config: TrainConfig) -> TowerModel:
    """The model of a run with its initial weights."""
    assert config.data.tokenizer is not None
    rows = load_named_tokenizer(config.data.tokenizer).embedding_rows(config.data.vocab_size)
    torch.manual_seed(1)
    model = TowerModel(config, rows, {})
    model.notes = model.load_initial_weights()
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_run_of_a_model_of_open_clip(clip: Tree, name: str, tmp_path: Path) -> None:
    """Equal embeddings before a step; and after it, with the weights of the run in open_clip's own model."""
    folder = tmp_path / "model"
    model, size = MODELS[name]
    config = parse(open_clip_run(clip, folder, model, size, init="pretrained"))
    images, tokens_bL = inputs_of(config)
    theirs = open_clip_model(folder)
    ours = built(config)
    assert ours.notes == []
    for found, expected in zip(
        features(ours, images, tokens_bL), their_embeddings(theirs, images, tokens_bL), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert min(p.ndim for p in ours.parameters()) == 1
    if name not in TRAINED:
        return

    train(config)
    trained = load_model(config.output_dir)
    before, after = ours.state_dict(), trained.model.state_dict()
    assert any(not after[name].equal(before[name]) for name, _ in ours.towers["image"].named_parameters("towers.image"))
    assert any(not after[name].equal(before[name]) for name, _ in ours.towers["text"].named_parameters("towers.text"))
    load_into(theirs, trained.model)
    expected_image, expected_text = their_embeddings(theirs, images, tokens_bL)
    normalize = torch.nn.functional.normalize
    torch.testing.assert_close(trained.encode_images(images), normalize(expected_image), atol=1e-5, rtol=0)
    torch.testing.assert_close(trained.encode_texts(CAPTIONS), normalize(expected_text), atol=1e-5, rtol=0)
    encoder = load_frozen_encoder(f"run:{config.output_dir}")
    for side, inputs, expected in (("image", images, expected_image), ("text", CAPTIONS, expected_text)):
        found = getattr(encoder, side).embed(inputs, "projected")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def features(model: TowerModel, images: torch.Tensor, tokens_bL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        return model.features({"image": images}, "image"), model.features({"text": tokens_bL}, "text")


def load_into(theirs: Any, model: TowerModel) -> None:
    """Give the weights of our towers to a model of open_clip."""
    state = {f"visual.{name}": p for name, p in model.towers["image"].model.state_dict().items()}
    prefix = "text." if hasattr(theirs, "text") else ""
    state |= {f"{prefix}{name}": p for name, p in model.towers["text"].model.state_dict().items()}
    own = theirs.state_dict()
    assert {name for name in own if not name.startswith(("logit_", "text_decoder"))} == state.keys()
    theirs.load_state_dict({name: p.reshape(own[name].shape) for name, p in state.items()}, strict=False)


def test_a_text_tower_of_transformers(clip: Tree, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_words(folder)
    tree = open_clip_run(clip, folder, hf_config(tmp_path, "bert", "mean_pooler"), init="pretrained")
    config = parse(tree)
    images, tokens_bL = inputs_of(config)
    found = features(built(config), images, tokens_bL)
    for one, expected in zip(found, their_embeddings(open_clip_model(folder), images, tokens_bL), strict=True):
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)
    tree["engine"] = {"activation_checkpointing": True}
    train(parse(tree))
    assert load_model(tree["output_dir"]).encode_texts(CAPTIONS).isfinite().all()


@pytest.mark.parametrize("name", ["clip", "mobileclip"])
def test_captions_may_be_shorter_than_the_model_takes(clip: Tree, name: str, tmp_path: Path) -> None:
    """Where padding is hidden they are padded to the longest of a batch, and give the same."""
    model, size = MODELS[name]
    config = parse(open_clip_run(clip, tmp_path / "model", model, size, init="pretrained"))
    assert config.caption_padding == ("longest" if name == "clip" else "context_length")
    _, tokens_bL = inputs_of(config)
    short = [0, 1, 3]  # captions of eight tokens or less
    ours = built(config)
    with torch.inference_mode():
        full, cut = (ours.features({"text": tokens_bL[short, :length]}, "text") for length in (16, 8))
    assert torch.allclose(full, cut, atol=1e-5) == (name == "clip")


def test_padding_that_is_seen_has_one_length(clip: Tree, tmp_path: Path) -> None:
    tree = open_clip_run(clip, tmp_path / "model", TIMM | TWO_WAY)
    tree["data"] |= {"caption_padding": "longest"}
    with pytest.raises(ConfigError, match=r"found longest, but towers\.text sees the padding, so that embeddings"):
        parse(tree)


def initial(clip: Tree, folder: Path, init: str, of: str, **changes: Any) -> tuple[Any, list[str]]:
    """A tower with its initial weights, and what was noted."""
    tree = open_clip_run(clip, folder, TINY)
    tree["data"] |= changes
    config = parse(tree)
    torch.manual_seed(2)
    tower = TowerModel(config, 49408, {}).towers[of]
    settings = config.towers[of]
    assert isinstance(settings, OpenClipTower)
    return tower, load_initial(tower, replace(settings, init=init), f"towers.{of}.init")


def test_each_kind_of_weights(clip: Tree, tmp_path: Path) -> None:
    """Those of a folder, a file of it, a training checkpoint, a run, and a file of a run."""
    folder = tmp_path / "model"
    tree = open_clip_run(clip, folder, TINY, init="pretrained")
    weights = folder / "open_clip_model.safetensors"
    state = load_file(weights)
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": p for name, p in state.items()}}, tmp_path / "epoch_3.pt")
    train(parse(tree))
    run = load_model(tree["output_dir"]).model.towers
    for of, first in (("image", "visual.conv1.weight"), ("text", "token_embedding.weight")):
        name = f"model.{first.removeprefix('visual.')}"
        for init in ("pretrained", f"open_clip:{folder}", str(weights), str(folder), str(tmp_path / "epoch_3.pt")):
            tower, notes = initial(clip, folder, init, of)
            assert tower.state_dict()[name].equal(state[first])
            assert notes == []
        for init in (f"run:{tree['output_dir']}", f"{tree['output_dir']}/model.safetensors#towers.{of}"):
            tower, notes = initial(clip, folder, init, of)
            assert all(p.equal(tower.state_dict()[key]) for key, p in run[of].state_dict().items())


def test_positions_are_resampled_as_by_open_clip(clip: Tree, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_open_clip(folder, TINY)
    theirs = open_clip.create_model(f"local-dir:{folder}", force_image_size=48, force_context_length=24)
    image, image_notes = initial(clip, folder, "pretrained", "image", image_size=48, context_length=24)
    text, text_notes = initial(clip, folder, "pretrained", "text", image_size=48, context_length=24)
    torch.testing.assert_close(image.model.positional_embedding, theirs.visual.positional_embedding)
    torch.testing.assert_close(text.model.positional_embedding, theirs.positional_embedding)
    assert image_notes == ["towers.image.init: resampled model.positional_embedding from 5 x 32 to 10 x 32"]
    assert text_notes == ["towers.text.init: resampled model.positional_embedding from 16 x 32 to 24 x 32"]


def test_timm_models_and_class_tokens_at_another_size(clip: Tree, tmp_path: Path) -> None:
    """A trunk of timm is resampled as open_clip does it; CoCa's class token keeps its position, the last."""
    siglip, _ = MODELS["siglip"]
    tree = open_clip_run(clip, tmp_path / "siglip", siglip, 96, init="pretrained")
    config = parse(tree)
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'siglip'}", force_image_size=96).eval()
    ours = built(config)
    assert ours.notes == ["towers.image.init: resampled model.trunk.pos_embed from 1 x 101 x 64 to 1 x 37 x 64"]
    images, tokens_bL = inputs_of(config)
    expected, _ = their_embeddings(theirs, images, tokens_bL)
    torch.testing.assert_close(features(ours, images, tokens_bL)[0], expected, atol=1e-5, rtol=1e-5)

    tree = open_clip_run(clip, tmp_path / "coca", COCA, init="pretrained")
    tree["data"] |= {"context_length": 12}
    position = built(parse(tree)).towers["text"].model.positional_embedding
    before = open_clip_model(tmp_path / "coca").text.positional_embedding
    assert position.shape == (13, 32)
    assert position[-1].equal(before[-1])


@pytest.mark.parametrize(
    ("of", "init", "message"),
    [
        ("image", "timm:test_vit", r"for a tower of kind open_clip expected null, pretrained, open_clip:NAME"),
        ("text", "open_clip:ViT-B-3", r"unknown to open_clip .*; close: \['ViT-B-32'"),
        ("text", "nowhere.pt", r"'nowhere\.pt': no such file"),
        (
            "image",
            "OTHER",
            r"is not the model of these weights: vision_cfg\.layers is 1, in the model of .* 2; ",
        ),
        ("text", "GELU", r"these weights: quick_gelu is False, in the model of the weights True; name the one that"),
        ("image", "open_clip:ViT-B-32:openai", r"quick_gelu is False, in the model of the weights True; name the"),
    ],
)
def test_weights_that_cannot_be_had(clip: Tree, of: str, init: str, message: str, tmp_path: Path) -> None:
    if init == "OTHER":
        save_open_clip(tmp_path / "other", TINY | {"vision_cfg": TINY["vision_cfg"] | {"layers": 2}})
        init = f"open_clip:{tmp_path / 'other'}"
    if init == "GELU":
        save_open_clip(tmp_path / "other", TINY | {"quick_gelu": True})
        init = f"open_clip:{tmp_path / 'other'}"
    with pytest.raises(ValueError, match=rf"towers\.{of}\.init: .*{message}"):
        initial(clip, tmp_path / "model", init, of)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"args": {"vision_cfg": {"image_size": 64}}},
            r"found vision_cfg: \{image_size: 64\}, but data\.image",
        ),
        ({"args": {"vision_cfg": {"widht": 64}}}, r"cannot create the image tower of .*unexpected keyword.*widht"),
        ({"model": "ViT-B-33"}, r"unknown to open_clip .*; close: \['ViT-B-32"),
        ({"model": "model.json"}, r"model\.json: cannot be read as JSON"),
    ],
)
def test_models_that_cannot_be_built(clip: Tree, change: Tree, message: str, tmp_path: Path) -> None:
    tree = open_clip_run(clip, tmp_path / "model", TINY)
    tree["towers"]["image"] |= change
    with pytest.raises(ValueError, match=message):
        TowerModel(parse(tree), 49408, {})


def test_pretrained_models_are_named_by_their_tags() -> None:
    with pytest.raises(
        ValueError, match=r"has \d+ pretrained models of ViT-B-32 \(openai, .* as open_clip:ViT-B-32:TAG"
    ):
        named_model("open_clip:ViT-B-32")
    with pytest.raises(ValueError, match=r"open_clip has 0 pretrained models of ViT-S-32 \(none\)"):
        named_model("open_clip:ViT-S-32")
    assert source_config("open_clip:ViT-B-32:openai").model["quick_gelu"]  # though the model's config does not say so
    assert not source_config("open_clip:ViT-B-32:laion2b_s34b_b79k").model["quick_gelu"]
    assert source_config("open_clip:roberta-ViT-B-32:laion2b_s12b_b32k").model["quick_gelu"]


def test_a_config_alone_and_fewer_rows(clip: Tree, tmp_path: Path) -> None:
    """A model config as a JSON file, changed by `args`, with the vocabulary of another tokenizer."""
    tree = open_clip_run(clip, tmp_path / "model", TINY)
    (tmp_path / "small.json").write_text(json.dumps(TINY))
    args = {"text_cfg": {"width": 16, "pool_type": "eos", "eos_id": 2}}
    tree["towers"]["text"] |= {"model": str(tmp_path / "small.json"), "args": args}
    tree["data"] |= {"tokenizer": clip["data"]["tokenizer"], "vocab_size": 50}
    config = parse(tree)
    text: Any = TowerModel(config, 50, {}).towers["text"]
    assert text.model.token_embedding.weight.shape == (50, 16)
    assert text.width == 24
    tokenizer = load_named_tokenizer(tree["data"]["tokenizer"])
    check_tokenizer(config, tokenizer)
    tree["towers"]["text"] |= {"args": {}}
    with pytest.raises(ConfigError, match=r"towers\.text: it takes the largest id for the end of .*with 2 of"):
        check_tokenizer(parse(tree), tokenizer)
    with pytest.raises(ValueError, match=r"has 50 rows, but data\.tokenizer has 60 ids"):
        TowerModel(config, 60, {})


@pytest.mark.parametrize("name", ["clip", "resnet", "coca", "siglip"])
def test_layers_from_the_input_up(clip: Tree, name: str, tmp_path: Path) -> None:
    """Embeddings before the blocks, which are all numbered, and the projection behind them."""
    model, size = MODELS[name]
    towers: Any = TowerModel(parse(open_clip_run(clip, tmp_path / "model", model, size)), 49408, {}).towers
    image, text = towers["image"].layers(), towers["text"].layers()
    assert text.numbers["model.token_embedding.weight"] == text.numbers["model.positional_embedding"] == 0
    assert text.numbers["model.transformer.resblocks.0.mlp.c_fc.weight"] == text.blocks == 1
    assert text.numbers["model.ln_final.weight"] == 1
    last = "model.text_projection" + (".weight" if name == "siglip" else "")
    assert text.numbers[last] == text.above == 2
    first = {"siglip": "model.trunk.patch_embed.proj.weight"}.get(name, "model.conv1.weight")
    assert image.numbers[first] == 0
    assert image.blocks == {"clip": 1, "coca": 1, "resnet": 4, "siglip": len(towers["image"].blocks or ())}[name]
    assert set(image.numbers) == {name for name, _ in towers["image"].named_parameters()}
    if name in ("clip", "coca"):
        assert image.numbers["model.proj"] == image.above


def test_activation_checkpointing(clip: Tree, tmp_path: Path) -> None:
    """The same gradients, and a refusal where there is none."""
    tree = open_clip_run(clip, tmp_path / "model", TINY, init="pretrained")
    images, tokens_bL = inputs_of(parse(tree))

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        model = built(parse(tree)).train()
        if checkpointed:
            model.checkpoint_activations()
        outputs = model({"image": images, "text": tokens_bL[:3]})
        (outputs.embeddings["f"] @ outputs.embeddings["g"].T).diagonal().sum().backward()
        return [p.grad for p in model.towers.parameters() if p.grad is not None]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, other)
    resnet = parse(open_clip_run(clip, tmp_path / "resnet", RESNET, 64))
    with pytest.raises(ValueError, match=r"activation_checkpointing: this image tower of open_clip has none"):
        TowerModel(resnet, 49408, {}).checkpoint_activations()

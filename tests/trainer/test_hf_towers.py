"""Models of transformers as towers, against transformers itself with equal weights; no file but those written here."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cache.tiny_transformers import word_tokenizer
from tests.trainer.small_models import inputs_of, model_of
from tests.trainer.test_config import THREE, changed
from threetowers.cache.encoders.huggingface.architecture import (
    build_architecture,
    read_architecture,
    stated_pooling,
)
from threetowers.cache.encoders.huggingface.loading import ModelFiles
from threetowers.cache.encoders.tokenizers.names import load_named_tokenizer
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import END
from threetowers.trainer.config import dump, parse
from threetowers.trainer.export.trained_model import load_model
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.initial.vocabularies import other_vocabularies
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.towers.hf_tower import resolve_hf_towers
from threetowers.trainer.optimizer.optimizer import build_optimizer, rate_factors
from threetowers.trainer.train import train

pytest.importorskip("transformers")

Tree = dict[str, Any]
SIZES: Tree = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WORDS: Tree = SIZES | {"vocab_size": 50}
TEXT: dict[str, Tree] = {
    "bert": WORDS | {"max_position_embeddings": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": WORDS | {"max_position_embeddings": 42, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "distilbert": {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "dropout": 0.0},
    "mpnet": WORDS | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "modernbert": WORDS | {"local_attention": 4, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
    "t5": {
        "vocab_size": 50,
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 2,
        "d_kv": 8,
        "d_ff": 24,
        "dropout_rate": 0.0,
    },
    "llama": WORDS | {"num_key_value_heads": 2},
    "qwen3": WORDS | {"num_key_value_heads": 1, "head_dim": 8},
    "clip_text_model": WORDS | {"eos_token_id": END, "bos_token_id": 1},
}
PATCHES: Tree = SIZES | {"image_size": 32, "patch_size": 8}
IMAGES: dict[str, Tree] = {
    "vit": PATCHES | {"hidden_dropout_prob": 0.0},
    "dinov2": {key: value for key, value in PATCHES.items() if key != "intermediate_size"} | {"mlp_ratio": 2},
    "siglip_vision_model": PATCHES,
    "clip_vision_model": PATCHES,
    "convnext": {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 2, 1], "image_size": 32},
}
CAPTIONS = ["a red square", "", "a red square and a blue disc beside it all day long"]
POOLED = {"llama": "last", "qwen3": "last", "clip_text_model": "last"}  # the mean for all other models of text


def tower(of: str, family: str, **keys: Any) -> Tree:
    sizes = (TEXT if of == "text" else IMAGES)[family]
    return {"kind": "hf", "of": of, "config": {"model_type": family} | sizes} | keys


def short_captions() -> Tensor:
    """Captions of 2 to 8 tokens, with the end token as padding behind all but the longest."""
    tokens_bL = inputs_of(7)["text"]
    for row in range(7):
        tokens_bL[row, row + 1 :] = END
    return tokens_bL


def of_transformers(model: TowerModel, of: str) -> Any:
    """A model that transformers builds of the tower's config, with its weights."""
    from transformers import AutoModel, AutoModelForTextEncoding

    ours: Any = model.towers[of]
    build = AutoModelForTextEncoding if ours.architecture.model_type == "t5" else AutoModel
    theirs = build.from_config(copy.deepcopy(ours.architecture)).eval()
    theirs.load_state_dict(ours.model.state_dict(), strict=False)
    return theirs


@pytest.mark.parametrize("family", TEXT)
def test_text_features_are_those_of_transformers(family: str) -> None:
    """Of each caption by itself, without padding; and of all together."""
    model = model_of(changed("towers.text", tower("text", family))).eval()
    ours: Any = model.towers["text"]
    theirs = of_transformers(model, "text")
    tokens_bL = short_captions()
    with torch.no_grad():
        found_bw = ours(tokens_bL)
        for row, caption_L in enumerate(tokens_bL):
            words_1L = caption_L[None, : row + 2] if row < 6 else caption_L[None]
            states_1Lw = theirs(input_ids=words_1L, attention_mask=torch.ones_like(words_1L)).last_hidden_state
            expected_1w = states_1Lw[:, -1] if POOLED.get(family) else states_1Lw.mean(1)
            torch.testing.assert_close(found_bw[row : row + 1], expected_1w, rtol=1e-5, atol=1e-5)
    assert ours.pool == POOLED.get(family, "mean")
    assert ours.width == found_bw.shape[1] == 16


@pytest.mark.parametrize("family", IMAGES)
def test_image_features_are_those_of_transformers(family: str) -> None:
    model = model_of(changed("towers.image", tower("image", family))).eval()
    ours: Any = model.towers["image"]
    theirs = of_transformers(model, "image")
    images = inputs_of(3)["image"]
    with torch.no_grad():
        output = theirs(pixel_values=images / 127.5 - 1)
        vector = output.pooler_output if family != "vit" else output.last_hidden_state[:, 0]
        torch.testing.assert_close(ours(images), vector.flatten(1), rtol=1e-5, atol=1e-5)


LAST = {  # of a family, what is in its last block and behind it
    "bert": r"encoder\.layer\.1\.",
    "llama": r"layers\.1\.|norm\.",
    "vit": r"layers\.1\.|layernorm\.",
    "convnext": r"encoder\.stages\.3\.|layernorm\.",
}


@pytest.mark.parametrize(
    ("of", "family"), [("text", "bert"), ("text", "llama"), ("image", "vit"), ("image", "convnext")]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_trains_the_last_blocks_alone(of: str, family: str, checkpointing: bool) -> None:
    keys = {"init": "given.safetensors", "trainable_blocks": 1, "layer_decay": 0.5}
    model = model_of(changed(f"towers.{of}", tower(of, family, **keys)))
    if checkpointing and family == "convnext":
        with pytest.raises(ValueError, match=r"engine\.activation_checkpointing: this model of transformers has none"):
            model.checkpoint_activations()
        return
    if checkpointing:
        model.checkpoint_activations()
    ours: Any = model.towers[of]
    inputs: list[Tensor] = []
    ours.blocks[-1].register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    optimizer = build_optimizer(model, parse(THREE).optim)
    loss, _ = total_loss(model.config, model(inputs_of(6)))
    loss.backward()
    optimizer.step()
    assert inputs[0].grad_fn is None
    factors = rate_factors(model, model.config.optim)
    for name, tensor in ours.named_parameters():
        learns = re.match(LAST[family], name.removeprefix("model.")) is not None
        assert tensor.equal(before[name]) != learns, name
        assert factors[f"towers.{of}.{name}"] == (0.5 if learns else 0.0), name


def test_the_layers_of_families() -> None:
    for of, family, blocks in [
        ("text", "mpnet", 2),
        ("text", "t5", 2),
        ("image", "dinov2", 2),
        ("image", "convnext", 4),
    ]:
        model = model_of(changed(f"towers.{of}", tower(of, family, layer_decay=0.5)))
        layers = model.layers_of(of, "layer_decay")
        assert layers.blocks == blocks
        assert layers.numbers.keys() == dict(model.towers[of].named_parameters()).keys()
        assert set(layers.numbers.values()) >= set(range(blocks + 1))
    shared = {"model_type": "albert", "embedding_size": 8} | WORDS
    with pytest.raises(
        ValueError, match=r"towers\.text\.layer_decay: AlbertModel has no series of blocks; leave it out"
    ):
        rate_factors(
            (model := model_of(changed("towers.text", tower("text", "bert") | {"config": shared, "layer_decay": 0.5}))),
            model.config.optim,
        )


def saved(folder: Path, of: str, family: str, **processor: Any) -> Any:
    """Save a model with random weights as transformers does, and return it."""
    sizes = (TEXT if of == "text" else IMAGES)[family]
    torch.manual_seed(2)
    model = build_architecture(read_architecture(None, {"model_type": family} | sizes, of), of)
    model.save_pretrained(folder)
    if processor:
        kind = {"image_processor_type": "ViTImageProcessor", "do_normalize": True, "size": {"height": 32, "width": 32}}
        (folder / "preprocessor_config.json").write_text(json.dumps(kind | processor))
    return model.eval()


def test_a_run_begins_with_saved_models_and_needs_them_no_more(clip: Tree, tmp_path: Path) -> None:
    text = saved(tmp_path / "text", "text", "bert")
    image = saved(tmp_path / "image", "image", "vit", image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 0.2])
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (tmp_path / "text" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "text" / "1_Pooling").mkdir()
    (tmp_path / "text" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    towers = {
        of: {"kind": "hf", "of": of, "model": str(tmp_path / of), "init": "pretrained", "layer_decay": 0.8}
        for of in ("image", "text")
    }
    towers["image"] |= {"trainable_blocks": 1}
    tree = clip | {"towers": towers, "duration": {"steps": 2}, "engine": {"activation_checkpointing": True}}
    config = parse(tree)
    tokenizer = load_named_tokenizer(config.data.tokenizer or "")
    model = TowerModel(config, tokenizer.vocab_size, {})
    assert model.load_initial_weights() == []
    model.eval()
    images = inputs_of(3)["image"]
    tokens_bL = tokenizer.encode(CAPTIONS, 8)
    with torch.inference_mode():
        pixels = (images / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 0.2]).view(
            3, 1, 1
        )
        mask_bL = (tokens_bL == END).cumsum(1) - (tokens_bL == END).int() == 0
        torch.testing.assert_close(
            model.features({"image": images}, "image"), image(pixel_values=pixels).last_hidden_state[:, 0]
        )
        torch.testing.assert_close(
            model.features({"text": tokens_bL}, "text"),
            text(input_ids=tokens_bL, attention_mask=mask_bL.int()).last_hidden_state[:, 0],  # cls, as the files say
        )

    train(config)
    train(parse(tree | {"log": {"every_steps": 2}}))  # a finished run: checked against its folder, where all is stated
    for of in ("image", "text"):
        shutil.rmtree(tmp_path / of)
    trained = load_model(config.output_dir)
    after, before = trained.model.state_dict(), model.state_dict()
    moved = {name for name in before if name in after and not after[name].equal(before[name])}
    assert {name for name in moved if name.startswith("towers.image.model.layers.0.")} == set()
    assert any(name.startswith("towers.image.model.layers.1.") for name in moved)
    assert "towers.text.model.embeddings.word_embeddings.weight" in moved
    model.load_state_dict(after)
    with torch.inference_mode():
        expected = model.encode_text({"text": tokens_bL}), model.encode_image({"image": images})
    torch.testing.assert_close(trained.encode_texts(CAPTIONS), expected[0])
    torch.testing.assert_close(trained.encode_images(images), expected[1])
    # A tower of the run, and a tower of its file, begin another one.
    for init in (f"run:{config.output_dir}", f"{config.output_dir}/model.safetensors#towers.text"):
        bert = tower("text", "bert", init=init, pool="cls")
        other = TowerModel(parse(clip | {"towers": clip["towers"] | {"text": bert}}), tokenizer.vocab_size, {})
        assert other.load_initial_weights() == []
        for name, tensor in other.towers["text"].state_dict().items():
            assert tensor.equal(after[f"towers.text.{name}"]), name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"config": {}}, r"towers\.text\.model: expected a model, or a model_type in towers\.text\.config"),
        ({"init": "pretrained"}, r"towers\.text\.init: found pretrained, but towers\.text\.model names no files"),
        ({"config": {"model_type": "no"}}, r"config: Unrecognized model identifier: no"),
        ({"config": {"model_type": "bart"}}, r"BartModel is an encoder with a decoder; choose an encoder"),
        ({"config": {"model_type": "vit"} | PATCHES}, r"ViTModel takes pixel_values, expected a model of text"),
        ({"config": {"model_type": "bert"} | TEXT["bert"] | {"vocab_size": 47}}, r"47 token embeddings, but .* 48 ids"),
        (
            {"config": {"model_type": "bert"} | TEXT["bert"] | {"max_position_embeddings": 31}},
            r"31 positions, found .*32",
        ),
        (
            {"pool": "pooler", "config": {"model_type": "modernbert"} | TEXT["modernbert"]},
            r"pool: pooler: .* it has none",
        ),
        (
            {"pool": "cls", "config": {"model_type": "llama"} | TEXT["llama"]},
            r"pool: cls: .* first token sees no other",
        ),
        ({"model": "no/such"}, r"no/such"),
    ],
)
def test_towers_that_cannot_be_built(keys: Tree, message: str, tmp_path: Path) -> None:
    if "model" in keys:
        keys = {"model": str(tmp_path / keys["model"]), "config": {}}
    with pytest.raises(ValueError, match=message):
        model_of(changed("towers.text", tower("text", "bert") | keys))


def test_images_are_pooled_as_asked_for_and_taken_in_other_sizes() -> None:
    images = inputs_of(2)["image"]
    model = model_of(changed("towers.image", tower("image", "vit", pool="mean"))).eval()
    with torch.no_grad():
        states_bLw = of_transformers(model, "image")(pixel_values=images / 127.5 - 1).last_hidden_state
        torch.testing.assert_close(model.features({"image": images}, "image"), states_bLw[:, 1:].mean(1))
    with pytest.raises(ValueError, match="pool: cls: siglip_vision_model of transformers offers pooler, mean"):
        model_of(changed("towers.image", tower("image", "siglip_vision_model", pool="cls")))
    with pytest.raises(ValueError, match="pool: pooler: vit of transformers offers cls, mean"):
        model_of(changed("towers.image", tower("image", "vit", pool="pooler")))
    tree = changed("towers.image", tower("image", "vit"))
    tree["data"] |= {"image_size": 48}
    larger = model_of(tree)
    assert larger.features({"image": torch.zeros(2, 3, 48, 48, dtype=torch.uint8)}, "image").shape == (2, 16)


def test_a_config_is_stated_in_full() -> None:
    tree = tower("text", "distilbert") | {"config": {"model_type": "distilbert", "dim": 24, "n_heads": 2}}
    config = resolve_hf_towers(parse(changed("towers.text", tree)))
    text: Any = config.towers["text"]
    assert text.config | {"dim": 24, "n_heads": 2, "n_layers": 6, "model_type": "distilbert"} == text.config
    assert resolve_hf_towers(config) == config == parse(dump(config))


def test_the_pooling_of_sentence_transformers(tmp_path: Path) -> None:
    assert stated_pooling(ModelFiles(str(tmp_path))) is None
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.Pooling", "path": ""}]))
    for stated, pool in [({"pooling_mode_lasttoken": True}, "last"), ({"pooling_mode": "mean"}, "mean")]:
        (tmp_path / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": False} | stated))
        assert stated_pooling(ModelFiles(str(tmp_path))) == pool
    (tmp_path / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="pools by pooling_mode_max_tokens; name another way by `pool`"):
        stated_pooling(ModelFiles(str(tmp_path)))


@pytest.mark.parametrize(("family", "free"), [("bert", 0), ("roberta", 2), ("distilbert", 0)])
def test_learned_positions_are_resampled(family: str, free: int, tmp_path: Path) -> None:
    """To a config with more of them, linearly as in open_clip; rows that RoBERTa leaves free stay."""
    saved(tmp_path / "text", "text", family)
    keys = {"model": str(tmp_path / "text"), "init": "pretrained"}
    changes = {"max_position_embeddings": TEXT[family].get("max_position_embeddings", 512) + 7}
    model = model_of(changed("towers.text", {"kind": "hf", "of": "text", "config": changes, **keys}))
    name = "model.embeddings.position_embeddings.weight"
    before = load_file(tmp_path / "text" / "model.safetensors")[name.removeprefix("model.")]
    (note,) = model.load_initial_weights()
    assert re.search(rf"towers\.text\.init: resampled {name} from {len(before)} x 16 to {len(before) + 7} x 16", note)
    after = model.towers["text"].get_parameter(name)
    assert after[:free].equal(before[:free])
    places = (torch.arange(len(after) - free).double() + 0.5) * (len(before) - free) / (len(after) - free) - 0.5
    low = places.clamp(0, len(before) - free - 1).floor().long()
    share = (places.clamp(0) - low)[:, None].float()
    high = (low + 1).clamp(max=len(before) - free - 1)
    torch.testing.assert_close(
        after[free:].detach(), before[free:][low] * (1 - share) + before[free:][high] * share, rtol=0, atol=1e-5
    )


def test_weights_of_another_depth_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "text", "text", "bert")
    keys = {"model": str(tmp_path / "text"), "init": "pretrained", "config": {"num_hidden_layers": 1}}
    model = model_of(changed("towers.text", {"kind": "hf", "of": "text", **keys}))
    with pytest.raises(ValueError, match=r"towers\.text\.init: .*encoder\.layer: 2 found, 1 expected"):
        model.load_initial_weights()


def test_weights_on_another_tokenizer_are_told(tmp_path: Path) -> None:
    for name, words in (("one", "a b c"), ("two", "a b d")):
        saved(tmp_path / name, "text", "bert")
        tokenizer = word_tokenizer()
        tokenizer.add_tokens(words.split())
        tokenizer.save_pretrained(tmp_path / name)
    tree = changed("towers.text", tower("text", "bert", init="pretrained", model=str(tmp_path / "one")))
    own, other = (load_named_tokenizer(f"hf:{tmp_path / name}") for name in ("one", "two"))
    assert list(other_vocabularies(parse(tree), own)) == []
    (warning,) = other_vocabularies(parse(tree), other)
    assert re.search(r"towers\.text\.init: .*one was trained on another tokenizer than hf:.*two: the ids", warning)


def test_building_a_tower_counts_no_batch() -> None:
    sizes = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = model_of(changed("towers.image", {"kind": "hf", "of": "image", "config": sizes}))
    counts = [int(b) for name, b in model.towers["image"].named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert set(counts) == {0}
    assert model.towers["image"].training

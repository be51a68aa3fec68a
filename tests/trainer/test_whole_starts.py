"""Runs that begin with a whole model: of open_clip, of an export in its format, or of another run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cache.tiny_open_clip import TEXT, TIMM_VIT, TINY
from tests.trainer.finished_runs import finished_run
from tests.trainer.open_clip_runs import open_clip_model, open_clip_run, their_embeddings
from threetowers.cache.encoders.tokenizers.names import load_named_tokenizer
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.estimate.dry_run import dry_run
from threetowers.trainer.export.export import export
from threetowers.trainer.export.trained_model import load_model
from threetowers.trainer.model.initial.whole_model import resolve_start
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.train import train

Tree = dict[str, Any]
SIGLIP = TIMM_VIT | {
    "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "init_logit_bias": -9.5,
    "init_logit_scale": 2.0,
}
OWN_TEXT = {"kind": "text", "width": 16, "depth": 2, "heads": 2, "causal": True, "norm_eps": 1e-5}


def begun(tree: Tree, **widths: int) -> tuple[TowerModel, list[str]]:
    """The model of a run as it begins, and what its start-up page says of that."""
    config = resolve_start(parse(tree))
    assert config.data.tokenizer is not None
    tokenizer = load_named_tokenizer(config.data.tokenizer)
    torch.manual_seed(4)
    model = TowerModel(config, tokenizer.embedding_rows(config.data.vocab_size), widths)
    return model.eval(), model.load_initial_weights(tokenizer)


def started(clip: Tree, folder: Path, model: Tree, size: int = 32, **changes: Any) -> Tree:
    """A run that begins with the model of open_clip in a folder."""
    tree = open_clip_run(clip, folder, model, size) | {"init": str(folder)} | changes
    return tree | {"data": tree["data"] | {"tokenizer": None, "image_size": None}}


def test_a_model_of_open_clip_in_one_line(clip: Tree, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tree = started(clip, folder, TINY)
    config = resolve_start(parse(tree))
    assert (config.data.image_size, config.data.tokenizer) == (32, f"open_clip:{folder}")
    model, notes = begun(tree)
    assert notes == [f"init: towers.image, towers.text, log_scales.scale from {folder}"]
    theirs = open_clip_model(folder)
    assert model.log_scales["scale"].item() == theirs.logit_scale.item()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens_bL = load_named_tokenizer(f"open_clip:{folder}").encode(["a red disc", ""], 16)
    expected, _ = their_embeddings(theirs, images, tokens_bL)
    torch.testing.assert_close(model.features({"image": images}, "image"), expected, atol=1e-5, rtol=1e-5)
    assert "tower image: image tower of open_clip's" in "\n".join(dry_run(parse(tree | {"duration": {"steps": 1}})))
    train(parse(tree))
    assert load_model(tree["output_dir"]).config.data.image_size == 32
    assert train(parse(tree)).steps == 1  # the same config resumes the finished run


def test_scale_and_bias(clip: Tree, tmp_path: Path) -> None:
    """SigLIP's bias where the loss has one; a scale above the largest one is refused, not clamped."""
    tree = started(clip, tmp_path / "model", SIGLIP, 160, loss={"kind": "sigmoid"})
    model, notes = begun(tree)
    assert notes == [f"init: towers.image, towers.text, log_scales.scale, biases.scale from {tmp_path / 'model'}"]
    assert model.biases["scale"].item() == -9.5
    assert model.log_scales["scale"].item() == 2.0
    state = load_file(tmp_path / "model" / "open_clip_model.safetensors")
    _, notes = begun(tree | {"loss": {"kind": "softmax"}})
    assert "init: the bias of the model is left out, as loss.kind is softmax" in notes
    with pytest.raises(ConfigError, match=r"loss\.scale_max: found 5, the model's scale is 7\.3891; raise it"):
        begun(tree | {"loss": {"kind": "sigmoid", "scale_max": 5.0}})
    save_file(state | {"logit_bias": torch.tensor(float("nan"))}, tmp_path / "model" / "open_clip_model.safetensors")
    with pytest.raises(ConfigError, match=r"biases\.scale: NaN or infinity in"):
        begun(tree)
    tree = started(clip, tmp_path / "clip", TINY, loss={"kind": "sigmoid"})
    assert "init: the model has no bias; biases.scale begins with loss.bias_init" in begun(tree)[1]


def test_other_sizes_are_resampled_and_said(clip: Tree, tmp_path: Path) -> None:
    tree = started(clip, tmp_path / "model", TINY)
    tree["data"] |= {"image_size": 48, "context_length": 24}
    assert begun(tree)[1][1:] == [
        "init: resampled towers.image.model.positional_embedding from 5 x 32 to 10 x 32",
        "init: resampled towers.text.model.positional_embedding from 16 x 32 to 24 x 32",
    ]


@pytest.mark.parametrize("head", [{}, {"kind": "mlp", "hidden": 32, "dropout": 0.1}], ids=["linear", "mlp"])
def test_our_own_towers_come_back_from_an_export(clip: Tree, tmp_path: Path, head: Tree) -> None:
    """Equal to the bit, by the inverse of the exporter's names."""
    clip["towers"]["text"] = OWN_TEXT
    clip["heads"] = {"f": {"of": "image"} | head, "g": {"of": "text", "bias": False}}
    clip["loss"] = {"kind": "sigmoid"}
    folder = finished_run(clip)
    export(folder, tmp_path / "export", "open_clip")
    model, notes = begun(clip | {"init": str(tmp_path / "export")})
    assert notes == [
        f"init: towers.image, heads.f, towers.text, heads.g, log_scales.scale, biases.scale from {tmp_path / 'export'}"
    ]
    for name, tensor in load_model(folder).model.state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name

    other = clip | {"init": str(tmp_path / "export"), "towers": clip["towers"] | {"text": OWN_TEXT | {"heads": 4}}}
    other["towers"]["text"] |= {"causal": False, "mask_padding": False, "pool": "last", "norm_eps": 1e-6}
    with pytest.raises(ConfigError) as refused:
        begun(other)
    for reason in (
        "towers.text.heads: found 4, the model has 2",
        "towers.text.causal: found False, the model has True",
        "towers.text.pool: found last, the model has eos",
        "towers.text.norm_eps: found 1e-06, the model has 1e-05",
    ):
        assert reason in str(refused.value)


def test_a_third_tower_on_top(three: Tree, tmp_path: Path) -> None:
    """What the model does not have begins at random, and is said."""
    folder = tmp_path / "model"
    third = three["towers"]["third"]
    tree = open_clip_run(three, folder, TINY) | {"init": str(folder), "embed_dim": 24}
    tree["towers"] |= {"third": third}
    tree["heads"] |= {name: head for name, head in three["heads"].items() if name not in ("f", "g")}
    _, notes = begun(tree, third=24)
    assert notes[1] == "init: random weights in heads.f_h, heads.g_h, heads.h_f, heads.h_g"


def test_a_run_goes_on_as_another(clip: Tree, tmp_path: Path) -> None:
    """All parts of the same names, and new ones beside them."""
    folder = finished_run(clip)
    tree = clip | {"output_dir": str(tmp_path / "next"), "init": f"run:{folder}"}
    tree["heads"] = clip["heads"] | {"s": {"of": "f"}}
    tree["terms"] = clip["terms"] | {"more": {"x": "s", "y": "g", "scale": "second"}}
    tree["data"] = clip["data"] | {"tokenizer": None, "image_size": None}
    config = resolve_start(parse(tree))
    assert (config.data.image_size, config.data.tokenizer) == (32, clip["data"]["tokenizer"])
    model, notes = begun(tree)
    assert notes[-1] == "init: random weights in heads.s, log_scales.second"
    for name, tensor in load_model(folder).model.state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name

    tree["towers"] = {"picture": clip["towers"]["image"], "text": clip["towers"]["text"] | {"width": 32}}
    tree["heads"] |= {"f": {"of": "picture"}}
    with pytest.raises(ConfigError) as refused:
        begun(tree)
    for reason in (
        r"towers.picture: deploy.image stands on it, but it is none of the run's towers ['image', 'text']",
        "towers.text: ",
        "position: 1 x 8 x 16 found, 1 x 8 x 32 expected",
        "heads.g: weight: 16 x 16 found, 16 x 32 expected",
    ):
        assert reason in str(refused.value)


def test_everything_that_does_not_fit_is_named_at_once(clip: Tree, tokenizer: Path, tmp_path: Path) -> None:
    tree = started(clip, tmp_path / "model", TINY)
    tree["towers"]["image"] = {"kind": "timm", "model": "test_vit"}
    tree["towers"]["text"] |= {"args": {"text_cfg": {"width": 16, "pool_type": "eos"}}, "init": "pretrained"}
    tree["heads"] = {"f": {"of": "image"}, "g": {"of": "text", "kind": "linear"}}
    tree["data"] |= {"tokenizer": str(tokenizer)}
    tree["embed_dim"] = 16
    before = parse(tree)
    with pytest.raises(ConfigError) as refused:
        begun(tree)
    lines = str(refused.value).splitlines()
    assert lines[0].startswith(f"init: {tmp_path / 'model'} does not fit this run; change these keys")
    for reason in (
        "  towers.image.kind: found timm, the model's image tower is open_clip's own VisionTransformer; set kind: ope",
        "  heads.g.kind: found linear, but the tower ends in the model's own projection; set kind: none",
        "  data.tokenizer: ",
        "  towers.text: ",
        "  towers.text.init: found pretrained beside init",
        "  towers.text: text_cfg.pool_type is eos, in the model of the weights argmax",
    ):
        assert any(line.startswith(reason) for line in lines), reason
    assert before == parse(tree)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (
            "nowhere",
            r"found 'nowhere', expected open_clip:NAME\[:WEIGHTS\], the folder of a model of open_clip, or run",
        ),
        ("run:nowhere", r"run:nowhere holds no finished run: config\.yaml is missing"),
        ("open_clip:ViT-B-33", r"unknown to open_clip"),
        ("timm:resnet50", r"found 'timm:resnet50', expected open_clip:NAME"),
    ],
)
def test_models_that_are_not_there(clip: Tree, init: str, message: str) -> None:
    tree = clip | {"init": init, "data": clip["data"] | {"tokenizer": None}}
    with pytest.raises(ConfigError, match=rf"^init: .*{message}"):
        resolve_start(parse(tree))


def test_frozen_towers_of_a_whole_model(clip: Tree, tmp_path: Path) -> None:
    tree = started(clip, tmp_path / "model", TINY)
    tree["towers"]["image"] |= {"frozen": True}
    model, _ = begun(tree)
    assert model.frozen == ["image"]
    with pytest.raises(ConfigError, match=r"towers\.image\.frozen: a tower that is never updated needs weights"):
        parse(tree | {"init": None, "data": tree["data"] | {"tokenizer": "t", "image_size": 32}})

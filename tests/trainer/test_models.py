"""Kinds of towers and heads: shared, specialised, frozen, pretrained, several of a kind; and their cost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.trainer.finished_runs import finished_run
from tests.trainer.small_models import SPECIALIZED, VIT, VOCAB_SIZE, WIDTHS, inputs_of, model_of
from tests.trainer.test_config import THREE, changed
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import END, PAD
from threetowers.trainer.config import ConfigError, TextTower, parse
from threetowers.trainer.estimate.cost import TeacherCost, activation_bytes, meta_model, state_memory, tower_costs
from threetowers.trainer.estimate.summary import flop, size
from threetowers.trainer.export.trained_model import load_model
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.initial.initial_weights import load_initial
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.state_dict import deduplicated_state_dict, load_deduplicated
from threetowers.trainer.model.towers.text_transformer import TextTransformer
from threetowers.trainer.optimizer.optimizer import freeze

TEXT = {"kind": "text", "width": 32, "depth": 3, "heads": 2, "causal": True}


def shared_tree(share: dict[str, Any] | None = None, **image: Any) -> dict[str, Any]:
    text = TEXT | {"share": {"tower": "image"} | (share or {})}
    return THREE | {"towers": THREE["towers"] | {"image": VIT | image, "text": text}}


def names_of_shared(tree: dict[str, Any]) -> set[str]:
    model = model_of(tree)
    ours, theirs = (dict(model.towers[name].named_parameters()) for name in ("text", "image"))
    return {name for name, p in ours.items() if any(p is q for q in theirs.values())}


def test_shared_blocks_are_the_same_objects_paired_from_the_last() -> None:
    model = model_of(shared_tree())
    image, text = model.towers["image"].model.blocks, model.towers["text"].blocks
    for mine, theirs in zip(text, image[1:], strict=True):
        assert mine.attn.qkv.weight is theirs.attn.qkv.weight
        assert mine.mlp.fc2.bias is theirs.mlp.fc2.bias
        assert mine.norm1.weight is not theirs.norm1.weight
    assert names_of_shared(shared_tree({"modules": ["norm2"], "blocks": 1})) == {
        "blocks.2.norm2.weight",
        "blocks.2.norm2.bias",
    }
    model = model_of(shared_tree(**SPECIALIZED))  # five blocks are left beside the stem
    assert model.towers["text"].blocks[0].attn.qkv.weight is model.towers["image"].model.vit.blocks[2].attn.qkv.weight


def test_shared_parameters_take_the_gradients_of_both_towers() -> None:
    inputs, grads = inputs_of(6), []
    shared = model_of(shared_tree())
    apart = model_of(THREE | {"towers": THREE["towers"] | {"image": VIT, "text": TEXT}})
    apart.load_state_dict(shared.state_dict())
    for model in (shared, apart):
        loss, _ = total_loss(model.config, model(inputs))
        loss.backward()
        blocks = model.towers["image"].model.blocks[1], model.towers["text"].blocks[0]
        grads.append([block.get_parameter("mlp.fc1.weight").grad for block in blocks])
    torch.testing.assert_close(grads[0][0], grads[1][0] + grads[1][1])


def test_shared_parameters_are_stored_once() -> None:
    first = model_of(shared_tree())
    torch.manual_seed(9)
    with torch.no_grad():
        for p in first.parameters():
            p += torch.randn_like(p)
    state = deduplicated_state_dict(first)
    assert sum(t.numel() for n, t in state.items() if n in dict(first.named_parameters())) == sum(
        p.numel() for p in first.parameters()
    )
    second = model_of(shared_tree())
    load_deduplicated(second, state)
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"(?s)the weights are of another model: .*towers\.image"):
        load_deduplicated(second, {name: t for name, t in state.items() if "image" not in name})


@pytest.mark.parametrize(
    ("share", "image", "message"),
    [
        ({"blocks": 4}, {}, r"share\.blocks: 4, but the towers have 3 and 4 blocks"),
        ({}, {"args": VIT["args"] | {"embed_dim": 48}}, r"attn differs between the two towers .*give them one width"),
        ({}, {"model": "test_resnet", "args": {}}, r"'image' is not a timm vision transformer"),
        ({"tower": "third"}, {}, r"share\.tower: found 'third', expected an image tower"),
        ({}, {"frozen": True, "init": "x"}, r"one of the two towers .* is frozen; freeze both or neither"),
    ],
)
def test_invalid_sharing_is_refused(share: dict[str, Any], image: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(shared_tree(share, **image))


@pytest.mark.parametrize(("patch", "img"), [(8, 32), (16, 64), (32, 96)])
@pytest.mark.parametrize("specialize", [{}, {"branch": False}, {"stem": False}])
def test_specialised_towers_learn_with_all_their_parts(specialize: dict[str, Any], patch: int, img: int) -> None:
    image = VIT | {"args": VIT["args"] | {"img_size": img, "patch_size": patch, "depth": 6}, "specialize": specialize}
    tree = THREE | {"towers": THREE["towers"] | {"image": image}, "data": THREE["data"] | {"image_size": img}}
    model = model_of(tree)
    pixels = torch.randint(0, 256, (4, 3, img, img), dtype=torch.uint8)
    loss, _ = total_loss(model.config, model(inputs_of(4) | {"image": pixels}))
    loss.backward()
    assert [n for n, p in model.towers["image"].named_parameters() if p.grad is None or not p.grad.any()] == []
    assert len(model.towers["image"].model.vit.blocks) == (5 if specialize.get("stem", True) else 6)


def test_invalid_specialisation_is_refused() -> None:
    for image, message in [
        ({"kind": "timm", "model": "test_resnet"}, "needs one of timm's vision transformers"),
        (VIT | {"args": VIT["args"] | {"embed_dim": 24, "depth": 6}}, "a width divisible by 16"),
        (VIT, "6 blocks or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            model_of(changed("towers.image", image | {"specialize": {}}))


def test_a_frozen_tower_stays_as_it_is() -> None:
    image = {"kind": "timm", "model": "test_resnet", "frozen": True, "init": "given.safetensors"}
    with pytest.raises(ConfigError, match=r"towers\.image\.frozen: .* name them by towers\.image\.init"):
        parse(changed("towers.image", image | {"init": None}))
    model = model_of(changed("towers.image", image))
    assert not model.towers["image"].training
    assert not model.train().towers["image"].training
    assert model.towers["text"].training
    before = {name: t.clone() for name, t in model.towers["image"].state_dict().items()}
    loss, _ = total_loss(model.config, model(inputs_of(6)))
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    for name, tensor in model.towers["image"].state_dict().items():
        assert tensor.equal(before[name]), name
    assert all(p.grad is None for p in model.towers["image"].parameters())
    assert model.heads["f"].weight.grad.any()  # type: ignore[union-attr, operator]


def test_a_learning_rate_of_0_is_frozen() -> None:
    """A whole tower like `frozen: true`; of part of one each module that has no other parameters."""
    image = {"kind": "timm", "model": "test_resnet", "args": {"drop_rate": 0.5}}
    plain = changed("towers.image", image)
    frozen = model_of(changed("towers.image", image | {"frozen": True, "init": "given.safetensors"}))
    by_rate = model_of(plain | {"optim": {"param_groups": [{"match": "towers.image.*", "lr": 0}]}})
    freeze(by_rate, by_rate.config.optim)
    assert by_rate.frozen == frozen.frozen == ["image"]
    for model in (frozen, by_rate):
        model.eval().train()
        assert not any(module.training for module in model.towers["image"].modules())
        assert model.towers["text"].training
    before = {name: t.clone() for name, t in by_rate.towers["image"].state_dict().items()}
    outputs = [model(inputs_of(6)).embeddings["f"] for model in (frozen, by_rate)]
    assert outputs[0].equal(outputs[1])
    assert all(t.equal(before[name]) for name, t in by_rate.towers["image"].state_dict().items())

    part = model_of(plain | {"optim": {"param_groups": [{"match": "towers.image.model.layer1.*", "lr": 0}]}})
    freeze(part, part.config.optim)
    tower = part.towers["image"].model
    part(inputs_of(6))
    tracked = {name: int(b) for name, b in tower.named_buffers() if name.endswith("num_batches_tracked")}  # type: ignore[operator]
    assert {name for name, count in tracked.items() if count == 0} == {n for n in tracked if n.startswith("layer1.")}
    assert part.frozen == []


def test_a_model_without_trained_parameters_is_refused() -> None:
    tree = changed("towers.image.frozen", True)
    tree["towers"]["image"] |= {"init": "given.safetensors"}
    tree["towers"]["text"] |= {"frozen": True, "init": "given.safetensors"}
    tree["towers"].pop("third")
    tree["heads"] = {name: {"of": of, "kind": "none"} for name, of in (("f", "image"), ("g", "text"))}
    tree["towers"]["text"]["width"] = 64
    tree["terms"] = {"image-text": {"x": "f", "y": "g", "kind": "l2"}}
    with pytest.raises(ValueError, match="no parameter is left to train"):
        model_of(tree)


def test_initial_weights(tmp_path: Path) -> None:
    source = model_of(THREE)
    save_file(deduplicated_state_dict(source), tmp_path / "run.safetensors")
    save_file(source.towers["image"].model.state_dict(), tmp_path / "image.safetensors")  # type: ignore[union-attr]
    torch.manual_seed(5)
    tree = changed("towers.text.init", f"{tmp_path}/run.safetensors#towers.text")
    tree["towers"]["image"]["init"] = f"{tmp_path}/image.safetensors"
    model = model_of(tree)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.load_initial_weights()
    for name in ("text", "image"):
        for key, tensor in source.towers[name].state_dict().items():
            assert model.towers[name].state_dict()[key].equal(tensor), key
    for init, message in [
        (
            f"{tmp_path}/run.safetensors#towers.words",
            r"has no tensor named towers\.words\.\*; known .*towers\.text",
        ),
        (f"{tmp_path}/run.safetensors#towers.image", r"towers\.text\.init: .* does not fit the tower"),
        (f"{tmp_path}/none.safetensors", r"towers\.text\.init: .*none\.safetensors'?: no such file"),
    ]:
        with pytest.raises(ValueError, match=message):
            model_of(changed("towers.text.init", init)).load_initial_weights()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_classes": 10}, r"towers\.image\.args: found num_classes: 10, but a tower ends before its classifier"),
        ({"features_only": True}, r"args: found features_only: True, but a tower gives one vector an image"),
        ({"in_chans": 1}, r"args: found in_chans: 1, but images have three channels"),
        ({"pretrained": True}, r"args: found pretrained: True, but the tower's `init` names its weights"),
        ({"global_pool": ""}, r"'test_resnet' with args \{'global_pool': ''\} gives \(1, 96, 1, 1\) for an image"),
        ({"no_such": 1}, r"timm cannot create 'test_resnet' with \{.*'no_such': 1\}: .*unexpected keyword"),
    ],
)
def test_arguments_that_leave_no_vector_an_image_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(changed("towers.image", {"kind": "timm", "model": "test_resnet", "args": args}))


def test_initial_weights_from_checkpoints_of_others(tmp_path: Path) -> None:
    """Wrapped, averaged, with a classifier, of a model with other arguments: the tower is found by its names."""
    tree = changed("towers.image", VIT)
    config = parse(tree).towers["image"]
    model = model_of(tree)
    full = timm.create_model(VIT["model"], num_classes=7, **VIT["args"]).state_dict()
    averaged = {f"module.{name}": tensor * 2 for name, tensor in full.items()}
    torch.save({"state_dict": full, "state_dict_ema": averaged}, tmp_path / "last.pth.tar")
    for init, factor in ((f"{tmp_path}/last.pth.tar", 2), (f"{tmp_path}/last.pth.tar#state_dict", 1)):
        load_initial(model.towers["image"], replace(config, init=init), "init")  # type: ignore[type-var]
        for name, tensor in model.towers["image"].model.state_dict().items():  # type: ignore[union-attr, operator]
            assert tensor.equal(full[name] * factor), name
    save_file({name: t.clone() for name, t in model.state_dict().items()}, tmp_path / "run.safetensors")
    for name in ("image", "text"):  # without a prefix, since one tower of each kind is in it
        tower = model.towers[name]
        before = {key: tensor.clone() for key, tensor in tower.state_dict().items()}
        torch.nn.init.zeros_(next(tower.parameters()))
        load_initial(tower, replace(parse(tree).towers[name], init=f"{tmp_path}/run.safetensors"), "init")  # type: ignore[type-var]
        assert all(before[key].equal(tensor) for key, tensor in tower.state_dict().items())


def test_a_tower_begins_with_the_tower_of_a_run(clip: dict[str, Any], tmp_path: Path) -> None:
    clip["towers"] |= {"second": {"kind": "timm", "model": "test_resnet"}}
    clip["heads"] |= {"s": {"of": "second"}}
    clip["terms"] |= {"both": {"x": "s", "y": "g"}}
    shared = {"kind": "timm", "model": "vit_base_patch32_clip_quickgelu_224", "args": VIT["args"] | {"embed_dim": 16}}
    clip["towers"] |= {"image": shared}
    clip["towers"]["text"] |= {"share": {"tower": "image"}}  # so that the file holds shared tensors once
    folder = finished_run(clip)
    trained = load_model(folder)

    def begun(name: str, init: str, **changes: Any) -> Any:
        tree = clip | {"towers": clip["towers"] | {name: clip["towers"][name] | {"init": init} | changes}}
        torch.manual_seed(1)
        model = TowerModel(parse(tree), trained.tokenizer.embedding_rows(None), {})
        load_initial(model.towers[name], parse(tree).towers[name], f"towers.{name}.init")  # type: ignore[arg-type]
        return model.towers[name]

    for name, init in (("text", f"run:{folder}"), *((n, f"run:{folder}#towers.{n}") for n in ("image", "second"))):
        found = begun(name, init).state_dict()
        assert found.keys() == trained.model.towers[name].state_dict().keys()
        assert all(tensor.equal(found[key]) for key, tensor in trained.model.towers[name].state_dict().items())

    for name, init, message in [
        ("image", f"run:{folder}", r"expected one tower of the kind 'timm', found run:.*#towers\.image, run:.*second"),
        ("image", f"run:{folder}#towers.text", r"expected one tower of the kind 'timm', found run:.*#towers\.image"),
        ("image", f"run:{folder}#towers.second", r"towers\.image\.init: .* does not fit the tower"),
        ("text", f"run:{tmp_path}", r"towers\.text\.init: .* holds no finished run"),
        ("text", "timm:test_vit", r"'timm:test_vit' is a model of images; a text tower begins with the tower of a run"),
        (
            "image",
            "hf:bert",
            r"expected null, pretrained, .* or a file, found the kind 'hf'",
        ),
        ("text", "open_clip:ViT-B-32", r"or a file, found the kind 'open_clip'"),
    ]:
        with pytest.raises(ValueError, match=message):
            begun(name, init)


def test_a_tower_begins_with_another_model_of_timm(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", num_classes=5)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    tree = changed("towers.image", {"kind": "timm", "model": "test_vit", "args": {"img_size": 32}})
    config = parse(tree).towers["image"]
    tower = model_of(tree).towers["image"]
    init = f"timm:test_vit:{tmp_path / 'vit.safetensors'}"
    notes = load_initial(tower, replace(config, init=init), "init")  # type: ignore[type-var]
    assert [note for note in notes if "pos_embed" in note] == notes != []
    state = tower.model.state_dict()  # type: ignore[union-attr, operator]
    assert all(state[name].equal(tensor) for name, tensor in source.blocks.state_dict(prefix="blocks.").items())
    for init, message in [
        ("timm:test_vit@64", "leave out @64: weights are resampled to data.image_size"),
        ("timm:test_vitt", "unknown to timm"),
        (f"timm:test_resnet:{tmp_path / 'none.pth'}", "no such file"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_initial(tower, replace(config, init=init), "init")  # type: ignore[type-var]


def test_several_towers_of_each_kind() -> None:
    tree = changed("towers.second", {"kind": "timm", "model": "test_resnet"})
    tree["towers"] |= {"words": TEXT, "other": {"kind": "cache", "path": "c2"}}
    tree["heads"] |= {name: {"of": of} for name, of in (("s", "second"), ("w", "words"), ("h_w", "other"))}
    tree["terms"] |= {"second-words": {"x": "s", "y": "w"}, "words-other": {"x": "w", "y": "h_w", "kind": "l2"}}
    model = TowerModel(parse(tree), VOCAB_SIZE, WIDTHS | {"other": 9})
    inputs = inputs_of(5)
    inputs |= {"second": inputs["image"], "words": inputs["text"], "other": torch.randn(5, 9)}
    loss, report = total_loss(model.config, model(inputs))
    loss.backward()
    assert set(report["words-other"].metrics()) == {"loss"}
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_mlp_heads_and_heads_without_bias() -> None:
    tree = changed("heads.h_f", {"of": "third", "kind": "mlp", "hidden": 7, "depth": 2, "embed_dim": 16, "bias": False})
    head = model_of(tree).heads["h_f"]
    assert [tuple(p.shape) for p in head.parameters()] == [(7, 20), (7, 7), (16, 7)]
    assert model_of(changed("heads.h_f", {"of": "third", "kind": "mlp"})).heads["h_f"][0].out_features == 20  # type: ignore[index]


def test_an_l2_term_is_a_mean_squared_distance_without_scale() -> None:
    tree = changed("terms.image-third.kind", "l2")
    tree["terms"]["image-third"]["scale"] = "unused"
    model = model_of(tree)
    assert set(model.log_scales) == {"scale"}
    outputs = model(inputs_of(6))
    _, report = total_loss(model.config, outputs)
    x, y = outputs.embeddings["f_h"].detach(), outputs.embeddings["h_f"].detach()
    assert report["image-third"].metrics() == {"loss": pytest.approx(float((2 - 2 * (x * y).sum(1)).mean()), rel=1e-5)}


def test_a_run_of_l2_terms_alone() -> None:
    tree = changed("terms.image-third.kind", "l2")
    tree["terms"]["image-text"] |= {"kind": "l2"}
    model = model_of(tree)
    assert not list(model.log_scales)
    loss, _ = total_loss(model.config, model(inputs_of(4)))
    loss.backward()


@pytest.mark.parametrize(("pool", "mask_padding"), [("eos", True), ("last", False)])
def test_a_causal_text_tower_does_not_attend_to_later_tokens(pool: Any, mask_padding: bool) -> None:
    torch.manual_seed(0)
    tower = TextTransformer(
        TextTower("text", 16, 2, 2, causal=True, mask_padding=mask_padding, pool=pool), 30, 6
    ).eval()
    tokens = torch.tensor([[5, 9, 7, 8, END, PAD]])
    other = torch.tensor([[5, 9, 7, 6, END, PAD]])
    mask = tower._mask(tokens)
    a, b = (block_outputs(tower, t, mask) for t in (tokens, other))
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3:], b[:, 3:])


def block_outputs(tower: TextTransformer, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    x = tower.embed(tokens) + tower.position
    for block in tower.blocks:
        x = block(x, attn_mask=mask)
    return x


@pytest.mark.parametrize("image", [VIT, SPECIALIZED, {"kind": "timm", "model": "test_resnet"}])
def test_recomputing_activations_changes_no_gradient(image: dict[str, Any]) -> None:
    grads = []
    for again in (False, True):
        tree = THREE | {"towers": THREE["towers"] | {"image": image, "text": TEXT | {"dropout": 0.3}}}
        model = model_of(tree).train()
        if again:
            model.checkpoint_activations()
        torch.manual_seed(2)
        loss, _ = total_loss(model.config, model(inputs_of(4)))
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@pytest.mark.parametrize("image", [{"kind": "timm", "model": "test_vit"}, {"kind": "timm", "model": "test_resnet"}])
def test_estimated_activations_match_those_that_autograd_keeps(image: dict[str, Any]) -> None:
    """Counted on the meta device, and on a real forward pass by the same hooks on real tensors."""
    tree = changed("towers.image", image)
    teachers = {"third": TeacherCost("b", 20, 40, None)}
    estimated = activation_bytes(meta_model(parse(tree), 30, teachers))
    model = model_of(tree)
    kept = []
    for samples in (2, 4):
        storages: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

        def pack(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages.setdefault(storage.data_ptr(), storage.nbytes())
            return tensor

        inputs = inputs_of(samples)
        context = model.config.data.context_length
        inputs["text"] = torch.full((samples, context), END)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model(inputs)
        kept.append(sum(storages.values()))
        del outputs
    assert estimated == pytest.approx((kept[1] - kept[0]) / 2, rel=0.02)


def test_costs_by_hand() -> None:
    tree = shared_tree()
    run = parse(tree)
    model = meta_model(run, 30, {"third": TeacherCost("b", 20, 40, None)})
    costs = tower_costs(model)
    block = 4 * 32 * 32 + 4 * 32 + 2 * 4 * 32 * 32 + 5 * 32  # attention and MLP of width 32
    assert costs["text"].shared == 3 * block
    assert costs["image"].shared == 0
    length, width = run.data.context_length, 32
    products = 2 * length * width * (4 * width + 8 * width) + 2 * 2 * length * length * width
    assert costs["text"].flops == 3 * products
    count = sum(p.numel() for p in model.parameters())
    heads_and_scale = 2 * (32 + 1) * 16 + (16 + 1) * 16 + (20 + 1) * 16 + 1
    assert costs["image"].parameters + costs["text"].parameters - 3 * block + heads_and_scale == count
    for stage, bytes_each in enumerate((16, 4 + 4 + 12 / 4, 4 + 16 / 4, 16 / 4)):  # stage 3 keeps no copy
        engine = {"engine": {"zero_stage": stage}}
        assert state_memory(parse(tree | engine), model, 4).total == pytest.approx(count * bytes_each, rel=1e-3), stage


def test_large_numbers_as_text() -> None:
    assert [flop(f) for f in (12, 4.5e9, 2e16)] == ["12 FLOP", "4.5 GFLOP", "20 PFLOP"]
    assert [size(s) for s in (12, 3 * 2**20, 2**41)] == ["12 B", "3 MiB", "2 TiB"]


def test_an_entry_that_is_null_is_left_out() -> None:
    tree = changed("towers.second", {"kind": "cache", "path": "c"})
    tree["towers"]["second"] = None
    assert set(parse(tree).towers) == {"image", "text", "third"}
    tree["heads"]["spare"] = {"of": "third"}
    with pytest.raises(ConfigError, match=r"heads: \['spare'\] are used by no term"):
        parse(tree)

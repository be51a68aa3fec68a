"""The model of a run and its loss: heads, scales, groups, and the deployed part."""

import math
from typing import Any

import pytest
import torch

from tests.trainer.small_models import inputs_of, model_of
from tests.trainer.test_config import THREE, changed
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import END, PAD
from threetowers.trainer.config import TextTower
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.model import clamp_log_scale
from threetowers.trainer.model.towers.text_transformer import TextTransformer


def test_embeddings_are_unit_and_scales_have_a_dimension() -> None:
    model = model_of(THREE)
    outputs = model(inputs_of(5))
    assert set(outputs.embeddings) == {"f", "g", "f_h", "h_f"}
    for embedding in outputs.embeddings.values():
        assert embedding.shape == (5, 16)
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(5))
    assert outputs.log_scales["scale"].item() == pytest.approx(math.log(14.3))
    assert all(p.ndim >= 1 for p in model.parameters())


def test_the_deployed_part_does_not_need_the_third_tower() -> None:
    model = model_of(THREE).eval()
    inputs = inputs_of(5)
    before = model.encode_image(inputs), model.encode_text(inputs)
    del model.towers["third"], model.heads["f_h"], model.heads["h_f"]
    main = {name: inputs[name] for name in ("image", "text")}
    assert model.encode_image(main).equal(before[0])
    assert model.encode_text(main).equal(before[1])


def test_the_frozen_tower_gets_no_gradient_and_everything_else_does() -> None:
    model = model_of(THREE)
    loss, _ = total_loss(model.config, model(inputs_of(6)))
    loss.backward()
    assert not list(model.towers["third"].parameters())
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_samples_of_one_group_are_no_negatives_of_each_other() -> None:
    """A repeated sample leaves its twin's sums, in both directions, as a direct computation shows."""
    model = model_of(THREE).eval()
    inputs = inputs_of(4)
    twins = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in inputs.items()}
    groups = torch.tensor([7, 8, 9, 10, 7])
    masked, _ = total_loss(model.config, model(twins), groups)
    kept, _ = total_loss(model.config, model(twins))
    assert float(masked.detach()) < float(kept.detach())
    f, g = (model.embed(twins, [head])[head].detach() for head in "fg")
    scores = 14.3 * f @ g.T
    allowed = (groups[:, None] != groups) | torch.eye(5, dtype=torch.bool)
    expected = 0.0
    for matrix in (scores, scores.T):
        for row in range(5):
            expected += float(matrix[row][allowed[row]].logsumexp(0) - matrix[row, row]) / 10
    _, terms = total_loss(model.config, model(twins), groups)
    assert float(terms["image-text"].loss) == pytest.approx(expected, rel=1e-4)


def test_a_term_of_weight_zero_gives_the_baseline() -> None:
    """With the third-tower term's weight zero, f and g get exactly the gradient of the two-tower loss."""
    inputs, grads = inputs_of(6), []
    two = changed("terms.image-third", None)
    for key in ("f_h", "h_f"):
        del two["heads"][key]
    del two["towers"]["third"]
    for tree in (changed("terms.image-third.weight", 0.0), two):
        model = model_of(tree)
        loss, _ = total_loss(model.config, model(inputs))
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if n.startswith(("towers.image", "towers.text"))})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)


@pytest.mark.parametrize(("mebibytes", "kept_terms"), [(0, 0), (1, 2), (16, 2)])
def test_the_logit_cache_keeps_tiles_and_changes_no_bit(mebibytes: int, kept_terms: int) -> None:
    """With room, autograd holds one 6 x 6 tile of dots for each of the two terms; the loss and gradients stay."""
    saved: list[torch.Size] = []

    def pack(part: torch.Tensor) -> torch.Tensor:
        saved.append(part.shape)
        return part

    results = []
    for tree in (changed("loss", {"logit_cache_mib": mebibytes}), changed("loss", {"logit_cache_mib": 0})):
        saved.clear()
        model = model_of(tree)
        outputs = model(inputs_of(6))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
            loss, _ = total_loss(model.config, outputs)
        if not results:
            assert saved.count(torch.Size([36])) == kept_terms
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_headless_terms_must_agree_in_width() -> None:
    tree = changed("heads.h_f", {"of": "third", "kind": "none"})
    with pytest.raises(ValueError, match=r"terms\.image-third: 'f_h' has width 16, 'h_f' has 20"):
        model_of(tree)
    tree["embed_dim"] = 20
    assert model_of(tree)(inputs_of(3)).embeddings["h_f"].shape == (3, 20)


def test_separate_scales_and_sigmoid_biases() -> None:
    tree = changed("terms.image-third.scale", "own")
    tree["loss"] = {"kind": "sigmoid"}
    model = model_of(tree)
    outputs = model(inputs_of(4))
    assert set(outputs.log_scales) == set(outputs.biases) == {"scale", "own"}
    loss, terms = total_loss(model.config, outputs)
    assert float(loss.detach()) == pytest.approx(sum(float(t.loss) for t in terms.values()))


def test_scale_is_clamped_and_can_come_back() -> None:
    log_scale = torch.tensor([math.log(500.0)], requires_grad=True)
    clamped = clamp_log_scale(log_scale, 100.0)
    assert clamped.exp().item() == pytest.approx(100.0)
    (grad,) = torch.autograd.grad(clamped, log_scale)
    assert grad.item() == 1.0


@pytest.mark.parametrize("pool", ["eos", "mean"])
def test_padding_does_not_change_a_text(pool: Any) -> None:
    torch.manual_seed(0)
    tower = TextTransformer(TextTower("text", 16, 2, 2, pool=pool), 30, 12).eval()
    short = torch.tensor([[5, 9, END]])
    padded = torch.tensor([[5, 9, END, PAD, PAD]])
    torch.testing.assert_close(tower(padded), tower(short))
    assert not torch.allclose(tower(torch.tensor([[9, 5, END]])), tower(short))  # order matters


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ({"kind": "timm", "model": "no_such_model"}, "'no_such_model' is unknown to timm"),
        (
            {"kind": "timm", "model": "test_vit", "args": {"widht": 3}},
            "timm cannot create 'test_vit' with {'widht': 3}",
        ),
        ({"kind": "timm", "model": "vit_tiny_patch16_224"}, "does not take 32-pixel images"),
    ],
)
def test_invalid_image_towers_are_refused(tower: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(changed("towers.image", tower))

"""Heads against plain arithmetic: layers, norms, activations, gates, dropout, and the heads of published recipes."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.trainer.small_models import inputs_of, model_of
from tests.trainer.test_config import THREE, changed
from threetowers.trainer.config import ConfigError, Head, parse
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.head import GatedLayer, build_head

Array = npt.NDArray[np.float64]
WIDTH, SAMPLES, EMBED_DIM = 5, 7, 4
EPS = 1e-5

HEADS = {
    "linear": {},
    "linear without bias": {"bias": False, "embed_dim": 3},
    "linear after a layer norm": {"input_norm": "layer"},
    "linear after a batch norm": {"input_norm": "batch", "bias": False},
    "none": {"kind": "none"},
    "mlp": {"kind": "mlp"},
    "bounded": {"kind": "mlp", "activation": "relu6"},
    "deep": {"kind": "mlp", "hidden": 6, "depth": 3, "activation": "relu", "bias": False},
    "batch norms": {"kind": "mlp", "hidden": 6, "depth": 2, "norm": "batch", "activation": "relu6"},
    "layer norms": {"kind": "mlp", "hidden": 6, "depth": 2, "norm": "layer", "input_norm": "layer"},
    "gated": {"kind": "mlp", "hidden": 9, "gated": True, "activation": "silu", "input_norm": "batch"},
    "gated, deep": {"kind": "mlp", "depth": 2, "gated": True, "activation": "relu6", "norm": "layer", "bias": False},
}


def head_of(**keys: Any) -> nn.Module:
    """A head in float64 whose parameters and moments are all random."""
    torch.manual_seed(0)
    head = build_head(Head(of="tower", **keys), WIDTH, EMBED_DIM)[0].double()
    with torch.no_grad():
        for tensor in (*head.parameters(), *(b for b in head.buffers() if b.is_floating_point())):
            tensor += 0.3 * torch.rand_like(tensor)
    return head


def rows() -> Tensor:
    return 20 * torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class DenseHead:
    """A head as its config describes it, from the same numbers: taken in the order in which a head holds them."""

    def __init__(self, head: nn.Module, config: Head, training: bool) -> None:
        self.config = config
        self.training = training
        self.parameters = [p.detach().numpy() for p in head.parameters()]
        self.moments = [b.numpy() for b in head.buffers() if b.is_floating_point()]

    def __call__(self, x: Array) -> Array:
        config = self.config
        if config.kind == "none":
            return x
        if config.input_norm is not None:
            x = self.normalized(x, config.input_norm)
        if config.kind == "mlp":
            for _ in range(config.depth):
                x = self.hidden_layer(x)
        x = self.linear(x)
        assert self.parameters == self.moments == []  # all were used
        return x

    def hidden_layer(self, x: Array) -> Array:
        gate = self.linear(x)
        if self.config.norm is not None:
            gate = self.normalized(gate, self.config.norm)
        gate = np.vectorize(ACTIVATIONS[self.config.activation])(gate)
        return gate * self.linear(x) if self.config.gated else gate

    def linear(self, x: Array) -> Array:
        weight = self.parameters.pop(0)
        bias = self.parameters.pop(0) if self.config.bias else np.zeros(len(weight))
        return np.array([[sum(w * v for w, v in zip(ws, row, strict=True)) for ws in weight] for row in x]) + bias

    def normalized(self, x: Array, norm: str) -> Array:
        scale, offset = self.parameters.pop(0), self.parameters.pop(0)
        mean, variance = x.mean(1, keepdims=True), x.var(1, keepdims=True)
        if norm == "batch":
            running_mean, running_variance = self.moments.pop(0), self.moments.pop(0)
            mean, variance = (x.mean(0), x.var(0)) if self.training else (running_mean, running_variance)
        normalized: Array = (x - mean) / np.sqrt(variance + EPS) * scale + offset
        return normalized


ACTIVATIONS = {
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "relu": lambda x: max(x, 0.0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_computes_what_its_config_says(name: str, training: bool) -> None:
    head, x = head_of(**HEADS[name]).train(training), rows()
    expected = DenseHead(head, Head(of="tower", **HEADS[name]), training)(x.numpy())
    x.requires_grad_()
    found = head(x)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-10, atol=1e-10)
    (found * torch.linspace(-1, 1, found.shape[1])).square().sum().backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_widths() -> None:
    assert build_head(Head(of="tower", kind="none"), WIDTH, EMBED_DIM)[1] == WIDTH
    for keys in HEADS.values():
        module, width = build_head(Head(of="tower", **keys), WIDTH, EMBED_DIM)
        assert module.eval()(torch.zeros(2, WIDTH)).shape == (2, width)
    gated = build_head(Head(of="tower", kind="mlp", gated=True), WIDTH, EMBED_DIM)[0]
    assert isinstance(gated[0], GatedLayer)  # type: ignore[index]
    assert gated[0].value.out_features == WIDTH  # type: ignore[index]


def test_dropout_follows_each_hidden_layer_in_training_only() -> None:
    keys = {"kind": "mlp", "hidden": 400, "depth": 2, "activation": "relu"}
    plain, dropped = head_of(**keys), head_of(**keys, dropout=0.25)
    assert [type(module).__name__ for module in dropped] == [*["Linear", "ReLU", "Dropout"] * 2, "Linear"]  # type: ignore[attr-defined]
    x = rows()
    assert dropped.eval()(x).equal(plain.eval()(x))
    torch.manual_seed(2)
    with_zeros, without = dropped.train()[:3](x), plain[:2](x)  # type: ignore[index]
    kept = with_zeros != 0
    torch.testing.assert_close(with_zeros[kept], without[kept] / 0.75)
    assert float(kept.sum() / (without != 0).sum()) == pytest.approx(0.75, abs=0.03)


def test_the_heads_of_lift() -> None:
    """Linear, GELU, Linear to the width of the text rows, which have no head."""
    head = build_head(Head(of="image", kind="mlp", hidden=4096, embed_dim=4096), 768, 512)[0]
    assert [str(module) for module in head] == [  # type: ignore[attr-defined]
        "Linear(in_features=768, out_features=4096, bias=True)",
        "GELU(approximate='none')",
        "Linear(in_features=4096, out_features=4096, bias=True)",
    ]


def test_the_head_of_sharelock() -> None:
    """Three times linear, batch norm, ReLU and dropout, then linear."""
    keys: Mapping[str, Any] = {"hidden": 4096, "depth": 3, "norm": "batch", "activation": "relu", "dropout": 0.2}
    with torch.device("meta"):
        head = build_head(Head(of="text", kind="mlp", **keys), 4096, 768)[0]
    layer = ["Linear", "BatchNorm1d", "ReLU", "Dropout"]
    assert [type(module).__name__ for module in head] == [*layer * 3, "Linear"]  # type: ignore[attr-defined]
    hidden = 4096 * 4096 + 4096 + 2 * 4096
    assert sum(p.numel() for p in head.parameters()) == 3 * hidden + 4096 * 768 + 768


def test_the_head_of_sail() -> None:
    """g(ReLU6(f1(x)) * f2(x)) of layer-normalised features, written out."""
    head = head_of(kind="mlp", input_norm="layer", gated=True, activation="relu6", hidden=8 * WIDTH)
    norm, layer, g = head  # type: ignore[misc]
    x = F.layer_norm(rows(), (WIDTH,), norm.weight, norm.bias)
    (f1, _), f2 = layer.gate, layer.value
    expected = F.linear(F.relu6(F.linear(x, f1.weight, f1.bias)) * F.linear(x, f2.weight, f2.bias), g.weight, g.bias)
    torch.testing.assert_close(head(rows()), expected)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_heads_compute_alike_in_every_precision(norm: str) -> None:
    keys = {"kind": "mlp", "hidden": 64, "norm": norm, "input_norm": norm, "gated": True, "activation": "relu6"}
    for training in (False, True):
        found = {}
        for precision in ("float32", "mixed", "bfloat16"):
            model = model_of(changed("heads.h_f", {"of": "third", **keys})).train(training)
            model.set_precision(precision)  # type: ignore[arg-type]
            found[precision] = model.embed(inputs_of(6), ["h_f"])["h_f"]
        for precision in ("mixed", "bfloat16"):
            cosine_b = F.cosine_similarity(found[precision], found["float32"])
            assert 0.99 < cosine_b.min() < 1, (precision, training)


def test_half_an_l2_term_is_the_cosine_loss() -> None:
    """1 - cos of matching pairs alone, with the gradients of torch's own."""
    tree = THREE | {"terms": {"cosine": {"x": "f_h", "y": "h_f", "kind": "l2", "weight": 0.5}}}
    tree["terms"]["text"] = {"x": "f", "y": "g", "kind": "l2", "weight": 0}
    ours, theirs = model_of(tree), model_of(tree)
    loss, _ = total_loss(ours.config, ours(inputs_of(6)))
    loss.backward()
    embeddings = theirs(inputs_of(6)).embeddings
    expected = nn.CosineEmbeddingLoss()(embeddings["f_h"], embeddings["h_f"], torch.ones(6))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name in ("heads.f_h.weight", "heads.h_f.weight", "heads.f.weight"):
        torch.testing.assert_close(ours.get_parameter(name).grad, theirs.get_parameter(name).grad)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"hidden": 7}, r"heads\.h_f\.hidden: found 7 with kind: linear, .* set kind: mlp, or leave hidden out"),
        ({"dropout": 0.2}, r"heads\.h_f\.dropout: found 0\.2 with kind: linear"),
        ({"gated": True, "kind": "none"}, r"heads\.h_f\.gated: found True with kind: none"),
        ({"input_norm": "layer", "kind": "none"}, r"heads\.h_f\.input_norm: .* set kind: linear or mlp"),
        ({"embed_dim": 16, "kind": "none"}, r"heads\.h_f\.embed_dim: found 16 with kind: none"),
        ({"norm": "group", "kind": "mlp"}, r"heads\.h_f\.norm: .*'batch' or 'layer'.*found 'group'"),
        ({"dropout": 1.5, "kind": "mlp"}, r"heads\.h_f\.dropout: .*less than or equal to 1"),
        ({"activation": "tanh", "kind": "mlp"}, r"heads\.h_f\.activation: .*found 'tanh'"),
    ],
)
def test_refused(head: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(changed("heads.h_f", {"of": "third"} | head))


@pytest.mark.parametrize("key", ["norm", "input_norm"])
def test_batch_norms_over_masked_rows_are_refused(key: str) -> None:
    """Rows that are not there would count in the statistics; each sample is normalised by itself in a layer norm."""
    tree = changed("towers.third.on_missing_row", "mask")
    tree["heads"] |= {"h_f": {"of": "third"}, "h": {"of": "h_f", "kind": "mlp", key: "batch"}}
    tree["terms"]["image-third"]["y"] = "h"
    with pytest.raises(ConfigError, match=rf"heads\.h\.{key}: .* without an embedding in 'third' .* set {key}: layer"):
        parse(tree)
    tree["heads"]["h"][key] = "layer"
    parse(tree)
    tree["heads"]["h"][key] = "batch"
    tree["towers"]["third"]["on_missing_row"] = "skip"
    parse(tree)

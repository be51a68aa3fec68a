"""Heads: small maps from a tower's features to the space in which embeddings are compared."""

from torch import Tensor, nn

from threetowers.trainer.config import Head

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU}
NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class GatedLayer(nn.Module):
    """gate(x) · value(x), element by element: a gated linear unit (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, gate: nn.Module, value: nn.Module) -> None:
        """Make a layer of two maps (b, width) -> (b, hidden); `gate` ends with the activation function."""
        super().__init__()
        self.gate = gate
        self.value = value

    def forward(self, x_bw: Tensor) -> Tensor:
        """Return (b, hidden)."""
        gated_bh: Tensor = self.gate(x_bw) * self.value(x_bw)
        return gated_bh


def build_head(head: Head, width: int, embed_dim: int) -> tuple[nn.Module, int]:
    """Return a head on features of `width`, and the width of its output; `embed_dim` is the run's."""
    if head.kind == "none":
        return nn.Identity(), width
    layers: list[nn.Module] = []
    if head.input_norm is not None:
        layers.append(NORMS[head.input_norm](width))
    if head.kind == "mlp":
        hidden = head.hidden or width
        for _ in range(head.depth):
            layers += _hidden_layer(head, width, hidden)
            width = hidden
    out = head.embed_dim or embed_dim
    layers.append(nn.Linear(width, out, bias=head.bias))
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers), out


def _hidden_layer(head: Head, width: int, hidden: int) -> list[nn.Module]:
    """Return the parts of a hidden layer, in order."""
    layers: list[nn.Module] = [nn.Linear(width, hidden, bias=head.bias)]
    if head.norm is not None:
        layers.append(NORMS[head.norm](hidden))
    layers.append(ACTIVATIONS[head.activation]())
    if head.gated:
        layers = [GatedLayer(nn.Sequential(*layers), nn.Linear(width, hidden, bias=head.bias))]
    if head.dropout > 0:
        layers.append(nn.Dropout(head.dropout))
    return layers

"""The model of a run: its towers, the heads on them, and one log-scale (and bias) per named scale."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from threetowers.trainer.config import CacheTower, ImageTower, Run, TextTower
from threetowers.trainer.towers.image import TimmTower
from threetowers.trainer.towers.text import TextTransformer
from threetowers.trainer.towers.third import CachedTower


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gives: unit-norm embeddings (b, dim) by head, log-scales [1] and biases [1] by scale."""

    embeddings: dict[str, Tensor]
    log_scales: dict[str, Tensor]
    biases: dict[str, Tensor]


class TowerModel(nn.Module):
    """Towers and heads as the run's config describes them.

    Every parameter has at least one dimension, scales included: DeepSpeed cannot hold 0-dimensional ones.
    """

    def __init__(self, run: Run, vocab_size: int, cache_widths: Mapping[str, int]) -> None:
        """`cache_widths`: the embedding width of each cached tower, by the tower's name."""
        super().__init__()
        self.run = run
        self.towers = nn.ModuleDict(
            {name: _tower(run, name, vocab_size, cache_widths) for name in run.towers},
        )
        widths = {name: int(tower.width) for name, tower in self.towers.items()}  # type: ignore[arg-type]
        self.heads = nn.ModuleDict()
        for name, head in run.heads.items():
            linear = head.kind == "linear"
            self.heads[name] = nn.Linear(widths[head.of], run.dim) if linear else nn.Identity()
            widths[name] = run.dim if linear else widths[head.of]
        for name, term in run.terms.items():
            if widths[term.x] != widths[term.y]:
                raise ValueError(
                    f"terms.{name}: {term.x!r} has width {widths[term.x]}, {term.y!r} has {widths[term.y]}; "
                    f"give both a linear head, or set dim to the width of the headless one"
                )
        scales = dict.fromkeys(term.scale for term in run.terms.values())
        init = math.log(run.loss.scale_init)
        self.log_scales = nn.ParameterDict({s: nn.Parameter(torch.full((1,), init)) for s in scales})
        sigmoid = run.loss.family == "sigmoid"
        biases = {s: nn.Parameter(torch.full((1,), run.loss.bias_init)) for s in scales} if sigmoid else {}
        self.biases = nn.ParameterDict(biases)

    def forward(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """`inputs`: one tensor per tower by its name: images, tokens, cached rows."""
        wanted = dict.fromkeys(side for term in self.run.terms.values() for side in (term.x, term.y))
        # Parameters leave through the output, not by reference: under ZeRO 3 they are whole only in here.
        return Outputs(
            self.embed(inputs, wanted),
            {name: clamp_log_scale(p, self.run.loss.scale_max) for name, p in self.log_scales.items()},
            {name: p * 1.0 for name, p in self.biases.items()},
        )

    def embed(self, inputs: Mapping[str, Tensor], heads: Iterable[str]) -> dict[str, Tensor]:
        """Return unit-norm embeddings (b, dim) of the named heads; runs only the towers that these stand on."""
        values: dict[str, Tensor] = {}
        dtype = next(iter(self.log_scales.values())).dtype  # that of all parameters; cached rows come in their own

        def value(name: str) -> Tensor:
            if name not in values:
                if name in self.towers:
                    values[name] = self.towers[name](inputs[name]).to(dtype)
                else:
                    values[name] = self.heads[name](value(self.run.heads[name].of))
            return values[name]

        return {name: F.normalize(value(name).float(), dim=-1).to(dtype) for name in heads}

    def encode_image(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the deployed image embeddings (b, dim), unit norm."""
        return self.embed(inputs, [self.run.deploy.image])[self.run.deploy.image]

    def encode_text(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the deployed text embeddings (b, dim), unit norm."""
        return self.embed(inputs, [self.run.deploy.text])[self.run.deploy.text]


def clamp_log_scale(log_scale: Tensor, scale_max: float) -> Tensor:
    """Return log_scale, at most log(scale_max), with the gradient passed straight through.

    A plain clamp has no gradient above its bound, and a scale that once got there could never come back.
    """
    excess = (log_scale - math.log(scale_max)).clamp(min=0)
    return log_scale - excess.detach()


def _tower(run: Run, name: str, vocab_size: int, cache_widths: Mapping[str, int]) -> nn.Module:
    match run.towers[name]:
        case ImageTower() as config:
            return TimmTower(config, run.data.image_size)
        case TextTower() as config:
            return TextTransformer(config, vocab_size, run.data.context)
        case CacheTower():
            return CachedTower(cache_widths[name])

"""The model of a run: its towers, the heads on them, and one log-scale (and bias) per named scale."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from threetowers.trainer.config import CacheTower, ImageTower, TextTower, TrainConfig
from threetowers.trainer.model.cached import CachedTower
from threetowers.trainer.model.heads import build_head
from threetowers.trainer.model.image import TimmTower
from threetowers.trainer.model.initial_weights import load_initial
from threetowers.trainer.model.shared import share_blocks
from threetowers.trainer.model.text import TextTransformer


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

    def __init__(self, run: TrainConfig, vocab_size: int, cache_widths: Mapping[str, int]) -> None:
        """`cache_widths`: the embedding width of each cached tower, by the tower's name."""
        super().__init__()
        self.run = run
        self.towers = nn.ModuleDict(
            {name: _tower(run, name, vocab_size, cache_widths) for name in run.towers},
        )
        self._share()
        widths = {name: int(tower.width) for name, tower in self.towers.items()}  # type: ignore[arg-type]
        self.widths = widths  # of what every tower and head gives, by name
        self.heads = nn.ModuleDict()
        for name, head in run.heads.items():
            self.heads[name], widths[name] = build_head(head, widths[head.of], run.embed_dim)
        for name, term in run.terms.items():
            if widths[term.x] != widths[term.y]:
                raise ValueError(
                    f"terms.{name}: {term.x!r} has width {widths[term.x]}, {term.y!r} has {widths[term.y]}; "
                    f"give both a linear head, or set dim to the width of the headless one"
                )
        scales = run.scales()
        init = math.log(run.loss.scale_init)
        self.log_scales = nn.ParameterDict({s: nn.Parameter(torch.full((1,), init)) for s in scales})
        sigmoid = run.loss.kind == "sigmoid"
        biases = {s: nn.Parameter(torch.full((1,), run.loss.bias_init)) for s in scales} if sigmoid else {}
        self.biases = nn.ParameterDict(biases)
        for name in self.frozen:
            self.towers[name].requires_grad_(False)
        self.train()
        if not any(p.requires_grad for p in self.parameters()):
            raise ValueError("nothing is left to train: unfreeze a tower, or give one a linear head")

    @property
    def frozen(self) -> list[str]:
        """Names of the towers with weights that stay as they are."""
        return [name for name, tower in self.run.towers.items() if tower.kind != "cache" and tower.frozen]

    def train(self, mode: bool = True) -> "TowerModel":
        """As ever, but frozen towers stay in evaluation mode: no dropout, no new running statistics."""
        super().train(mode)
        for name in self.frozen:
            self.towers[name].eval()
        return self

    def load_initial_weights(self) -> None:
        """Give the towers the weights that their `init` names. Raises ValueError where these do not fit."""
        for name, tower in self.run.towers.items():
            if not isinstance(tower, CacheTower) and tower.init is not None:
                load_initial(self.towers[name], tower, f"towers.{name}.init")

    def checkpoint_activations(self) -> None:
        """Let towers keep less for backward, and compute it again. Raises ValueError for a tower that cannot."""
        for tower in self.towers.values():
            if not isinstance(tower, CachedTower):
                tower.set_grad_checkpointing()  # type: ignore[operator]

    def _share(self) -> None:
        for name, tower in self.run.towers.items():
            if not isinstance(tower, TextTower) or tower.share is None:
                continue
            receiver, donor = self.towers[name], self.towers[tower.share.tower]
            assert isinstance(receiver, TextTransformer)
            assert isinstance(donor, TimmTower)
            if donor.blocks is None:
                raise ValueError(f"towers.{name}.share: {tower.share.tower!r} is no timm vision transformer")
            share_blocks(receiver.blocks, donor.blocks, tower.share)

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
        frozen = set(self.frozen)
        dtype = next(self.parameters()).dtype  # that of all parameters; cached rows come in their own

        def value(name: str) -> Tensor:
            if name not in values:
                if name in self.towers:
                    with torch.set_grad_enabled(torch.is_grad_enabled() and name not in frozen):
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


def _tower(run: TrainConfig, name: str, vocab_size: int, cache_widths: Mapping[str, int]) -> nn.Module:
    match run.towers[name]:
        case ImageTower() as config:
            return TimmTower(config, run.data.image_size)
        case TextTower() as config:
            return TextTransformer(config, vocab_size, run.data.context_length)
        case CacheTower():
            return CachedTower(cache_widths[name])

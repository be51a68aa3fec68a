"""The model of a run: its towers, the heads on them, and one log-scale (and bias) per named scale."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import END
from threetowers.cache.encoders.tokenizers.tokenizer import Tokenizer
from threetowers.trainer.config import (
    CacheTower,
    HfTower,
    ImageTower,
    OpenClipTower,
    Precision,
    Term,
    TermTeacher,
    TextTower,
    TrainConfig,
)
from threetowers.trainer.model.head import build_head
from threetowers.trainer.model.initial.initial_weights import load_initial
from threetowers.trainer.model.initial.whole_model import load_whole_model
from threetowers.trainer.model.layers import Layers
from threetowers.trainer.model.precision import autocast, cast_parameters, float32_parameters
from threetowers.trainer.model.towers.cached_tower import CachedTower
from threetowers.trainer.model.towers.phi_s import has_hadamard_matrix
from threetowers.trainer.model.towers.shared_blocks import share_blocks
from threetowers.trainer.model.towers.text_transformer import TextTransformer
from threetowers.trainer.model.towers.timm_tower import TimmTower


@dataclass(frozen=True)
class Outputs:
    """Result of a forward pass: unit-norm embeddings (b, D) by head, log-scales [1] and biases [1] by scale."""

    embeddings: dict[str, Tensor]
    log_scales: dict[str, Tensor]
    biases: dict[str, Tensor]


class TowerModel(nn.Module):
    """The towers and heads of a run's config, with a learned temperature for each named scale.

    Every parameter has at least one dimension, scales included: DeepSpeed cannot hold 0-dimensional ones.
    """

    def __init__(
        self, config: TrainConfig, vocab_size: int | None, cache_widths: Mapping[str, int], end_id: int = END
    ) -> None:
        """Build the model with random weights.

        Args:
            config: The run.
            vocab_size: Rows of the token embedding; None in a run without a text tower of its own.
            cache_widths: Embedding width of each cached tower, by name.
            end_id: The token that ends a caption; by default that of our own tokenizers.

        Raises:
            ValueError: If towers, heads or terms do not fit together.
        """
        super().__init__()
        self.config = config
        self.precision: Precision | Literal["float16"] = config.engine.precision or "float32"
        self.towers = nn.ModuleDict()
        for name in config.towers:
            self.towers[name] = _build_tower(config, name, vocab_size, cache_widths, end_id)
        self._share_parameters()

        self.widths = {name: int(tower.width) for name, tower in self.towers.items()}  # type: ignore[arg-type]
        self.heads = nn.ModuleDict()
        for name, head in config.heads.items():
            self.heads[name], self.widths[name] = build_head(head, self.widths[head.of], config.embed_dim)
        for name, term in config.terms.items():
            self._check_widths(f"terms.{name}", term)
            for teacher_name, teacher in term.teachers.items():
                self._check_widths(f"terms.{name}.teachers.{teacher_name}", teacher)

        self.log_scales = nn.ParameterDict()
        self.biases = nn.ParameterDict()
        for name in config.scales():
            self.log_scales[name] = nn.Parameter(torch.full((1,), math.log(config.loss.scale_init)))
            if config.loss.kind == "sigmoid":
                self.biases[name] = nn.Parameter(torch.full((1,), config.loss.bias_init))

        for name, tower in config.towers.items():
            if isinstance(tower, CacheTower):
                continue
            if tower.frozen:
                self.towers[name].requires_grad_(False)
            elif tower.trainable_blocks is not None:
                self._freeze_lower_blocks(name, tower.trainable_blocks)
        kept = float32_parameters(self).keys()
        # In a list, which no module looks into: to take a parameter from its module in here would, under ZeRO 3, gather
        # it as one that this module uses.
        self._weights = [p for name, p in self.named_parameters() if name not in kept][:1]
        self.train()
        if not any(p.requires_grad for p in self.parameters()):
            raise ValueError("no parameter is left to train: unfreeze a tower, or give one a linear head")

    def _freeze_lower_blocks(self, name: str, trained: int) -> None:
        """Freeze a tower below its last `trained` blocks. Raises ValueError where it has fewer blocks, or none."""
        layers = self.layers_of(name, "trainable_blocks")
        if trained > layers.blocks:
            raise ValueError(
                f"towers.{name}.trainable_blocks: found {trained}, but the tower has {layers.blocks} blocks; lower it, "
                "or leave it out"
            )
        for parameter, number in layers.numbers.items():
            if number < layers.above - trained:
                self.towers[name].get_parameter(parameter).requires_grad_(False)

    def _check_widths(self, key: str, sides: Term | TermTeacher) -> None:
        x_width, y_width = self.widths[sides.x], self.widths[sides.y]
        if x_width == y_width:
            return
        remedy = "name heads of one width"
        if isinstance(sides, Term):
            remedy = "give both a linear head, or set embed_dim to the width of the one without a head"
        raise ValueError(f"{key}: {sides.x!r} has width {x_width}, {sides.y!r} has {y_width}; {remedy}")

    @property
    def frozen(self) -> list[str]:
        """Names of the towers whose weights are never updated; cached ones have none."""
        return [name for name, tower in self.towers.items() if _is_frozen(tower)]

    def train(self, mode: bool = True) -> Self:
        """Set the mode like `nn.Module.train`, but for what is frozen.

        A module whose parameters are all frozen stays in evaluation mode, whether its tower is frozen or a group of
        parameters with a learning rate of 0 holds it: no dropout, fixed statistics.
        """
        super().train(mode)
        for module in self.modules():
            if mode and module is not self and _is_frozen(module):
                module.eval()
        return self

    def set_precision(self, precision: Precision | Literal["float16"]) -> None:
        """Compute in this precision from now on, with weights of its type."""
        self.precision = precision
        cast_parameters(self, torch.float32 if precision == "mixed" else getattr(torch, precision))

    def layers_of(self, name: str, key: str) -> Layers:
        """Return the layers of a tower. Raises ValueError for a tower without blocks; `key`: what asks for them."""
        try:
            layers: Layers = self.towers[name].layers()  # type: ignore[operator]
        except ValueError as error:
            raise ValueError(f"towers.{name}.{key}: {error}; leave it out, or choose another model") from error
        return layers

    def layer_factors(self) -> dict[str, float]:
        """Return the factors of the learning rate in towers with `layer_decay`, by parameter.

        Raises:
            ValueError: Such a tower has no blocks.
        """
        factors = {}
        for name, tower in self.config.towers.items():
            if isinstance(tower, CacheTower) or tower.layer_decay == 1:
                continue
            layers = self.layers_of(name, "layer_decay")
            for parameter, number in layers.numbers.items():
                factors[f"towers.{name}.{parameter}"] = tower.layer_decay ** (layers.above - number)
        return factors

    def load_initial_weights(self, tokenizer: Tokenizer | None = None) -> list[str]:
        """Load the weights that `init` of the run, and those that `init` of its towers name.

        Args:
            tokenizer: The run's, which is compared with that of a whole model.

        Returns:
            What begins from what, what was inherited of larger towers, and which weights were resampled from what to
            what size.

        Raises:
            ValueError: If they do not fit.
        """
        notes = [] if self.config.init is None else load_whole_model(self, tokenizer)
        for name, tower in self.config.towers.items():
            if not isinstance(tower, CacheTower) and tower.init is not None:
                notes += load_initial(self.towers[name], tower, f"towers.{name}.init")
        return notes

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of each tower's blocks for backward. Raises ValueError for a tower that cannot."""
        for tower in self.towers.values():
            if not isinstance(tower, CachedTower):
                tower.set_grad_checkpointing()  # type: ignore[operator]

    def _share_parameters(self) -> None:
        for name, tower in self.config.towers.items():
            if not isinstance(tower, TextTower) or tower.share is None:
                continue
            receiver, donor = self.towers[name], self.towers[tower.share.tower]
            assert isinstance(receiver, TextTransformer)
            assert isinstance(donor, TimmTower)
            if donor.blocks is None:
                raise ValueError(
                    f"towers.{name}.share.tower: {tower.share.tower!r} is not a timm vision transformer; share with "
                    "one that is"
                )
            share_blocks(receiver.blocks, donor.blocks, tower.share)

    def forward(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """Return everything that the terms need. `inputs`: by tower, images, tokens or cached rows."""
        heads = dict.fromkeys(head for term in self.config.terms.values() for head in term.all_heads)
        # The loss takes its fast products by this type: under autocast that of the products, else that of the weights.
        dtype = torch.bfloat16 if self.precision == "mixed" else self._weight.dtype
        # Parameters leave through the output, not by reference: under ZeRO 3 they are complete only in here.
        return Outputs(
            {name: x_bD.to(dtype) for name, x_bD in self.embed(inputs, heads).items()},
            {name: clamp_log_scale(p, self.config.loss.scale_max) for name, p in self.log_scales.items()},
            {name: p * 1.0 for name, p in self.biases.items()},
        )

    def embed(self, inputs: Mapping[str, Tensor], heads: Iterable[str]) -> dict[str, Tensor]:
        """Return unit-norm embeddings (b, D), float32, of the named heads; runs only the towers that these stand on."""
        features: dict[str, Tensor] = {}
        frozen = set(self.frozen)
        dtype = self._weight.dtype

        def features_of(name: str) -> Tensor:
            """Return the output of a tower or head, computed once."""
            if name in features:
                return features[name]
            if name in self.towers:
                with torch.set_grad_enabled(torch.is_grad_enabled() and name not in frozen):
                    features[name] = self.towers[name](inputs[name]).to(dtype)
            else:
                features[name] = self.heads[name](features_of(self.config.heads[name].of))
            return features[name]

        with autocast(self.precision == "mixed", self._weight.device):
            computed = {name: features_of(name) for name in heads}
        return {name: F.normalize(x_bD.float(), dim=-1) for name, x_bD in computed.items()}

    def features(self, inputs: Mapping[str, Tensor], tower: str) -> Tensor:
        """Return the output of a tower (b, width), before heads and normalisation."""
        with autocast(self.precision == "mixed", self._weight.device):
            features_bw: Tensor = self.towers[tower](inputs[tower])
        return features_bw

    @property
    def _weight(self) -> Tensor:
        """One of the parameters: all have its device, and but for `float32_parameters` its type."""
        return self._weights[0]

    def encode_image(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the embeddings (b, D) of the deployed image head, unit norm."""
        return self.embed(inputs, [self.config.deploy.image])[self.config.deploy.image]

    def encode_text(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the embeddings (b, D) of the deployed text head, unit norm."""
        return self.embed(inputs, [self.config.deploy.text])[self.config.deploy.text]


def clamp_log_scale(log_scale: Tensor, scale_max: float) -> Tensor:
    """Return log_scale, at most log(scale_max), with the gradient passed straight through.

    A plain clamp has no gradient above its bound, so a scale beyond it could never return.
    """
    excess = (log_scale - math.log(scale_max)).clamp(min=0)
    return log_scale - excess.detach()


def _is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, none of which is trained."""
    has_parameters = False
    for p in module.parameters():
        if p.requires_grad:
            return False
        has_parameters = True
    return has_parameters


def _build_tower(
    config: TrainConfig, name: str, vocab_size: int | None, cache_widths: Mapping[str, int], end_id: int
) -> nn.Module:
    match config.towers[name]:
        case ImageTower() as tower:
            return TimmTower(tower, config.data.side)
        case TextTower() as tower:
            assert vocab_size is not None
            return TextTransformer(tower, vocab_size, config.data.context_length, end_id)
        case OpenClipTower() | HfTower() as tower:
            return _library_tower(config, tower, vocab_size, end_id)
        case CacheTower() as tower:
            width = cache_widths[name]
            if tower.standardize == "phi-s" and not has_hadamard_matrix(width):
                raise ValueError(
                    f"towers.{name}.standardize: phi-s needs a Hadamard matrix of the rows' width, and none of {width} "
                    "is known; set moments or none"
                )
            return CachedTower(width, tower.standardize)


def _library_tower(
    config: TrainConfig, tower: OpenClipTower | HfTower, vocab_size: int | None, end_id: int
) -> nn.Module:
    """Return a tower of another library. A run without one imports nothing of it."""
    data = config.data
    if isinstance(tower, OpenClipTower):
        from threetowers.trainer.model.towers.open_clip_tower import OpenClipImageTower, OpenClipTextTower

        if tower.of == "image":
            return OpenClipImageTower(tower, data.side)
        assert vocab_size is not None
        return OpenClipTextTower(tower, vocab_size, data.context_length, data.vocab_size)

    from threetowers.trainer.model.towers.hf_tower import HfImageTower, HfTextTower

    if tower.of == "image":
        return HfImageTower(tower, data.side)
    assert vocab_size is not None
    return HfTextTower(tower, vocab_size, data.context_length, end_id)

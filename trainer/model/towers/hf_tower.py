"""Models of transformers as towers: of images, or of text.

Below `model.`, tensors have transformers' names.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.huggingface.architecture import (
    TYPE,
    architecture_keys,
    build_architecture,
    is_causal,
    model_files,
    read_architecture,
    stated_pooling,
)
from threetowers.cache.encoders.huggingface.image_model import HfImageModel
from threetowers.cache.encoders.huggingface.outputs import own_pooler
from threetowers.cache.encoders.huggingface.text_model import TextOutputs, own_pooling, pool_text
from threetowers.cache.encoders.huggingface.tokenizer import length_limit
from threetowers.cache.encoders.weights_file import one_line
from threetowers.trainer.config import HfPooling, HfTower, TrainConfig
from threetowers.trainer.model.layers import Layers

IMAGE_FEATURES = {None: "pooled", "pooler": "pooled", "cls": "cls", "mean": "mean_patch"}  # by `pool`
# Families in which every token sees every other, and attention takes a mask of queries and keys as it is. Of others the
# mask's numbers are looked at, for which the host waits.
EVERY_TOKEN = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")
NEUTRAL = 0.5  # mean and standard deviation of pixels, where no weights say others


class HfModelTower(nn.Module):
    """What the towers of both sides share: the model and its blocks."""

    def __init__(self, config: HfTower) -> None:
        """Build the model with random weights. Raises ValueError if transformers cannot, or not of this side."""
        super().__init__()
        self.architecture = read_architecture(config.model, config.config, config.of)
        self.model: Any = build_architecture(self.architecture, config.of)
        self.model.eval()  # while it is asked what it gives; the run's model says when it is trained

    @property
    def blocks(self) -> nn.ModuleList | None:
        """The model's blocks, or its stages; None where it has no series of its `num_hidden_layers`."""
        number = getattr(self.architecture, "num_hidden_layers", None)
        series = (module for module in self.model.modules() if isinstance(module, nn.ModuleList))
        return next((module for module in series if len(module) == number), None)

    def layers(self) -> Layers:
        """Return the tower's layers, by the order of its parameters. Raises ValueError for a model without blocks."""
        blocks = self.blocks
        if not blocks:
            raise ValueError(f"{type(self.model).__name__} has no series of blocks")
        path = next(path for path, module in self.named_modules() if module is blocks)
        numbers: dict[str, int] = {}
        reached = 0
        for name, _ in self.named_parameters():
            if name.startswith(f"{path}."):
                reached = 1 + int(name.removeprefix(f"{path}.").partition(".")[0])
                numbers[name] = reached
            elif reached == 0:
                numbers[name] = 0
            else:  # behind the blocks: a norm counts to the last one
                numbers[name] = len(blocks) + (0 if "norm" in name.lower() else 1)
        return Layers(numbers, len(blocks))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for backward, and recompute the rest. Raises ValueError if it cannot."""
        if not enable:
            self.model.activation_checkpointing_disable()
            return
        try:
            self.model.activation_checkpointing_enable()
            self.model.disable_input_require_grads()  # for adapters; it would send gradients through frozen blocks
        except ValueError as error:
            raise ValueError(
                f"engine.activation_checkpointing: this model of transformers has none ({one_line(error)}); set it to "
                "false, or choose another model"
            ) from error

    def _leave_out_dense_pooler(self) -> bool:
        """Leave out a pooler like BERT's, which was trained for another task, and return whether there was one."""
        if own_pooler(self.model):
            return False
        self.model.pooler = None
        return True


class HfImageTower(HfModelTower):
    """Images (b, 3, H, W) uint8 -> features (b, width)."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: HfTower, image_size: int) -> None:
        """Build the model with random weights.

        Raises:
            ValueError: transformers cannot build it, it is no model of images, it takes none of this size, or it does
                not pool so.
        """
        super().__init__(config)
        dense = self._leave_out_dense_pooler()
        for parameter, p in self.model.named_parameters():
            if parameter.endswith("mask_token"):  # stands for patches that are hidden in pretraining, and for none here
                p.requires_grad_(False)
        for name in ("mean", "std"):
            # Kept with the weights, whose image processor says how their images are normalised.
            self.register_buffer(name, torch.full((1, 3, 1, 1), NEUTRAL))
        with torch.no_grad():
            try:
                # In a list, which no module looks into: the parameters are those of the model.
                self._reader = [HfImageModel(self.model, (image_size, image_size), config.description)]
            except (RuntimeError, ValueError, TypeError) as error:
                raise ValueError(
                    f"image tower: {config.description} does not take {image_size}-pixel images ({one_line(error)}); "
                    "change data.image_size"
                ) from error
            self._feature = IMAGE_FEATURES.get(config.pool, "")
            offered = [pool for pool, name in IMAGE_FEATURES.items() if pool and name in self._reader[0].features]
            if dense:
                offered.remove("pooler")
            if config.pool is not None and config.pool not in offered:
                raise ValueError(f"image tower: pool: {config.pool}: {config.description} offers {', '.join(offered)}")
            self.width = int(self.forward_normalized(torch.zeros(1, 3, image_size, image_size)).shape[1])

    def forward_normalized(self, x_b3HW: Tensor) -> Tensor:
        """Return features (b, width) of images less `mean`, divided by `std`."""
        features_bw: Tensor = self._reader[0](x_b3HW, (self._feature,))[0]
        return features_bw

    def forward(self, images_b3HW: Tensor) -> Tensor:
        """Return features (b, width)."""
        x_b3HW = (images_b3HW.to(torch.float32) / 255 - self.mean) / self.std
        return self.forward_normalized(x_b3HW.to(self.model.dtype))


class HfTextTower(HfModelTower):
    """Tokens (b, L) int64 -> features (b, width): the states of a text model, pooled."""

    def __init__(self, config: HfTower, vocab_size: int, context_length: int, end_id: int) -> None:
        """Build the model with random weights.

        Args:
            config: The tower.
            vocab_size: Number of ids of the tokenizer.
            context_length: Tokens that a caption has at most.
            end_id: The token that ends a caption; what is behind the first one is padding, whatever its id.

        Raises:
            ValueError: transformers cannot build it, it is no model of text, it does not pool so, or it has too few
                token embeddings or positions.
        """
        super().__init__(config)
        self.end_id = end_id
        rows = self.model.get_input_embeddings().num_embeddings
        if rows < vocab_size:
            raise ValueError(
                f"text tower: {config.description} has {rows:,} token embeddings, but data.tokenizer has "
                f"{vocab_size:,} ids; name the model's own tokenizer, as hf:FOLDER"
            )
        limit = length_limit(None, self.architecture, self.model)
        if limit is not None and limit < context_length:
            raise ValueError(
                f"text tower: {config.description} has {limit} positions, found data.context_length: {context_length}; "
                "lower it"
            )
        self._causal = is_causal(self.model)
        fused = self.model.config._attn_implementation == "sdpa"
        self._every_token = fused and not self._causal and self.architecture.model_type in EVERY_TOKEN
        with torch.no_grad():
            probe = self._outputs(torch.zeros(1, 1, dtype=torch.int64), None)
        self.pool = self._pooling(config, probe.pooler_bD is not None)
        if self.pool != "pooler":
            self._leave_out_dense_pooler()
        self.width = int(probe.states_bLD.shape[-1])

    def _pooling(self, config: HfTower, has_pooler: bool) -> str:
        """Return how states become a vector: as the config says, or else the model's files, or else its kind."""
        pool: str | None = config.pool or stated_pool(config)
        if pool is None:
            pool = own_pooling(self.model, has_pooler, self._causal)
            # The own vector of a decoder, as CLIP's, is its state at the end token, whose id is the tokenizer's.
            return "last" if self._causal else pool
        if (pool == "pooler" and not has_pooler) or (pool == "cls" and self._causal):
            reason = "its first token sees no other" if pool == "cls" else "it has none"
            raise ValueError(f"text tower: pool: {pool}: {config.description}: {reason}; set mean, last or null")
        return pool

    def forward(self, tokens_bL: Tensor) -> Tensor:
        """Return features (b, width), float32 but where they are the model's own vector."""
        end_b = (tokens_bL == self.end_id).int().argmax(1)
        mask_bL = torch.arange(tokens_bL.shape[1], device=tokens_bL.device) <= end_b[:, None]
        return pool_text(self._outputs(tokens_bL, mask_bL), mask_bL, self.pool)

    def _outputs(self, tokens_bL: Tensor, mask_bL: Tensor | None) -> TextOutputs:
        """Return what the model gives for tokens, of which the mask is true where there is no padding."""
        attention = mask_bL
        if self._causal:
            attention = None  # padding is behind the caption, and no token sees a later one
        elif mask_bL is not None:
            attention = mask_bL[:, None, None, :] if self._every_token else mask_bL.to(torch.int64)
        output = self.model(input_ids=tokens_bL, attention_mask=attention)
        return TextOutputs(output.last_hidden_state, getattr(output, "pooler_output", None), None)


def stated_pool(config: HfTower) -> HfPooling | None:
    """Return the pooling that the files of a text tower's model state; None where they do not, or are not read."""
    if config.of != "text" or config.model is None or TYPE in config.config:
        return None
    return cast("HfPooling | None", stated_pooling(model_files(config.model)))


def resolve_hf_towers(config: TrainConfig) -> TrainConfig:
    """Return a config whose towers of transformers need no files: with the architecture that these state.

    Raises:
        ValueError: The files cannot be read.
    """
    towers = dict(config.towers)
    for name, tower in towers.items():
        if not isinstance(tower, HfTower):
            continue
        try:
            architecture = architecture_keys(read_architecture(tower.model, tower.config, tower.of))
            towers[name] = replace(tower, config=architecture, pool=tower.pool or stated_pool(tower))
        except ValueError as error:
            raise ValueError(f"towers.{name}: {error}") from error
    return replace(config, towers=towers)

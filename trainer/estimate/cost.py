"""The cost of a run, by arithmetic: a model on the meta device has shapes but no values, so any size takes seconds.

FLOPs are counted by torch's own counter (a multiplication and an addition are two). Activation bytes are those that
autograd would keep for backward, each storage once, with attention as the fused kernels compute it.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from threetowers.cache.encoders.names import EncoderName
from threetowers.cache.format.dtypes import Float16Dtype
from threetowers.cache.format.manifest import Manifest
from threetowers.trainer.config import ConfigError, TrainConfig
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.optimizer.optimizer import freeze

logger = logging.getLogger(__name__)

TIMM = "timm:"  # begins the name of an encoder whose cost can be counted without its weights


@dataclass(frozen=True)
class TeacherCost:
    """The encoder of a cached tower; `flops` of a forward pass on one sample, None where they cannot be counted."""

    encoder: str
    dim: int
    row_bytes: int
    flops: int | None

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> Self:
        """Return the cost of the teacher that built a cache."""
        flops = None
        if manifest.preprocessing is not None:
            flops = _timm_flops(manifest.encoder, manifest.preprocessing.input_size)
        return cls(manifest.encoder, manifest.dim, manifest.storage_dtype.row_bytes(manifest.dim), flops)

    @classmethod
    def of_width(cls, encoder: str | None, dim: int) -> Self:
        """Return the cost of the teacher of a cache yet to be built, in float16, whose rows have this width."""
        flops = None
        if encoder is not None:
            name = EncoderName.parse(encoder)
            flops = _timm_flops(name.model, _side(name))
        return cls(encoder or "a cache", dim, Float16Dtype().row_bytes(dim), flops)

    @classmethod
    def from_encoder(cls, encoder: str) -> Self:
        """Return the cost of the teacher of a cache yet to be built, in float16.

        Args:
            encoder: As `CacheTower.encoder`; without a size, at the model's own.

        Raises:
            ConfigError: If it is no model of timm, or timm cannot run it without numbers.
            ValueError: If it is no name of an encoder.
        """
        name = EncoderName.parse(encoder)
        try:
            dim, flops = _timm_cost(name.model, _side(name))
        except ConfigError:
            raise
        except Exception as error:  # a model's own code may raise anything
            raise ConfigError(
                f"encoder {encoder!r}: the width of its rows is unknown, timm cannot run it on the meta device "
                f"({error}); give the tower's dim, or build its cache"
            ) from error
        return cls(encoder, dim, Float16Dtype().row_bytes(dim), flops)


@dataclass(frozen=True)
class TowerCost:
    """A tower with weights: its parameters, and FLOPs of its passes over one sample, None where not counted."""

    parameters: int
    shared: int  # those that belong to an earlier tower too
    flops: int | None  # of the forward pass
    backward_flops: int | None


@dataclass(frozen=True)
class StateMemory:
    """Bytes of a model's training state on one rank."""

    weights: int  # with the bfloat16 copies of all of them that autocast makes for a step
    gradients: int
    optimizer: int  # moments, and a float32 copy of the weights where the engine keeps one

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer


def meta_model(config: TrainConfig, vocab_size: int | None, teachers: Mapping[str, TeacherCost]) -> TowerModel:
    """Return the run's model on the meta device, with weights of the type they are trained in."""
    with torch.device("meta"):
        model = TowerModel(config, vocab_size, {name: teacher.dim for name, teacher in teachers.items()})
    freeze(model, config.optim)
    model.set_precision(model.precision)
    return model


def tower_costs(model: TowerModel) -> dict[str, TowerCost]:
    """Return the cost of each tower that has weights, in the config's order."""
    costs: dict[str, TowerCost] = {}
    counted: set[int] = set()
    inputs = meta_inputs(model, 1)
    training = model.training
    model.eval()
    for name, tower in model.towers.items():
        if model.config.towers[name].reads == "rows":
            continue
        sizes = {id(p): p.numel() for p in tower.parameters()}
        shared = sum(size for key, size in sizes.items() if key in counted)
        counted |= sizes.keys()
        costs[name] = TowerCost(sum(sizes.values()), shared, *_tower_flops(name, tower, inputs[name]))
    model.train(training)
    return costs


class TrainingFlops:
    """FLOPs of one sample's training step, the loss aside, by the length of its batch's captions."""

    def __init__(self, model: TowerModel, costs: Mapping[str, TowerCost]) -> None:
        """Count those of a model from `meta_model`, with the costs of its towers."""
        self._model = model
        self._costs = costs
        self._by_length = {model.config.data.context_length: training_flops(model, costs)}

    def of(self, length: int) -> int | None:
        """Return the FLOPs with captions padded to so many tokens; None where a tower's are not counted."""
        if length not in self._by_length:
            costs = dict(self._costs)
            for name in self._model.config.towers_reading("tokens"):
                tokens_1L = torch.empty(1, length, dtype=torch.int64, device="meta")
                flops, backward_flops = _tower_flops(name, self._model.towers[name], tokens_1L)
                costs[name] = replace(costs[name], flops=flops, backward_flops=backward_flops)
            self._by_length[length] = training_flops(self._model, costs)
        return self._by_length[length]


def training_flops(model: TowerModel, costs: Mapping[str, TowerCost]) -> int | None:
    """Return FLOPs of one sample's training step, the loss aside: a backward pass costs two forward passes.

    A frozen tower has no backward pass, and one with frozen blocks none below them; recomputing activations and
    micro-batches cost one more forward pass each. None where a tower's FLOPs are not counted.
    """
    engine = model.config.engine
    head_passes = 3 + int(engine.micro_batch_size is not None)
    forward_passes = head_passes - 2 + int(engine.activation_checkpointing)
    config = model.config
    heads = 0
    for name, head in model.heads.items():
        matrices = sum(p.numel() for p in head.parameters() if p.ndim > 1)
        heads += 2 * matrices * config.captions_of(config.root_of(name))
    towers = 0
    for name, cost in costs.items():
        if cost.flops is None or cost.backward_flops is None:
            return None
        towers += cost.flops * (1 if name in model.frozen else forward_passes) + cost.backward_flops
    return towers + heads * head_passes


def state_memory(config: TrainConfig, model: nn.Module, world: int) -> StateMemory:
    """Return bytes of weights, gradients and optimizer on one rank, as the ZeRO stage partitions them over `world`.

    Communication buffers and fragmentation come on top.
    """
    stage = config.engine.zero_stage
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    half = config.engine.precision == "bfloat16"
    width = 2 if half else 4
    copy = 4 if stage in (1, 2) else 0  # at stage 3 the float32 shares of the weights are the optimizer's
    casts = 2 * total if config.engine.precision == "mixed" else 0
    moments = 4 if config.optim.name == "adafactor" else 8  # adafactor's second moments, rows and columns, are small
    return StateMemory(
        weights=total * width // (world if stage == 3 else 1) + casts,
        gradients=trained * width // (world if stage >= 2 else 1),
        optimizer=trained * (moments + copy) // (world if stage >= 1 else 1),
    )


def activation_bytes(model: TowerModel) -> int | None:
    """Return the bytes that autograd keeps for backward for one more sample of a batch, None if not countable."""
    return _count_or_none(
        "memory of activations", lambda: (_bytes_for_backward(model, 4) - _bytes_for_backward(model, 2)) // 2
    )


def meta_inputs(model: TowerModel, samples: int) -> dict[str, Tensor]:
    """Return inputs of a forward pass on the meta device, by tower; as many captions of each sample as there may be."""
    data = model.config.data
    inputs = {}
    for name, tower in model.config.towers.items():
        match tower.reads:
            case "images":
                shape, dtype = [3, data.side, data.side], torch.uint8
            case "tokens":
                shape, dtype = [data.context_length], torch.int64
            case "rows":
                shape, dtype = [model.widths[name]], torch.float32
        rows = samples * model.config.captions_of(name)
        inputs[name] = torch.empty([rows, *shape], dtype=dtype, device="meta")
    return inputs


class MetaAutocast(TorchFunctionMode):
    """Computes products in bfloat16, as autocast does on a GPU; torch has none for the meta device."""

    PRODUCTS = frozenset(
        {
            F.linear,
            F.conv1d,
            F.conv2d,
            F.conv3d,
            torch.matmul,
            Tensor.matmul,
            Tensor.__matmul__,
            torch.bmm,
            torch.einsum,
        }
        | {F.scaled_dot_product_attention}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.PRODUCTS:
            args = [_in_bfloat16(value) for value in args]
            kwargs = {name: _in_bfloat16(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _in_bfloat16(value: Any) -> Any:
    """Return float32 tensors, and lists of them, in bfloat16, and anything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(_in_bfloat16(item) for item in value)
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


class FusedAttention(TorchFunctionMode):
    """Makes attention keep what the fused kernels keep; on the meta device torch would decompose it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention or not _has_fused_kernel(*args[:3]):
            return func(*args, **kwargs)
        mask = kwargs.pop("attn_mask", None)
        if mask is not None:
            mask = torch.empty(mask.shape, dtype=args[0].dtype, device="meta")
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(*args, kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False), attn_mask=mask)[0]


def _has_fused_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the fused kernels take these: (b, heads, L, d), with one number of heads and one head width."""
    return query.ndim == 4 and query.shape[:2] == key.shape[:2] and query.shape[-1] == value.shape[-1]


def _bytes_for_backward(model: TowerModel, samples: int) -> int:
    seen = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept += storage.nbytes()
        return tensor

    products = MetaAutocast() if model.precision == "mixed" else nullcontext()
    with saved_tensors_hooks(pack, lambda tensor: tensor), products, FusedAttention():
        outputs = model(meta_inputs(model, samples))
    del outputs  # alive until here, so that no storage reuses an address
    return kept


def _count_or_none(what: str, count: Callable[[], int]) -> int | None:
    """Return a count; None, with a warning, where the model's own code cannot be run without numbers."""
    try:
        return count()
    except Exception as error:  # it may raise anything, and arithmetic for the reader must not stop a run
        logger.warning("%s: not counted (%s: %s)", what, type(error).__name__, error)
        return None


def _flops(module: nn.Module, value: Tensor) -> int:
    """Return the FLOPs of a forward pass."""
    # With gradients: the counter hooks itself to the graph of whatever requires one, such as the latent query of an
    # attention pooling, which is a parameter that goes into a module.
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        module(value)
    return int(counter.get_total_flops())


def _tower_flops(name: str, tower: nn.Module, value: Tensor) -> tuple[int | None, int | None]:
    """Return the FLOPs of a tower's forward pass, and of its backward pass."""
    what = f"FLOPs of tower {name}"
    flops = _count_or_none(what, partial(_flops, tower, value))
    trained = [p.requires_grad for p in tower.parameters()]
    if flops is None or all(trained):
        return flops, None if flops is None else 2 * flops
    return flops, _count_or_none(what, partial(_backward_flops, tower, value)) if any(trained) else 0


def _backward_flops(module: nn.Module, value: Tensor) -> int:
    """Return the FLOPs of a backward pass through a module of which some parameters are frozen."""
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        features = module(value)
        forward = int(counter.get_total_flops())
        torch.autograd.grad(features.sum(), [p for p in module.parameters() if p.requires_grad], allow_unused=True)
        return int(counter.get_total_flops()) - forward


def _side(name: EncoderName) -> tuple[int, int] | None:
    return None if name.size is None else (name.size, name.size)


def _timm_flops(encoder: str, size: tuple[int, int] | None) -> int | None:
    """Return the forward FLOPs of an encoder at an image size; None where it is none of timm, or not countable."""
    if not encoder.startswith(TIMM):
        return None
    return _count_or_none(f"FLOPs of {encoder}", lambda: _timm_cost(encoder, size)[1])


@cache
def _timm_cost(encoder: str, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the feature width and the forward FLOPs of `timm:NAME` at an image size; None: the model's own."""
    import timm

    if not encoder.startswith(TIMM):
        raise ConfigError(
            f"encoder {encoder!r}: the width of its rows is unknown; give the tower's dim, or build its cache"
        )
    name = encoder.removeprefix(TIMM)
    if not timm.is_model(name):
        raise ConfigError(f"encoder {encoder!r} is unknown to timm {timm.__version__}; see timm.list_models()")
    own = tuple(timm.get_pretrained_cfg(name).to_dict()["input_size"][1:])
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0).eval()
        if size is not None and size != own and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=size)
        pixels = torch.empty(1, 3, *(size or own))
        with torch.no_grad():
            width = int(model(pixels).shape[1])
        return width, _flops(model, pixels)

"""DeepSpeed settings of the user's own: which are taken, and which the trainer sets itself.

DeepSpeed takes any key, silently ignores those that it does not know, and lets some of them change what a run
computes. So only settings of how a step is executed and watched are taken.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from threetowers.trainer.config.checks import ConfigError

KEY = "engine.deepspeed_extra"

TAKEN = (
    "comet",
    "communication_data_type",
    "comms_logger",
    "csv_monitor",
    "memory_breakdown",
    "wandb",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)

# What the trainer decides, by the key that decides it.
OWNED = {
    "activation_checkpointing": "engine.activation_checkpointing",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "checkpoint": "checkpoint",
    "data_types": "engine.precision",
    "flops_profiler": "log.profile",
    "fp16": "engine.precision",
    "gradient_accumulation_steps": "engine.micro_batch_size",
    "gradient_clipping": "optim.grad_clip_norm",
    "managed_gradient_accumulation": "engine.micro_batch_size",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "steps_per_print": "log.every_steps",
    "tensorboard": "log.tensorboard",
    "torch_autocast": "engine.precision",
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "engine.micro_batch_size",
    "wall_clock_breakdown": "log.profile",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.zenflow": "optim",
}


def check_deepspeed_extra(extra: Mapping[str, Any], stage: int) -> None:
    """Check `engine.deepspeed_extra`, by name and with DeepSpeed's own config.

    Args:
        extra: The settings.
        stage: The ZeRO stage that they are for.

    Raises:
        ConfigError: A setting is the trainer's own, is not taken, or has a value that DeepSpeed refuses.
    """
    if not extra:
        return
    zero = extra.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ConfigError(
            f"{KEY}.zero_optimization: found {zero!r}, expected a mapping of settings; the stage is engine.zero_stage"
        )
    for name in [*extra, *(f"zero_optimization.{name}" for name in zero)]:
        if name in OWNED:
            raise ConfigError(f"{KEY}.{name}: the trainer sets it; leave it out and use {OWNED[name]}")
    for name in extra:
        if name not in TAKEN:
            close = difflib.get_close_matches(name, TAKEN, n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"{KEY}.{name}: not a setting that is taken; {meant}Taken are: {', '.join(TAKEN)}")
    _check_values(extra, stage)


def _check_values(extra: Mapping[str, Any], stage: int) -> None:
    """Let DeepSpeed read the settings, and check the switches, which it takes as they are."""
    from deepspeed.runtime.config import DeepSpeedConfig

    plain: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    defaults = vars(DeepSpeedConfig(plain))
    for name, value in extra.items():
        default = defaults.get(name)
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ConfigError(f"{KEY}.{name}: found {value!r}, expected true or false")
    zero = dict(extra.get("zero_optimization", {})) | {"stage": stage}
    try:
        DeepSpeedConfig(plain | dict(extra) | {"zero_optimization": zero})
    except Exception as error:  # a pydantic error, an assertion or an error of DeepSpeed's own
        reason = " ".join(str(error).split())
        raise ConfigError(f"{KEY}: DeepSpeed does not take {dict(extra)}: {reason}; change or remove it") from error

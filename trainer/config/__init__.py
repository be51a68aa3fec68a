"""The config of a run: its keys, how it is loaded, and what is refused.

schema.py           the keys, their types, defaults and descriptions
parsing.py          YAML to config: base, variant and overrides
checks.py           what the types cannot express: references between keys, and combinations that cannot be run
deepspeed_extra.py  the DeepSpeed settings that a config may hold
documentation.py    the reference of all keys, docs/config.md
"""

from threetowers.trainer.config.checks import ConfigError
from threetowers.trainer.config.parsing import dump, load_config, parse
from threetowers.trainer.config.schema import (
    Augment,
    CacheTower,
    Checkpoint,
    Data,
    Deploy,
    Duration,
    Engine,
    Head,
    ImageTower,
    Log,
    Loss,
    OnlineEvaluation,
    Optim,
    Pairing,
    ParameterGroup,
    Precision,
    Share,
    Specialize,
    Standardization,
    Term,
    TermTeacher,
    TextTower,
    Tower,
    TrainConfig,
    TrainDataset,
)

__all__ = [
    "Augment",
    "CacheTower",
    "Checkpoint",
    "ConfigError",
    "Data",
    "Deploy",
    "Duration",
    "Engine",
    "Head",
    "ImageTower",
    "Log",
    "Loss",
    "OnlineEvaluation",
    "Optim",
    "Pairing",
    "ParameterGroup",
    "Precision",
    "Share",
    "Specialize",
    "Standardization",
    "Term",
    "TermTeacher",
    "TextTower",
    "Tower",
    "TrainConfig",
    "TrainDataset",
    "dump",
    "load_config",
    "parse",
]

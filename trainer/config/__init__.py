"""The config of a run: its keys, how it is loaded, and what is refused.

schema.py           the keys, their types, defaults and descriptions
towers.py           the keys of each kind of tower, and what the trainer asks of a tower of any kind
values.py           the values that keys hold
parsing.py          YAML to config: base, variant and overrides
checks.py           what the types cannot express: references between keys, and combinations that cannot be run
deepspeed_extra.py  the DeepSpeed settings that a config may hold
documentation.py    the reference of all keys, docs/config.md
"""

from threetowers.trainer.config.checks import ConfigError
from threetowers.trainer.config.parsing import dump, load_config, parse
from threetowers.trainer.config.schema import (
    Augment,
    Checkpoint,
    Data,
    Deploy,
    Duration,
    Engine,
    Head,
    Log,
    Loss,
    OnlineEvaluation,
    Optim,
    Pairing,
    ParameterGroup,
    Precision,
    Term,
    TermTeacher,
    TrainConfig,
    TrainDataset,
)
from threetowers.trainer.config.towers import (
    CacheTower,
    HfPooling,
    HfTower,
    ImageTower,
    Inputs,
    OpenClipTower,
    Share,
    Specialize,
    Standardization,
    TextTower,
    Tower,
    WeightedTower,
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
    "HfPooling",
    "HfTower",
    "ImageTower",
    "Inputs",
    "Log",
    "Loss",
    "OnlineEvaluation",
    "OpenClipTower",
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
    "WeightedTower",
    "dump",
    "load_config",
    "parse",
]

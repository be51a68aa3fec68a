"""Embedding caches and a distillation trainer for three-tower contrastive vision-language models.

    import threetowers as tt

    cache = tt.EmbeddingCache.open("runs/emoji/cache")
    config = tt.load_config("configs/emoji/3t.yaml")
    tt.train(config)
    model = tt.load_model("runs/emoji/3t")
    tt.evaluate(["runs/emoji/3t"], ["configs/eval/emoji-styles.yaml"], "runs/report")

Names are imported when they are first used, so that `import threetowers` and `threetowers --help` are quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from threetowers.cache.builder.build import build_cache as build_cache
    from threetowers.cache.builder.build_config import BuildConfig as BuildConfig
    from threetowers.cache.read.embedding_cache import EmbeddingCache as EmbeddingCache
    from threetowers.eval.encoders.load import load_encoder as load_encoder
    from threetowers.eval.suite import evaluate as evaluate
    from threetowers.kernels.contrastive import contrastive_loss as contrastive_loss
    from threetowers.kernels.contrastive import contrastive_losses as contrastive_losses
    from threetowers.kernels.distillation import distillation_loss as distillation_loss
    from threetowers.kernels.distillation import distillation_losses as distillation_losses
    from threetowers.trainer.config import load_config as load_config
    from threetowers.trainer.export.trained_model import load_model as load_model
    from threetowers.trainer.train import train as train

__version__ = "0.2.0"

_MODULES = {
    "BuildConfig": "threetowers.cache.builder.build_config",
    "EmbeddingCache": "threetowers.cache.read.embedding_cache",
    "build_cache": "threetowers.cache.builder.build",
    "contrastive_loss": "threetowers.kernels.contrastive",
    "contrastive_losses": "threetowers.kernels.contrastive",
    "distillation_loss": "threetowers.kernels.distillation",
    "distillation_losses": "threetowers.kernels.distillation",
    "evaluate": "threetowers.eval.suite",
    "load_config": "threetowers.trainer.config",
    "load_encoder": "threetowers.eval.encoders.load",
    "load_model": "threetowers.trainer.export.trained_model",
    "train": "threetowers.trainer.train",
}

__all__ = [
    "BuildConfig",
    "EmbeddingCache",
    "__version__",
    "build_cache",
    "contrastive_loss",
    "contrastive_losses",
    "distillation_loss",
    "distillation_losses",
    "evaluate",
    "load_config",
    "load_encoder",
    "load_model",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names are {sorted(_MODULES)}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return sorted(__all__)

"""Loading what transformers reads from a folder or its hub: silently, without code of the hub, faults in one line."""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from torch import nn

from threetowers.cache.encoders.names import EncoderName
from threetowers.cache.encoders.weights_file import one_line

LOGGERS = ("transformers", "huggingface_hub", "sentence_transformers")
T = TypeVar("T")


@dataclass(frozen=True)
class ModelFiles:
    """Where the files of a model are.

    Attributes:
        source: A folder, or a name on the hub.
        revision: Of the hub; None: its main branch.
    """

    source: str
    revision: str | None = None

    @classmethod
    def of(cls, name: EncoderName) -> Self:
        """Return the files that an encoder's name stands for: its weights are a folder that holds a copy of them."""
        source = name.weights or name.name
        if Path(source).is_dir():
            return cls(source)
        if name.weights or source.startswith((".", "/", "~")):
            raise ValueError(f"{name}: no such folder: {source}")
        repository, _, revision = source.partition("@")
        return cls(repository, revision or None)

    @property
    def folder(self) -> Path | None:
        """The folder; None for a name on the hub."""
        return Path(self.source) if Path(self.source).is_dir() else None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that all loading functions of transformers take for it."""
        found: dict[str, Any] = {"trust_remote_code": False}
        if self.folder is not None:
            return found | {"local_files_only": True}
        return found | {"revision": self.revision or "main"}

    def load(self, what: str, function: Callable[..., T], **arguments: Any) -> T:
        """Return what a loading function of transformers makes of the files.

        Args:
            what: What is loaded, for messages.
            function: Takes the source and `arguments`.
            arguments: Further ones.

        Raises:
            ValueError: It cannot be loaded. One line, with what to do.
        """
        try:
            with quiet():
                return function(self.source, **self.arguments, **arguments)
        except Exception as error:  # file system, hub, network and each family of models raise their own kinds
            raise ValueError(f"cannot load the {what} of {self.source!r}: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        message = one_line(error)
        if "trust_remote_code" in message or "custom code" in message:
            return "it is code inside the model's own repository, which is never run: choose a model of transformers"
        if self.folder is None:
            return f"{message}; without a connection, download its files and name their folder instead"
        return message


def require(package: str, extra: str, kind: str) -> None:
    """Import a package of an extra, silently. Raises ValueError if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"encoders of the kind {kind}: expected the package {package}, found none ({one_line(error)}): run "
            f"`pip install 'threetowers[{extra}]'`"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let neither logs nor warnings nor progress bars of the libraries out: what is wrong is told by errors."""
    from transformers.utils import logging as library

    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    bars = library.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in LOGGERS:
                logging.getLogger(name).setLevel(logging.CRITICAL)
            library.disable_progress_bar()
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            if bars:
                library.enable_progress_bar()


def load_pretrained(files: ModelFiles, config: Any) -> nn.Module:
    """Return the model of a config with its weights, float32, frozen, in evaluation mode.

    Of an encoder and a decoder it is the encoder. Heads for other tasks are left out, and so is a pooler whose weights
    the files do not hold.

    Raises:
        ValueError: There is no such model, or the files do not hold all of its weights.
    """
    import torch

    model: Any
    model, info = files.load(
        "model", _model_class(config).from_pretrained, config=config, dtype=torch.float32, output_loading_info=True
    )
    missing = set(info["missing_keys"]) | {str(key) for key in info.get("mismatched_keys", ())}
    if getattr(config, "is_encoder_decoder", False):
        encoder = model.get_encoder()
        kept = {id(parameter) for parameter in encoder.parameters()}
        missing = {name for name, parameter in model.named_parameters() if name in missing and id(parameter) in kept}
        model = encoder
    elif missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None  # as in checkpoints of masked language models and classifiers
        missing = set()
    if missing:
        found = ", ".join(sorted(missing)[:3])
        raise ValueError(
            f"{files.source!r}: expected all weights of a {type(model).__name__}, found {len(missing)} tensors missing "
            f"({found}): the files are incomplete, or of another model"
        )
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def _model_class(config: Any) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    architecture = next(iter(getattr(config, "architectures", None) or ()), "")
    if architecture.endswith("WithProjection") and hasattr(transformers, architecture):
        return getattr(transformers, architecture)  # one side of an image-text model, with its joint space
    if config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        return transformers.AutoModelForTextEncoding  # the encoder alone, of T5 and its like
    return transformers.AutoModel

"""The architecture of a model of transformers without its weights: of the files of a model, or of a config alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from threetowers.cache.encoders.huggingface.loading import ModelFiles, load_pretrained, quiet, require
from threetowers.cache.encoders.names import EncoderName
from threetowers.cache.encoders.packaged_weights import PACKAGE, packaged_sentence_encoder
from threetowers.cache.encoders.weights_file import one_line
from threetowers.cache.format.manifest import Side

KIND = "hf"
TYPE = "model_type"  # of a config: the family of models
SIDES: dict[Side, tuple[str, str]] = {"image": ("vision_config", "pixel_values"), "text": ("text_config", "input_ids")}
# Keys of a config that say nothing of the architecture.
NOTES = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "torch_dtype", "transformers_version")
CAUSAL = ("clip_text_model",)  # families whose attention does not say so itself
POOLINGS = {  # of sentence-transformers, old and new -> ours
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "cls": "cls",
    "mean": "mean",
    "lasttoken": "last",
}


def model_files(model: str) -> ModelFiles:
    """Return the files of a model: a folder, a name on the hub, or `package:NAME` for one inside a pip package.

    Raises:
        ValueError: There is no such folder, or the package is not installed.
    """
    if model.startswith(PACKAGE):
        return ModelFiles(str(packaged_sentence_encoder(model.removeprefix(PACKAGE))))
    return ModelFiles.of(EncoderName(KIND, model))


def read_architecture(model: str | None, changes: Mapping[str, Any], of: Side) -> Any:
    """Return the config of transformers of one side of a model.

    Args:
        model: As in `model_files`; None: `changes` say all.
        changes: Values for keys of the config. With a `model_type` among them they are the config by themselves.
        of: Which side of an image-text model it is.

    Raises:
        ValueError: transformers is not installed, the files cannot be read, or the config is none of a model.
    """
    require("transformers", KIND, KIND)
    from transformers import AutoConfig

    if TYPE not in changes and model is None:
        raise ValueError(f"expected a model, or a config with its {TYPE}, found neither")
    try:
        with quiet():
            config: Any = AutoConfig.for_model(**changes) if TYPE in changes else None
    except Exception as error:  # each family checks its keys in a way of its own
        raise ValueError(f"config: {one_line(error)}") from error
    if config is None:
        config = _config_of_files(str(model), changes, of)
    config.architectures = None  # a tower is a model without heads
    if hasattr(config, "use_cache"):
        config.use_cache = False  # nothing is generated
    return config


def _config_of_files(model: str, changes: Mapping[str, Any], of: Side) -> Any:
    """Return the config in the files of a model, or of its side, with other values for some of its keys."""
    from transformers import AutoConfig

    config: Any = model_files(model).load("config", AutoConfig.from_pretrained)
    if all(hasattr(config, key) for key, _ in SIDES.values()):
        config = getattr(config, SIDES[of][0])
    unknown = sorted(set(changes) - set(config.to_dict()) - set(config.attribute_map))
    if unknown:
        raise ValueError(f"config: found {', '.join(unknown)}, which no {type(config).__name__} has")
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def architecture_keys(config: Any) -> dict[str, Any]:
    """Return the keys of a config that, by `read_architecture`, give an equal one without any files."""
    keys = {key: value for key, value in config.to_dict().items() if key not in NOTES}
    tree: dict[str, Any] = json.loads(json.dumps({TYPE: config.model_type} | keys))
    return tree


def build_architecture(config: Any, of: Side) -> Any:
    """Return a model of a config with random weights.

    Raises:
        ValueError: transformers cannot build it, or it is none of this side.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    text_encoder = config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    build = transformers.AutoModelForTextEncoding if text_encoder else transformers.AutoModel
    try:
        with quiet():
            model: Any = build.from_config(config, trust_remote_code=False)
    except Exception as error:  # each family raises its own kinds
        raise ValueError(f"transformers cannot build a {config.model_type}: {one_line(error)}") from error
    if model.main_input_name != SIDES[of][1]:
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name}, expected a model of {of}, of {SIDES[of][1]}"
        )
    if getattr(model.config, "is_encoder_decoder", False) and not text_encoder:
        raise ValueError(f"{type(model).__name__} is an encoder with a decoder; choose an encoder")
    return model


def pretrained_state(model: str, of: Side) -> dict[str, Any]:
    """Return the weights in a model's files, by name, of one side of it. Raises ValueError if they cannot be loaded."""
    require("transformers", KIND, KIND)
    config = _config_of_files(model, {}, of)
    config.architectures = None
    return dict(load_pretrained(model_files(model), config).state_dict())


def pixel_statistics(model: str) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation (3 each) by which a model's images are normalised. Raises ValueError."""
    from transformers import AutoImageProcessor

    processor: Any = model_files(model).load("image processor", AutoImageProcessor.from_pretrained, backend="pil")
    if not processor.do_normalize:
        return [0.0] * 3, [1.0] * 3
    return list(processor.image_mean), list(processor.image_std)


def is_causal(model: Any) -> bool:
    """Return whether no token of a model sees a later one, as its attention says, or its family is known to do."""
    return model.config.model_type in CAUSAL or any(getattr(module, "is_causal", False) for module in model.modules())


def stated_pooling(files: ModelFiles) -> str | None:
    """Return how a model of sentence-transformers pools, as its files say; None for a model that is none.

    Raises:
        ValueError: It pools in a way that a tower does not.
    """
    if files.folder is None or not (files.folder / "modules.json").is_file():
        return None
    modules = json.loads((files.folder / "modules.json").read_text())
    paths = [Path(files.folder, module["path"]) for module in modules if module["type"].endswith("Pooling")]
    if not paths:
        return None
    found = json.loads((paths[0] / "config.json").read_text())
    modes = [key for key, value in found.items() if key.startswith("pooling_mode_") and value is True]
    if isinstance(found.get("pooling_mode"), str):
        modes = [found["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"{files.source!r} pools by {' and '.join(modes) or 'nothing'}; name another way by `pool`")
    return POOLINGS[modes[0]]

"""A run on towers of open_clip as a model of open_clip again: the config and the weights that they came with."""

from typing import Any

from torch import Tensor

from threetowers.cache.encoders.openclip.model_config import OpenClipConfig, read_open_clip_config
from threetowers.trainer.config import OpenClipTower, TrainConfig
from threetowers.trainer.export.trained_model import TrainedModel

SHARED = ("embed_dim", "quick_gelu")  # keys of a model config that both towers are built by
TOKENIZER_KEYS = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")


def has_open_clip_towers(config: TrainConfig) -> bool:
    """Return whether one of the deployed towers is of open_clip."""
    heads = (config.deploy.image, config.deploy.text)
    return any(isinstance(config.towers[config.root_of(head)], OpenClipTower) for head in heads)


def joined_reasons(config: TrainConfig) -> list[str]:
    """Return why the deployed towers, one of which is of open_clip, make no model of open_clip; none: they do."""
    image, text = (config.towers[config.root_of(head)] for head in (config.deploy.image, config.deploy.text))
    if not isinstance(image, OpenClipTower) or not isinstance(text, OpenClipTower):
        kinds = f"its image tower is of kind {image.kind}, its text tower of kind {text.kind}"
        return [f"{kinds}; the towers of one model are both open_clip's, or both ours"]
    reasons = []
    ours, theirs = (read_open_clip_config(tower.model, tower.args).model for tower in (image, text))
    for key in SHARED:
        if (ours.get(key) or None) != (theirs.get(key) or None):
            reasons.append(f"{key} of its image tower is {ours.get(key)}, of its text tower {theirs.get(key)}")
    for side, name in (("image", config.deploy.image), ("text", config.deploy.text)):
        head = name
        while head in config.heads:
            if config.heads[head].kind != "none":
                reasons.append(f"its {side} head {head} has weights, open_clip has none behind its towers' projections")
            head = config.heads[head].of
    return reasons


def joined_state(model: TrainedModel) -> dict[str, Tensor]:
    """Return the weights of the deployed towers under the names of open_clip's model."""
    image: Any = model.model.towers[model.image_tower]
    text: Any = model.model.towers[model.text_tower]
    state = {f"visual.{name}": tensor for name, tensor in image.own_state().items()}
    prefix = "text." if _is_custom(model) else ""  # CLIP keeps its text tower at the top
    return state | {f"{prefix}{name}": tensor for name, tensor in text.own_state().items()}


def joined_config(model: TrainedModel) -> dict[str, Any]:
    """Return open_clip's `model_cfg` of the deployed towers, but for the tokenizer."""
    image_config, text_config = _configs(model)
    text: Any = model.model.towers[model.text_tower]
    data = model.config.data
    vision = image_config.vision | {"image_size": data.side}
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    words = {key: value for key, value in text_config.text.items() if key not in TOKENIZER_KEYS}
    words |= {"context_length": data.context_length, "vocab_size": text.model.vocab_size}
    if words.get("hf_model_name"):
        words["hf_model_pretrained"] = False
    for section in (vision, words):
        section.pop("output_tokens", None)  # for CoCa's decoder, which a run does not have
    joined = {key: value for key, value in text_config.model.items() if key != "multimodal_cfg"}
    joined |= {"custom_text": _is_custom(model), "vision_cfg": vision, "text_cfg": words}
    joined.pop("init_logit_bias", None)
    if model.config.loss.kind == "sigmoid":
        joined["init_logit_bias"] = model.config.loss.bias_init
    return joined


def _configs(model: TrainedModel) -> tuple[OpenClipConfig, OpenClipConfig]:
    """Return the configs that the image and the text tower are built from."""
    image, text = (model.config.towers[name] for name in (model.image_tower, model.text_tower))
    assert isinstance(image, OpenClipTower)
    assert isinstance(text, OpenClipTower)
    return read_open_clip_config(image.model, image.args), read_open_clip_config(text.model, text.args)


def _is_custom(model: TrainedModel) -> bool:
    return _configs(model)[1].is_custom

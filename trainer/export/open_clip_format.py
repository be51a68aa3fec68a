"""open_clip's folder format: a timm image tower and a text transformer under open_clip's names, or its own towers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from threetowers.cache.encoders.timm_models import SOURCES, local_folder
from threetowers.cache.encoders.tokenizers.tokenizer import Tokenizer
from threetowers.cache.encoders.weights_file import one_line
from threetowers.trainer.config import Head, HfTower, ImageTower, TextTower, TrainConfig
from threetowers.trainer.export.open_clip_model import (
    has_open_clip_towers,
    joined_config,
    joined_reasons,
    joined_state,
)
from threetowers.trainer.export.open_clip_tokenizers import (
    check_open_clip_tokenizer,
    tokenizer_is_expressible,
    write_open_clip_tokenizer,
)
from threetowers.trainer.export.trained_model import TrainedModel
from threetowers.trainer.model.initial.open_clip_names import IMAGE_HEADS, their_projection, their_text
from threetowers.trainer.model.model import clamp_log_scale
from threetowers.trainer.model.towers.text_transformer import TextTransformer
from threetowers.trainer.model.towers.timm_tower import TimmTower


def write_open_clip(model: TrainedModel, folder: Path) -> None:
    """Write open_clip_config.json, open_clip_model.safetensors and the tokenizer.

    Raises:
        ValueError: If open_clip cannot express the model or its tokenizer.
    """
    _check_expressible(model)
    joined = has_open_clip_towers(model.config)
    config = joined_config(model) if joined else _config(model)
    tokenizer, context_length = _tokenizer(model), model.config.data.context_length
    config["text_cfg"] |= write_open_clip_tokenizer(tokenizer, context_length, folder)
    state = joined_state(model) if joined else _state(model)
    for scale in model.config.scales():
        log_scale = clamp_log_scale(model.model.log_scales[scale].detach(), model.config.loss.scale_max)
        state["logit_scale"] = log_scale.reshape(())
    for bias in model.model.biases.values():
        state["logit_bias"] = bias.detach().reshape(())
    # Copies: towers that share parameters share storage, which safetensors refuses to write.
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    save_file(copies, folder / "open_clip_model.safetensors")
    content = {"model_cfg": config, "preprocess_cfg": _preprocessing(model)}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2))
    check_open_clip_tokenizer(tokenizer, context_length, folder)


def _state(model: TrainedModel) -> dict[str, Tensor]:
    """Return the weights of our own towers and heads under open_clip's names."""
    image = model.model.towers[model.image_tower]
    text = model.model.towers[model.text_tower]
    assert isinstance(image, TimmTower)
    assert isinstance(text, TextTransformer)
    image_head = model.model.heads[model.config.deploy.image]
    text_head = model.model.heads[model.config.deploy.text]
    state = {f"visual.trunk.{name}": tensor for name, tensor in image.model.state_dict().items()}
    layers = [layer for layer in image_head.modules() if isinstance(layer, nn.Linear)]
    for layer_name, layer in zip(IMAGE_HEADS[len(layers)], layers, strict=True):
        state |= {f"visual.{layer_name}.{name}": p for name, p in layer.state_dict().items()}
    text_state = their_text(text.state_dict()) | their_projection(text_head.state_dict())
    return state | {f"text.{name}": tensor for name, tensor in text_state.items()}


def load_open_clip(folder: Path, model: TrainedModel) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return functions that embed images (b, 3, S, S) uint8, and tokens (b, L), with open_clip's own code."""
    try:
        import open_clip
    except ImportError as error:
        raise ValueError("open_clip is needed to verify the export: pip install open_clip_torch") from error
    try:
        reloaded = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False).eval()
    except Exception as error:  # open_clip, timm and torch each raise their own kinds
        raise ValueError(f"open_clip cannot load the export: {one_line(error)}") from error
    image: Any = model.model.towers[model.image_tower]

    def encode_image(images: Tensor) -> Tensor:
        embeddings: Tensor = reloaded.encode_image((images.float() / 255 - image.mean) / image.std)
        return embeddings

    return torch.no_grad()(encode_image), torch.no_grad()(reloaded.encode_text)


def _check_expressible(model: TrainedModel) -> None:
    """Raise ValueError with the reasons why open_clip cannot express the model."""
    reasons = open_clip_reasons(model.config)
    if model.tokenizer is not None and not tokenizer_is_expressible(model.tokenizer):
        reasons.append(f"its tokenizer is {model.tokenizer.name}; open_clip's folder would tokenize by CLIP's")
    if reasons:
        raise ValueError(
            f"open_clip cannot express this model: {'; '.join(reasons)}. Use --format onnx, or threetowers"
        )


def open_clip_reasons(config: TrainConfig) -> list[str]:
    """Return why open_clip cannot express the deployed towers and heads of a config; none: it can."""
    if has_open_clip_towers(config):
        return joined_reasons(config)
    return [*image_reasons(config), *text_reasons(config)]


def image_reasons(config: TrainConfig) -> list[str]:
    """Return why open_clip cannot express the deployed image tower, if it is none of open_clip's, and its head."""
    image = config.towers[config.root_of(config.deploy.image)]
    head = config.heads.get(config.deploy.image)
    reasons = []
    if isinstance(image, HfTower):
        reasons.append("its image tower is a model of transformers, open_clip takes timm's")
    elif not isinstance(image, ImageTower):
        reasons.append("its image tower is a cached teacher, whose weights are not in the run")
    elif image.specialize is not None:
        reasons.append("its image tower is specialised (MS-CLIP-S), open_clip takes timm's models as they are")
    elif image.model.startswith(SOURCES) or local_folder(image.model) is not None:
        reasons.append(f"its image tower is {image.model}, open_clip takes timm's own names")
    elif image.args:
        reasons.append(f"its image tower has args {image.args}, open_clip takes timm's models by name alone")
    if not _is_linear(config, head) and not _is_timm_mlp(config, head):
        reasons.append(
            "its image head is not one linear map on the tower, nor an mlp with biases, one hidden layer of twice the "
            "embedding's width, GELU, and nothing else"
        )
    return reasons


def text_reasons(config: TrainConfig) -> list[str]:
    """Return why open_clip cannot express the deployed text tower, if it is none of open_clip's, and its head."""
    text = config.towers[config.root_of(config.deploy.text)]
    head = config.heads.get(config.deploy.text)
    reasons = []
    if isinstance(text, HfTower):
        reasons.append("its text tower is a model of transformers, which open_clip pools and projects in its own way")
    elif not isinstance(text, TextTower):
        reasons.append("its text tower is a cached teacher, whose weights are not in the run")
    elif text.pool == "mean":
        reasons.append("its text tower pools by the mean; open_clip by eos or last")
    elif text.causal and (text.pool == "last" or not text.mask_padding):
        reasons.append("its causal text tower does not pool at the end token behind a mask")
    elif not text.causal and text.mask_padding:
        reasons.append("its text tower is bidirectional and masks padding; open_clip does one of the two")
    if not _is_linear(config, head):
        reasons.append("its text head is not one linear map on the tower")
    return reasons


def _is_linear(config: TrainConfig, head: Head | None) -> bool:
    return head is not None and head.kind == "linear" and head.input_norm is None and head.of in config.towers


def _is_timm_mlp(config: TrainConfig, head: Head | None) -> bool:
    """Whether an image head is the one mlp that open_clip has (`timm_proj: mlp`)."""
    if head is None or head.kind != "mlp" or head.of not in config.towers:
        return False
    plain = head.input_norm is None and head.norm is None and not head.gated
    hidden = 2 * (head.embed_dim or config.embed_dim)
    return plain and head.bias and head.depth == 1 and head.activation == "gelu" and head.hidden == hidden


def _config(model: TrainedModel) -> dict[str, Any]:
    """Return open_clip's `model_cfg` of our own towers and heads, but for the tokenizer."""
    config = model.config
    tower = config.towers[model.image_tower]
    text = config.towers[model.text_tower]
    assert isinstance(tower, ImageTower)
    assert isinstance(text, TextTower)
    model_config: dict[str, Any] = {
        "embed_dim": model.model.widths[config.deploy.image],
        "custom_text": True,
        "quick_gelu": text.activation == "quick_gelu",
        "vision_cfg": {
            "timm_model_name": tower.model,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": config.heads[config.deploy.image].kind,
            "timm_proj_bias": config.heads[config.deploy.image].bias,
            "image_size": config.data.side,
        },
        "text_cfg": {
            "context_length": config.data.context_length,
            "vocab_size": _token_rows(model),
            "width": text.width,
            "heads": text.heads,
            "layers": text.depth,
            "mlp_ratio": text.mlp_ratio,
            "no_causal_mask": not text.causal,
            "pool_type": text.pool,
            "pad_id": _tokenizer(model).special.pad,
            "eos_id": _tokenizer(model).special.end,
            "proj_bias": config.heads[config.deploy.text].bias,
            "norm_kwargs": {"eps": text.norm_eps or 1e-6},
        },
    }
    if config.loss.kind == "sigmoid":
        model_config |= {"init_logit_bias": config.loss.bias_init}
    return model_config


def _preprocessing(model: TrainedModel) -> dict[str, Any]:
    """Return open_clip's `preprocess_cfg`: how the run takes images."""
    image: Any = model.model.towers[model.image_tower]
    return {
        "size": [model.config.data.side] * 2,
        "mode": "RGB",
        "mean": image.mean.flatten().tolist(),
        "std": image.std.flatten().tolist(),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def _token_rows(model: TrainedModel) -> int:
    return _tokenizer(model).embedding_rows(model.config.data.vocab_size)


def _tokenizer(model: TrainedModel) -> Tokenizer:
    assert model.tokenizer is not None
    return model.tokenizer

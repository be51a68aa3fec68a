"""The fingerprint of a model: a digest of all that decides its embeddings, read off the objects that compute them.

A name or a config may leave something out, such as the activation that a pretrained tag brings along; what runs cannot.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Raise it when this package begins to compute other embeddings from the same model and the same inputs.
EMBEDDING_VERSION = 2

# Attributes that say where a part came from or what it remembers, not what it computes.
UNDECISIVE = frozenset({"training", "pretrained_cfg", "default_cfg", "cache", "device", "name_or_path"})


def model_fingerprint(**parts: object) -> str:
    """Return 32 hex digits that are equal, on any machine, for models that embed alike.

    Args:
        parts: All that decides an embedding, under names of any choice: the digest of the weights, the modules (their
            classes, plain attributes and buffers count, so also arguments, activations and pooling), the transform,
            the tokenizer, the precision. Device, paths and private attributes do not count.
    """
    tree = _described({"version": EMBEDDING_VERSION, **parts}, frozenset())
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _described(value: Any, above: frozenset[int]) -> Any:
    """Return a value as plain JSON; `above` holds the ids of the objects that it is part of."""
    if value is None or isinstance(value, bool | int | float | str):
        return str(value) if isinstance(value, Enum) else value
    if isinstance(value, bytes | Tensor | np.ndarray | torch.dtype | Enum | PurePath | torch.device | ModuleType):
        return _leaf(value)
    if id(value) in above:
        return "itself"
    inside = above | {id(value)}
    if isinstance(value, Mapping):
        pairs = [[str(key), _described(item, inside)] for key, item in value.items()]
        return sorted(pairs, key=lambda pair: pair[0])
    if isinstance(value, list | tuple):
        return [_described(item, inside) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_described(item, inside), sort_keys=True) for item in value)
    if isinstance(value, functools.partial):
        return _described([value.func, value.args, value.keywords], inside)
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        # A function with what it closes over, a method with its object, a class.
        closed = []
        for cell in getattr(value, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                closed.append(cell.cell_contents)
        owner = None if isinstance(value, type) else getattr(value, "__self__", None)
        return [_name(value), _described([closed, owner], inside)]
    return [_name(type(value)), _described(_attributes(value), inside)]


def _leaf(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        return f"{data.dtype} {data.shape} {hashlib.sha256(data.tobytes()).hexdigest()}"
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, PurePath | torch.device):  # where something lies or runs
        return type(value).__name__
    if isinstance(value, ModuleType):
        return value.__name__
    return str(value)


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{value.__qualname__}"


def _attributes(value: Any) -> dict[str, Any]:
    """Return what decides how an object behaves, by name."""
    if hasattr(value, "backend_tokenizer"):  # a fast tokenizer of transformers tells everything as JSON
        return {"tokenizer": value.backend_tokenizer.to_str()}
    if hasattr(value, "get_vocab"):  # a slow one
        return {"vocabulary": value.get_vocab(), "special": value.special_tokens_map}
    if hasattr(value, "serialized_model_proto"):  # SentencePiece
        return {"model": value.serialized_model_proto()}
    if hasattr(value, "pattern") and hasattr(value, "flags"):  # a regular expression
        return {"pattern": value.pattern, "flags": value.flags}
    found: dict[str, Any] = {}
    for name, item in getattr(value, "__dict__", {}).items():
        if name not in UNDECISIVE and not name.startswith("_"):
            found[name] = item
    if isinstance(value, nn.Module):
        found |= {f"buffer {name}": item for name, item in value.named_buffers(recurse=False)}
        found |= {f"module {name}": item for name, item in value.named_children()}
    return found

"""Weights in the files that people have: a state dict, a checkpoint around one, a folder of shards.

A training script saves more than a model, and wraps the model: `state_dict`, `model_ema` (timm, DeiT), `module.` (DDP),
`_orig_mod.` (torch.compile), `model.` (Lightning). All of these are prefixes once the tensors of a file are named by
their path in it. The *part* of a file that is a model is the prefix under which all the names of the model are found;
`FILE#PART` names it.
"""

import argparse
import json
import logging
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

State = Mapping[str, Tensor]

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".tar", ".ckpt")
IN_FOLDERS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # in timm's order
EXPECTED = "expected a path, 'pretrained' or 'package:NAME'"
SHOWN = 3  # names in a message
ANCHORS = 8  # names of a model that are looked for in a file to find the prefixes before them


def split_part(source: str) -> tuple[Path, str]:
    """Return path and part of `FILE[#PART]`. A file whose own name has a # in it is taken as it is."""
    path, _, part = source.partition("#")
    return (Path(source), "") if Path(source).exists() else (Path(path), part.strip("."))


def read_state(path: Path, in_folders: Sequence[str] = IN_FOLDERS) -> dict[str, Tensor]:
    """Read all tensors of a file, by their path in it: `state_dict.conv1.weight` in a checkpoint.

    Nothing is unpickled but tensors, plain containers and `argparse.Namespace`, which timm and DeiT save beside them.

    Args:
        path: A `.safetensors` file, a checkpoint of torch, or a folder with one of them or with the shards of one.
        in_folders: Names by which a file is found in a folder, the first one first.

    Raises:
        ValueError: There is no such file, or it cannot be read, or it holds no tensors.
    """
    state: dict[str, Tensor] = {}
    for file in _files(path, in_folders):
        state.update(_tensors(_read(file)))
    if not state:
        raise ValueError(f"weights {path}: found no tensors in it, expected a state dict")
    return state


def model_part(state: State, names: Iterable[str], source: str, part: str = "") -> tuple[dict[str, Tensor], str]:
    """Return the part of a file that is a model, under the model's own names, and the part's prefix.

    Args:
        state: The tensors of the file.
        names: Those of the model, without a classifier, which may have any number of classes.
        source: The file, for messages.
        part: A prefix of the part, if it is known.

    Returns:
        The tensors, and their prefix in the file. Averaged weights (EMA) come before those that they average, as in
        timm. If no part has all the names, the part that has most of them.

    Raises:
        ValueError: The file has no such part, or several that are the model.
    """
    if part and not any(name.startswith(f"{part}.") for name in state):
        known = sorted({".".join(name.split(".")[:depth]) for name in state for depth in (1, 2)} - state.keys())
        raise ValueError(f"{source} has no tensor named {part}.*; known prefixes: {_some(known, 10)}")
    # Counters of batches are buffers that old files lack and torch fills in.
    wanted = [name for name in names if not name.endswith("num_batches_tracked")]
    prefixes = [p for p in _prefixes(state, wanted) if not part or f"{p}.".startswith(f"{part}.")]
    found = {prefix: sum(_under(prefix, name) in state for name in wanted) for prefix in prefixes}
    complete = [prefix for prefix, count in found.items() if count == len(wanted)]
    averaged = [prefix for prefix in complete if "ema" in re.split(r"[._]", prefix)]
    if len(complete) > 1 and len(averaged) != 1:
        choice = " or ".join(f"{source.partition('#')[0]}#{prefix}" for prefix in complete[:SHOWN])
        raise ValueError(f"{source} holds several models that fit: name one, as {choice}")
    best = (averaged or complete or sorted(found, key=lambda prefix: -found[prefix]) or [part])[0]
    if averaged and len(complete) > 1:
        others = ", ".join(f"{source}#{prefix}" for prefix in complete if prefix not in averaged)
        logger.info("%s: its averaged weights (EMA), %r, are taken; the others are %s", source, best, others)
    elif complete and best != part:
        logger.info("%s: its part %r is the model", source, best)
    lead = len(best) + 1 if best else 0
    return {name[lead:]: tensor for name, tensor in state.items() if name.startswith(_under(best, ""))}, best


def load_strictly(module: nn.Module, state: State, source: str, target: str) -> None:
    """Load the weights of a module, all of them and nothing else.

    Args:
        module: What they are loaded into.
        state: The weights.
        source: Where they come from, for messages.
        target: What the module is, for messages.

    Raises:
        ValueError: They do not fit.
    """
    expected = module.state_dict()
    problems = []
    try:
        result = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        shapes = [
            f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ]
        if not shapes:
            raise ValueError(f"{source} does not fit {target}: {one_line(error)}") from error
        problems.append(f"{len(shapes)} of another shape ({_some(shapes)})")
        missing = [name for name in expected if name not in state]
        unexpected = [name for name in state if name not in expected]
    else:
        missing, unexpected = result.missing_keys, result.unexpected_keys
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} missing ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    if problems:
        raise ValueError(
            f"{source} does not fit {target}: of its tensors {'; '.join(problems)}. Name the model that was saved, or "
            "the part of the file that is the model, as FILE#PREFIX"
        )


def require_finite(module: nn.Module, source: str) -> None:
    """Raise ValueError if a parameter of a module holds NaN or infinity. `source`: of its weights, for messages."""
    bad = [name for name, parameter in module.named_parameters() if not parameter.detach().isfinite().all()]
    if bad:
        raise ValueError(
            f"{source}: NaN or infinity in {len(bad)} of its tensors ({_some(bad)}): the file is damaged, or its "
            "training diverged"
        )


def one_line(error: object, limit: int = 240) -> str:
    """Return a library's message as one line without colours, cut off after `limit` characters."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()) or type(error).__name__
    return text.rstrip(".") if len(text) <= limit else f"{text[:limit].rstrip()}..."


def _files(path: Path, in_folders: Sequence[str]) -> list[Path]:
    """Return the files of weights at a path."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"weights {str(path)!r}: no such file; {EXPECTED}")
    for name in in_folders:
        if (path / name).is_file():
            return [path / name]
    indexes = sorted(path.glob("*.index.json"))
    if indexes:
        return _shards(indexes[0])
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
    if len(files) != 1:
        found = _some([file.name for file in files]) or "none"
        raise ValueError(f"weights {path}: a folder; found the files {found}: name one of them")
    return files


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"weights {index}: not an index of shards: {one_line(error)}") from error
    shards = [index.parent / Path(name).name for name in names]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(
            f"weights {index.parent}: {len(missing)} of {len(shards)} shards are missing ({_some(missing)})"
        )
    return shards


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise ValueError(f"weights {path}: the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"weights {path}: a pointer of Git LFS, not the weights: run `git lfs pull`")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if objects := _pickled_objects(path):
            raise ValueError(
                f"weights {path}: not a readable state dict: it holds objects that are not unpickled "
                f"({_some(objects)}); save the weights alone: torch.save(model.state_dict(), FILE)"
            ) from error
        raise ValueError(_unreadable(path, "it is none of torch's")) from error
    except Exception as error:  # zip, unpickling and safetensors errors
        raise ValueError(_unreadable(path, error)) from error


def _pickled_objects(path: Path) -> list[str]:
    """Return the names of the objects in a file for which it is not read; none if it is not a file of torch."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # whatever it is, it was found unreadable before
        return []


def _unreadable(path: Path, error: object) -> str:
    size = path.stat().st_size
    return (
        f"weights {path}: not a readable state dict ({size:,} bytes): {one_line(error, 120)}; expected a complete file "
        "of torch or safetensors"
    )


def _tensors(value: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested mappings by their path."""
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, _under(prefix, str(key)))


def _prefixes(state: State, names: Sequence[str]) -> list[str]:
    """Return the prefixes before the names of a model in a file, found by some of the names."""
    anchors = {name for name in names[:: max(1, len(names) // ANCHORS)]}
    prefixes: dict[str, None] = {}
    for name in state:
        for anchor in anchors:
            if name == anchor:
                prefixes[""] = None
            elif name.endswith(f".{anchor}"):
                prefixes[name[: -len(anchor) - 1]] = None
    return list(prefixes)


def _under(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _some(names: Sequence[str], count: int = SHOWN) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")

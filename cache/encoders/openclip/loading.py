"""open_clip's models as open_clip loads them: architecture, weights, and the preprocessing and tokenizer of both."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from threetowers.cache.encoders.openclip.model_config import (
    CONFIG,
    HUB,
    LOCAL,
    SOURCES,
    model_folder,
    needs_quick_gelu,
    require_open_clip,
    tag_preprocessing,
    unknown_model,
)
from threetowers.cache.encoders.tokenizers.open_clip_tokenizer import (
    ExportedTokenizer,
    OpenClipTokenizer,
    open_clip_tokenizer,
)
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from threetowers.cache.encoders.weights_file import (
    load_strictly,
    model_part,
    one_line,
    read_state,
    require_finite,
    split_part,
)

logger = logging.getLogger(__name__)

WEIGHTS = (  # of a folder, in open_clip's order
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
DEFAULT = "default"  # instead of a tag: the preprocessing of models that are trained with open_clip as it is
REMEDY = "; without a connection, download its files and name their folder or file instead"


@dataclass(frozen=True)
class OpenClipModel:
    """An open_clip model, as it is loaded.

    Attributes:
        name: As open_clip knows it, or its folder.
        weights: Where its weights came from: `pretrained` (those of the hub), one of its tags, its folder,
            `file:FILE#PREFIX`, or `random`.
        model: open_clip's model, in evaluation mode.
        transform: Its evaluation transform, PIL image to (3, H, W).
    """

    name: str
    weights: str
    model: Any
    transform: Any

    @cached_property
    def tokenizer(self) -> OpenClipTokenizer:
        """Its tokenizer. Raises ValueError if it cannot be loaded."""
        return _tokenizer(self.name, model_folder(self.name), self.model, f"open_clip:{self.name}")


def load_open_clip_model(name: str, weights: str | None) -> OpenClipModel:
    """Load a model of open_clip.

    Args:
        name: A model of open_clip, `hf-hub:ORG/NAME`, or a folder that it saved, also as `local-dir:FOLDER`.
        weights: One of its pretrained tags; or FILE, or TAG=FILE where the preprocessing of TAG belongs to the file.
            None: those of the hub or the folder; otherwise random ones. The activation function is that which the
            weights of a tag were trained with.

    Raises:
        ValueError: open_clip is not installed, or has no such model or weights, or cannot load them; or the
            preprocessing of a file is not known.
    """
    require_open_clip(name)
    import open_clip

    spec = f"open_clip:{name}"
    folder = model_folder(name)
    known = LOCAL + str(folder) if folder else name if name.startswith(HUB) else name.replace("/", "-")
    if folder is not None and not (folder / CONFIG).is_file():
        raise ValueError(f"{spec}: expected a folder that open_clip saved a model to, found no {CONFIG} in it")
    if not known.startswith(SOURCES) and known not in open_clip.list_models():
        raise unknown_model(known)
    tag, file = _tag_and_file(known, weights, spec)
    if folder is not None and file is None:
        file = str(folder)
    arguments: dict[str, Any] = {"pretrained": tag, "require_pretrained": known.startswith(HUB)}
    if file is not None:
        preprocessing = {} if known.startswith(SOURCES) else _preprocessing(known, tag, file, spec)
        # Without weights of its towers, which open_clip would otherwise fetch.
        arguments = {"load_weights": False, "pretrained_text": False, **preprocessing}
    elif tag is None and not known.startswith(HUB):
        logger.warning("%s has random weights; give a file or a pretrained tag as open_clip:NAME:WEIGHTS", spec)
    if needs_quick_gelu(known, tag):
        logger.info("%s: QuickGELU in place of the GELU of its config, as the weights %r need it", spec, tag)
        arguments["force_quick_gelu"] = True
    try:
        with _without_notice_of_random_weights():
            model, _, transform = open_clip.create_model_and_transforms(known, **arguments)
    except Exception as error:  # hub, network, file system and open_clip each raise their own kinds
        raise ValueError(f"{spec}: open_clip cannot load {_what(known, tag)}: {one_line(error)}{REMEDY}") from error
    part = _load_weights(model, file, spec) if file is not None else ""
    return OpenClipModel(
        str(folder or known),
        _stated_weights(known, weights, file, part),
        model.eval().requires_grad_(False),
        transform,
    )


def _stated_weights(known: str, weights: str | None, file: str | None, part: str) -> str:
    """Return where the weights came from, as manifests say it. `part`: the prefix that they have in the file."""
    if weights is None:
        if known.startswith(LOCAL):
            return known.removeprefix(LOCAL)
        return "pretrained" if known.startswith(HUB) else "random"
    if file is None:
        return weights
    return f"file:{split_part(file)[0].name}" + (f"#{part}" if part else "")


def _what(known: str, tag: str | None) -> str:
    return f"{known} with the weights {tag!r}" if tag else known


def _tag_and_file(known: str, weights: str | None, spec: str) -> tuple[str | None, str | None]:
    """Return the pretrained tag and the file that WEIGHTS stands for: TAG, FILE or TAG=FILE."""
    import open_clip

    if weights is None:
        return None, None
    if split_part(weights)[0].exists():
        return None, weights
    tag, _, file = weights.partition("=")
    tags = open_clip.list_pretrained_tags_by_model(known)
    if known.startswith(SOURCES):
        raise ValueError(f"{spec}: {weights!r} is no file; the preprocessing is that of the model's own {CONFIG}")
    is_tag = bool(open_clip.get_pretrained_cfg(known, tag)) or (bool(file) and tag == DEFAULT)
    if not is_tag:
        raise ValueError(
            f"{spec}: {tag!r} is neither a file nor a pretrained tag of it; its tags: {', '.join(tags) or 'none'}"
        )
    return tag, file or None


def _preprocessing(known: str, tag: str | None, file: str, spec: str) -> dict[str, Any]:
    """Return arguments for the preprocessing that belongs to a file of weights.

    A file does not state it. It is that of the tag, if one is given, otherwise that on which all pretrained tags of the
    architecture agree.

    Raises:
        ValueError: They disagree.
    """
    import open_clip

    if tag == DEFAULT:
        return {}
    tags = [tag] if tag else open_clip.list_pretrained_tags_by_model(known)
    variants: dict[str, list[str]] = {}
    found: dict[str, Any] = {}
    for name in tags:
        found = tag_preprocessing(known, name)
        variants.setdefault(", ".join(f"{key} {value}" for key, value in found.items()), []).append(name)
    if len(variants) > 1:
        choices = "; or ".join(f"{text} ({', '.join(names[:3])})" for text, names in variants.items())
        raise ValueError(
            f"{spec}: the preprocessing of {file} is not known, since the pretrained models of {known} differ: "
            f"{choices}. Name the tag whose preprocessing it has, as {spec}:{tags[0]}={file}; {DEFAULT!r} is that of "
            "open_clip's training script"
        )
    if not tag:
        logger.info(
            "%s: the preprocessing of %s is taken to be %s; if it is another one, name a tag as %s:TAG=%s",
            spec,
            file,
            f"that of the pretrained models, {next(iter(variants))}" if variants else "open_clip's default",
            spec,
            file,
        )
    return {f"image_{key}": value for key, value in found.items()}


def _load_weights(model: Any, file: str, spec: str) -> str:
    """Load a file of weights: as it is if it fits, otherwise by open_clip, which converts foreign and older ones.

    Returns:
        The prefix of the part of the file that they are.
    """
    import open_clip

    path, part = split_part(file)
    state: dict[str, Tensor] = {}
    if path.suffix not in (".npz", ".npy"):  # of big_vision
        state, found = model_part(read_state(path, WEIGHTS), model.state_dict(), str(path), part)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if part or path.is_dir() or shapes == {name: tensor.shape for name, tensor in state.items()}:
            load_strictly(model, state, str(path), spec)
            _require_finite_towers(model, path)
            return found
    try:
        open_clip.load_checkpoint(model, str(path), strict=True, weights_only=True)
    except Exception as error:  # each format raises its own kinds
        if state:
            load_strictly(model, state, str(path), spec)
        raise ValueError(f"{spec}: {path} cannot be loaded: {one_line(error)}") from error
    _require_finite_towers(model, path)
    return ""


def _require_finite_towers(model: Any, path: Path) -> None:
    """Raise ValueError for NaN or infinity in what embeds; the decoder of CoCa is not used."""
    require_finite(model.visual, str(path))
    require_finite(getattr(model, "text", model), str(path))


@contextmanager
def _without_notice_of_random_weights() -> Iterator[None]:
    """Leave out open_clip's warning that weights are random: they are loaded afterwards, or we have said it."""

    def keep(record: logging.LogRecord) -> bool:
        return "nitialized randomly" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


def _tokenizer(known: str, folder: Path | None, model: Any, spec: str) -> OpenClipTokenizer:
    """Return open_clip's tokenizer of the model; our own where the folder is one of our exports, which contain it."""
    if folder is not None and (folder / "tokenizer.model").is_file():
        tokenizer = SentencePieceTokenizer.load(folder / "tokenizer.model")
        return ExportedTokenizer(tokenizer, model.context_length)
    import open_clip

    try:
        return open_clip_tokenizer(open_clip.get_tokenizer(LOCAL + str(folder) if folder else known))
    except Exception as error:  # hub, network and transformers each raise their own kinds
        install = ": run `pip install transformers`" if isinstance(error, ImportError) else REMEDY
        raise ValueError(f"{spec}: its tokenizer cannot be loaded: {one_line(error)}{install}") from error

"""Encoders by name, the same name everywhere: `KIND:NAME[@SIZE][:WEIGHTS]`.

A kind is an entry point of the group `threetowers.encoders`: a function of an `EncoderName` and `EncoderOptions`. So
the trainer can add its runs, and other packages their models.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Self

import torch

from threetowers.cache.encoders.timm_models import LOCAL, SOURCES
from threetowers.cache.encoders.weights_file import one_line
from threetowers.cache.format.manifest import DecodeMode, EncoderPrecision, EncoderRuntime
from threetowers.cache.storage.storage import URL

if TYPE_CHECKING:  # a run that reads rows of a cache knows encoders by name alone
    from threetowers.cache.encoders.encoder import FrozenEncoder

ENTRY_POINTS = "threetowers.encoders"
PREFIXES = (*SOURCES, "package:")  # of names, before a colon that separates nothing


@dataclass(frozen=True)
class EncoderName:
    """The parts of an encoder's name.

    Attributes:
        kind: The library that the model is of, or `run`.
        name: The model's name there, or a folder.
        size: Side of the square input in pixels; None: the model's own.
        weights: Where its weights are; None: its own.
    """

    kind: str
    name: str
    size: int | None = None
    weights: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take a name apart.

        Args:
            text: `KIND:NAME[@SIZE][:WEIGHTS]`. NAME may be a folder or URL, or begin with `hf-hub:`, `local-dir:` or
                `package:`; an @ in it that no number follows is part of it, as a revision on the hub is. Of a folder
                that exists, colons and @ are part too.

        Raises:
            ValueError: There is no kind, or no name, or the size is 0.

        Examples:
            >>> EncoderName.parse("timm:tf_efficientnet_lite0@160:package:efficientnet-lite0")
            EncoderName(kind='timm', name='tf_efficientnet_lite0', size=160, weights='package:efficientnet-lite0')
            >>> EncoderName.parse("open_clip:hf-hub:timm/ViT-B-16-SigLIP").name
            'hf-hub:timm/ViT-B-16-SigLIP'
        """
        kind, _, rest = text.partition(":")
        scheme = URL.match(rest)
        prefix = scheme[0] if scheme else next((prefix for prefix in PREFIXES if rest.startswith(prefix)), "")
        body = rest.removeprefix(prefix)
        folder = _folder_before(body)
        name, _, weights = body.removeprefix(folder).partition(":")
        before, at, after = name.rpartition("@")
        size = int(after) if at and after.isdecimal() else None
        name = folder + (name if size is None else before)
        if not kind or not name:
            raise ValueError(f"{text!r}: expected an encoder as KIND:NAME[@SIZE][:WEIGHTS], as in timm:resnet50")
        if size == 0:
            raise ValueError(f"{text!r}: expected a side of at least 1 pixel after the @")
        return cls(kind, prefix + name, size, weights or None)

    @property
    def model(self) -> str:
        """Kind and name as manifests state them: the same for a folder with and without `local-dir:`."""
        return f"{self.kind}:{self.name.removeprefix(LOCAL)}"

    def __str__(self) -> str:
        """Return the name as it is written."""
        size = "" if self.size is None else f"@{self.size}"
        return f"{self.kind}:{self.name}{size}" + (f":{self.weights}" if self.weights else "")


@dataclass(frozen=True)
class EncoderOptions:
    """How an encoder is loaded and run.

    Attributes:
        device: Where it runs.
        precision: Arithmetic of the forward pass.
        runtime: What runs an image side.
        decode: How the bytes of an image become its pixels: `pillow-draft` lets the JPEG decoder skip detail that the
            resize would average away: faster for large images, not exact.
        compiled: Run an image side through torch.compile.
        prompt: Put before each caption; None: the model's own.
        max_length: Tokens to which captions are cut; None: the model's own.
    """

    device: str | torch.device = "cpu"
    precision: EncoderPrecision = "float32"
    runtime: EncoderRuntime = "torch"
    decode: DecodeMode = "pillow"
    compiled: bool = False
    prompt: str | None = None
    max_length: int | None = None


EncoderLoader = Callable[[EncoderName, EncoderOptions], "FrozenEncoder"]


def encoder_kinds() -> tuple[str, ...]:
    """Return the kinds of encoders that are installed."""
    return tuple(sorted(entry_points(group=ENTRY_POINTS).names))


def load_frozen_encoder(name: str | EncoderName, options: EncoderOptions | None = None) -> "FrozenEncoder":
    """Load an encoder in evaluation mode.

    Args:
        name: One of

            - `timm:NAME[@SIZE][:WEIGHTS]`: a timm model, `hf-hub:ORG/NAME`, or a folder that timm saved it to; WEIGHTS
              is a file, FILE#PREFIX for a part of one, or `package:NAME`; by default timm's own;
            - `open_clip:NAME[:WEIGHTS]`: an open_clip model, `hf-hub:ORG/NAME`, or a folder that it saved; WEIGHTS is
              one of its pretrained tags, a file, or TAG=FILE for a file with the preprocessing of that tag; by default
              those of hub or folder, otherwise random ones;
            - `hf:NAME[:WEIGHTS]`: a model of transformers, of text, images or both, by folder or name; WEIGHTS is a
              folder with a copy of the files of that name;
            - `st:NAME[:WEIGHTS]`: a model of sentence-transformers, by folder, name or `package:NAME`;
            - `run:FOLDER[:WEIGHTS]`: a finished run, or an export, of this package; WEIGHTS are those of the frozen
              encoder whose cached rows it stands on (LiT), with one side or both.
        options: How it is loaded and run.

    Raises:
        ValueError: There is no such encoder, it cannot be loaded, or the package that it needs is not installed.
    """
    parsed = EncoderName.parse(name) if isinstance(name, str) else name
    return _loader(parsed)(parsed, options or EncoderOptions())


def _loader(name: EncoderName) -> EncoderLoader:
    """Return what loads encoders of a kind."""
    known = encoder_kinds()
    if not known:
        raise ValueError(
            f"{str(name)!r}: found no kind of encoder, expected the entry points {ENTRY_POINTS!r} of this package: it "
            "is not installed, or was before it had them: run `pip install` again"
        )
    if name.kind not in known:
        raise ValueError(
            f"{str(name)!r}: expected an encoder of one of the kinds {', '.join(known)}, as in timm:resnet50, found "
            f"{name.kind!r}"
        )
    entry_point = next(iter(entry_points(group=ENTRY_POINTS, name=name.kind)))
    try:
        loader: EncoderLoader = entry_point.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{str(name)!r}: {entry_point.value} cannot be loaded: {one_line(error)}") from error
    return loader


def _folder_before(text: str) -> str:
    """Return the longest folder with which a text begins, where a name may end; "" without one."""
    ends = [end for end, character in enumerate(text) if character in "@:"] + [len(text)]
    return next((text[:end] for end in reversed(ends) if os.path.isdir(text[:end])), "")

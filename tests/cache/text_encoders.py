"""Encoders of the kind `test`, a few thousand random weights each, which need no package.

`test:bag` reads text, `test:pair` sees images too and has a joint space. They are found as those of other packages are:
by the entry point of `tests/encoders/`, which is on the path of tests and, by `PROCESS_ENV`, of processes that
they start.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from PIL import Image
from torch import Tensor, nn

from threetowers.cache.encoders.encoder import (
    FrozenEncoder,
    ImageEncoder,
    ImageModel,
    TextEncoder,
    TextModel,
    require_offered,
    state_digest,
)
from threetowers.cache.encoders.names import EncoderName, EncoderOptions
from threetowers.cache.encoders.tokenizers.tokenizer import Tokens
from threetowers.cache.format.manifest import Preprocessing, TextProcessing

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT), str(ROOT / "tests/encoders")]
# The environment of a process that is to find these encoders
PROCESS_ENV = os.environ | {"PYTHONPATH": os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])}

VOCABULARY = 997
WIDTH = 24
JOINT_WIDTH = 12
MAX_LENGTH = 8
SIDE = 16  # of the images, in pixels
NONFINITE = "nonfinite"  # a word that makes the features of a caption NaN
HUGE = "huge"  # a word that makes them too large for float16
SCALES = {NONFINITE: torch.nan, HUGE: 1e7}  # of words with an id of their own


class WordBag(TextModel):
    """The mean of random vectors of a caption's words, weighted by position, and a projection of it."""

    features = ("pooled", "projected")
    scale: Tensor

    def __init__(self, generator: torch.Generator, prompt: str, max_length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY + len(SCALES), WIDTH)
        self.projection = nn.Linear(WIDTH, JOINT_WIDTH, bias=False)
        self.processing = TextProcessing("words modulo 997", prompt, max_length, "mean", normalize=False)
        self.register_buffer("scale", torch.cat([torch.ones(VOCABULARY), torch.tensor(list(SCALES.values()))]))
        _randomise(self, generator)

    def tokenize(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the ids of each caption's words."""
        length = self.processing.max_length
        words = [(self.processing.prompt + caption).split() for caption in captions]
        return [Tokens([word_id(word) for word in each[:length]], len(each) > length) for each in words]

    def collate(self, tokens: Sequence[Tokens]) -> dict[str, Tensor]:
        """Return the ids, and which of them are words."""
        longest = max(len(each.ids) for each in tokens)
        ids_bL = torch.zeros(len(tokens), longest, dtype=torch.long)
        words_bL = torch.zeros(len(tokens), longest)
        for row, each in enumerate(tokens):
            ids_bL[row, : len(each.ids)] = torch.tensor(each.ids)
            words_bL[row, : len(each.ids)] = 1
        return {"ids": ids_bL, "words": words_bL}

    def forward(self, inputs: Mapping[str, Tensor], features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the mean of the words, or its projection."""
        ids_bL = inputs["ids"]
        words_bL = inputs["words"]
        position_L = 1 + torch.arange(ids_bL.shape[1], device=ids_bL.device) / 8  # the order of words matters
        weights_bL = (self.scale[ids_bL] * position_L).where(words_bL > 0, 0)
        sum_bD = (self.embedding(ids_bL) * weights_bL[..., None]).sum(1)
        return _offered(self.features, sum_bD / words_bL.sum(1, keepdim=True), self.projection, features, "test:bag")


class ColourGrid(ImageModel):
    """A random map of the mean colours of 4 x 4 squares, and a projection of it."""

    features = ("pooled", "projected")

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.squares = nn.Linear(3 * 4 * 4, WIDTH)
        self.projection = nn.Linear(WIDTH, JOINT_WIDTH, bias=False)
        _randomise(self, generator)

    def forward(self, x_b3HW: Tensor, features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the map of the squares, or its projection."""
        squares_bK = nn.functional.adaptive_avg_pool2d(x_b3HW, 4).flatten(1)
        return _offered(self.features, self.squares(squares_bK).tanh(), self.projection, features, "test:pair")


def load_test_encoder(name: EncoderName, options: EncoderOptions) -> FrozenEncoder:
    """Load `test:bag` or `test:pair`; weights `seed:N` are others."""
    seed = int(name.weights.removeprefix("seed:")) if name.weights else 0
    generator = torch.Generator().manual_seed(seed)
    prompt = options.prompt or ""
    bag = WordBag(generator, prompt, options.max_length or MAX_LENGTH)
    device = torch.device(options.device)
    full_name = f"{name.kind}:{name.name}"
    text = TextEncoder(full_name, bag.to(device).eval(), device, options.precision)
    state = {f"text.{key}": value for key, value in bag.state_dict().items()}
    image = None
    if name.name == "pair":
        grid = ColourGrid(generator)
        state |= {f"image.{key}": value for key, value in grid.state_dict().items()}
        size = name.size or SIDE
        preprocessing = Preprocessing((size, size), "bilinear", 1.0, "squash", (0.5,) * 3, (0.5,) * 3, options.decode)
        image = ImageEncoder(
            full_name, grid.to(device).eval(), preprocessing, Squash(size), device, options.precision, options.runtime
        )
    elif name.name != "bag":
        raise ValueError(f"{name}: expected test:bag or test:pair")
    return FrozenEncoder(
        full_name,
        name.weights or "pretrained",
        state_digest(state),
        image,
        text,
        logit_scale=20.0 if image else None,
    )


class Squash:
    """Resizes an image to a square, as uint8 (3, H, W)."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Return the pixels."""
        return np.ascontiguousarray(np.asarray(image.resize((self.side, self.side))).transpose(2, 0, 1))


def word_id(word: str) -> int:
    """Return the token of a word."""
    if word in SCALES:
        return VOCABULARY + list(SCALES).index(word)
    return xxhash.xxh3_64_intdigest(word.encode()) % VOCABULARY


def _offered(
    names: Sequence[str], pooled_bD: Tensor, projection: nn.Module, wanted: Sequence[str], model: str
) -> tuple[Tensor, ...]:
    for feature in wanted:
        require_offered(feature, names, model)
    return tuple(pooled_bD if feature == "pooled" else projection(pooled_bD) for feature in wanted)


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)

"""A tiny encoder of images that offers two features, and counts what it is asked for: `two:SEED@SIZE`."""

from collections.abc import Sequence
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from threetowers.cache.encoders import names
from threetowers.cache.encoders.encoder import FrozenEncoder, ImageEncoder, ImageModel, require_offered, state_digest
from threetowers.cache.encoders.names import ENTRY_POINTS, EncoderName, EncoderOptions
from threetowers.cache.format.manifest import Preprocessing
from threetowers.cache.format.views import Pixels, as_pixels

WIDTHS = {"pooled": 12, "cls": 7}


class CountedTransform:
    """Resizes; `calls` are the images that it has seen."""

    calls: ClassVar[list[Image.Image]] = []

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Pixels:
        self.calls.append(image)
        return as_pixels(image.resize((self.size, self.size), Image.Resampling.BICUBIC))


class TwoFeatures(ImageModel):
    """`passes` are the batch size and the features of each forward pass of more than one image."""

    features = tuple(WIDTHS)
    passes: ClassVar[list[tuple[int, tuple[str, ...]]]] = []

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Conv2d(3, 16, 4, stride=4)
        self.heads = nn.ModuleDict({name: nn.Linear(16, width) for name, width in WIDTHS.items()})

    def forward(self, x_b3HW: Tensor, features: Sequence[str]) -> tuple[Tensor, ...]:
        for feature in features:
            require_offered(feature, self.features, "two")
        self.passes.append((len(x_b3HW), tuple(features)))
        hidden_bC = self.body(x_b3HW).relu().mean((2, 3))
        return tuple(self.heads[feature](hidden_bC) for feature in features)


def load_two_features(name: EncoderName, options: EncoderOptions) -> FrozenEncoder:
    size = name.size or 32
    model = TwoFeatures(int(name.name)).eval()
    device = torch.device(options.device)
    preprocessing = Preprocessing((size, size), "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3)
    image = ImageEncoder(
        f"two:{name.name}", model, preprocessing, CountedTransform(size), device, options.precision, options.runtime
    )
    return FrozenEncoder(f"two:{name.name}", "drawn", state_digest(model.state_dict()), image)


@pytest.fixture
def two_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `two:SEED@SIZE` the name of an encoder, and begin to count."""
    known = names.entry_points
    own = EntryPoint("two", f"{__name__}:load_two_features", ENTRY_POINTS)

    def entry_points(**which: Any) -> EntryPoints:
        return EntryPoints([own] if which.get("name") == "two" else known(**which))

    monkeypatch.setattr(names, "entry_points", entry_points)
    TwoFeatures.passes.clear()
    CountedTransform.calls.clear()

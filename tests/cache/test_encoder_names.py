"""Names of encoders are taken apart and put together again, and kinds that other packages bring are found."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.names import EncoderName, encoder_kinds, load_frozen_encoder
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.verify.verify import verify

WORD = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters=":@"), min_size=1, max_size=20)
REVISION = WORD.filter(lambda word: not word.isdecimal())
NAMES = st.builds(
    lambda prefix, name, revision: prefix + name + (f"@{revision}" if revision else ""),
    st.sampled_from(["", "hf-hub:", "local-dir:", "package:"]),
    WORD,
    st.none() | REVISION,
)
WEIGHTS = WORD | WORD.map("package:{}".format) | WORD.map("/a/b@2/{}.pth#state_dict".format)


@settings(deadline=None)
@given(kind=WORD, name=NAMES, size=st.none() | st.integers(1, 9999), weights=st.none() | WEIGHTS)
def test_a_name_is_read_as_it_is_written(kind: str, name: str, size: int | None, weights: str | None) -> None:
    encoder = EncoderName(kind, name, size, weights)
    assert EncoderName.parse(str(encoder)) == encoder


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
@pytest.mark.parametrize("folder", ["plain", "a:b", "a@64", "a:b@c", "a:b@64"])
@pytest.mark.parametrize(("size", "weights"), [(None, None), (96, None), (None, "w.pth"), (96, "/x@y/w.pth#part")])
def test_colons_and_signs_in_the_name_of_a_folder_are_part_of_it(
    prefix: str, folder: str, size: int | None, weights: str | None, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / folder).mkdir()
    encoder = EncoderName("timm", f"{prefix}{tmp_path}/{folder}", size, weights)
    assert EncoderName.parse(str(encoder)) == encoder
    assert encoder.model == f"timm:{tmp_path}/{folder}"


def test_a_folder_that_does_not_exist_ends_at_its_colon() -> None:
    assert EncoderName.parse("timm:no/folder:b@64") == EncoderName("timm", "no/folder", None, "b@64")


@pytest.mark.parametrize("text", ["", "resnet50", "timm:", ":resnet50", "timm:hf-hub:", "timm:@64", "timm::w.pth"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected an encoder as KIND:NAME\[@SIZE\]\[:WEIGHTS\], as in timm:resnet50"):
        EncoderName.parse(text)


def test_a_side_of_no_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="'timm:resnet50@0': expected a side of at least 1 pixel"):
        EncoderName.parse("timm:resnet50@0")


def test_an_unknown_kind_is_answered_by_the_installed_ones() -> None:
    kinds = ", ".join(encoder_kinds())
    assert "timm" in kinds
    with pytest.raises(ValueError, match=f"'tim:resnet50': expected .* of one of the kinds {kinds}, .* found 'tim'"):
        load_frozen_encoder("tim:resnet50")


MODULE = """
import numpy as np
import torch

from threetowers.cache.encoders.encoder import FrozenEncoder, ImageEncoder, ImageModel, state_digest
from threetowers.cache.format.manifest import Preprocessing


class MeanColour(ImageModel):
    features = ("pooled",)

    def forward(self, x_b3HW, features):
        return tuple(x_b3HW.mean((2, 3)) for _ in features)


def transform(image):
    return np.asarray(image.resize((4, 4))).transpose(2, 0, 1)


def load(name, options):
    preprocessing = Preprocessing((4, 4), "bicubic", 1.0, "center", (0.0,) * 3, (0.5,) * 3)
    image = ImageEncoder(name.model, MeanColour(), preprocessing, transform, torch.device(options.device))
    return FrozenEncoder(name.model, "none", state_digest({}), image)
"""
ENTRY_POINTS = """
[threetowers.encoders]
colour = colour_encoders:load
lost = module_that_is_not_there:load
"""


@pytest.fixture
def another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution as pip would install it, which brings two kinds, one of them broken."""
    folder = tmp_path / "site-packages"
    (folder / "colour_encoders-1.0.dist-info").mkdir(parents=True)
    (folder / "colour_encoders-1.0.dist-info/METADATA").write_text("Name: colour-encoders\nVersion: 1.0\n")
    (folder / "colour_encoders-1.0.dist-info/entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "colour_encoders.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("colour_encoders", None)


@pytest.mark.usefixtures("another_package")
def test_a_cache_is_built_by_an_encoder_of_another_package(tars: list[Path], tmp_path: Path) -> None:
    assert "colour" in encoder_kinds()
    build_cache(BuildConfig(tars=tars[1:2], output_dir=tmp_path / "cache", encoder="colour:mean", device="cpu"))
    cache = EmbeddingCache.open(tmp_path / "cache")
    assert (cache.manifest.encoder, cache.manifest.feature, cache.dim) == ("colour:mean", "pooled", 3)
    assert 0 <= np.nanmin(cache.tar(0)) < np.nanmax(cache.tar(0)) <= 2
    assert verify(tmp_path / "cache", tars[1:2], depth="recompute").ok
    with pytest.raises(ValueError, match=r"'lost:x': module_that_is_not_there:load cannot be loaded: No module named"):
        load_frozen_encoder("lost:x")

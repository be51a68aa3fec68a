"""From the bytes of an image to the pixels that teachers embed: decoded once, transformed once for each format."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import xxhash
from PIL import Image

from threetowers.cache.format.views import Params, Pixels, Views
from threetowers.cache.webdataset.images import BadImage, decode_rgb
from threetowers.cache.webdataset.tar_index import key_hash


@dataclass(frozen=True)
class PixelFormat:
    """How caches take their pixels. Without the teacher, so that it can be sent to another process.

    Attributes:
        views: of each image.
        transform: the teacher's, for the center view.
        input_size: (height, width) in pixels.
        interpolation: of crops, in PIL's terms.
        min_side: the shorter side down to which a JPEG may be decoded; None for a full decode.
    """

    views: Views
    transform: Callable[[Image.Image], Pixels]
    input_size: tuple[int, int]
    interpolation: str
    min_side: int | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape (V, 3, H, W) of an image's views."""
        return self.views.count, 3, *self.input_size


def distinct_formats(formats: Sequence[PixelFormat]) -> tuple[list[PixelFormat], list[int]]:
    """Return the formats that differ, and the number among these of each given one.

    Formats with equal pickles give equal pixels, though the transforms of two encoders are never the same object.
    """
    pickles = [pickle.dumps(form) for form in formats]
    order = list(dict.fromkeys(pickles))
    return [formats[pickles.index(each)] for each in order], [order.index(each) for each in pickles]


@dataclass(frozen=True)
class Decoded:
    """An image file: the pixels of its views (V, 3, H, W) and their parameters, by pixel format; or the error."""

    image_hash: int
    views: Mapping[int, tuple[Pixels, Params]] | BadImage
    notes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Decoder:
    """Decodes image files to several pixel formats, up to `max_pixels` pixels each."""

    formats: Sequence[PixelFormat]
    max_pixels: int

    def __call__(self, wanted: Sequence[int], key: str, data: bytes) -> Decoded:
        """Decode an image file, and make its views in the wanted formats. The key of its sample seeds crops."""
        formats = {i: self.formats[i] for i in wanted}
        image_hash = xxhash.xxh3_64_intdigest(data)
        notes: list[str] = []
        images = {}
        try:
            for side in {form.min_side for form in formats.values()}:
                images[side] = decode_rgb(data, max_pixels=self.max_pixels, min_side=side, notes=notes)
        except BadImage as error:
            return Decoded(image_hash, error)
        views = {}
        for i, form in formats.items():
            image = images[form.min_side]
            views[i] = form.views.pixels(image, key_hash(key), form.transform, form.input_size, form.interpolation)
        return Decoded(image_hash, views, frozenset(notes))

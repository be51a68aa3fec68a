"""Image processors of transformers: PIL images to uint8 pixels, and what they do in timm's terms."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from threetowers.cache.encoders.huggingface.loading import ModelFiles
from threetowers.cache.format.manifest import DecodeMode, Preprocessing

PROBE_SIZE = (97, 61)  # width and height: neither square nor a multiple of anything
TOLERANCE = 1e-4  # of normalised pixels: libraries divide and subtract in another order


@dataclass(frozen=True)
class HfTransform:
    """A processor up to its pixels: no rescaling, no normalisation."""

    processor: Any

    def __call__(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Return the (3, H, W) uint8 pixels of an RGB image."""
        output = self.processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")
        pixels: npt.NDArray[np.uint8] = output["pixel_values"][0]
        return pixels


def load_image_transform(
    files: ModelFiles, size: int | None, decode: DecodeMode, name: str
) -> tuple[HfTransform, Preprocessing]:
    """Return the processor of a model up to its pixels, and its statement.

    Pillow resizes, as in the training of the models of transformers; torchvision's own kernels, which transformers
    prefers where it finds them, differ in the last bits from machine to machine.

    Args:
        files: Of the model.
        size: Side of the square input in pixels; None: the processor's own.
        decode: How images are decoded.
        name: Of the encoder, for messages.

    Raises:
        ValueError: There is no processor, or it does what cannot be stated.
    """
    from transformers import AutoImageProcessor

    processor: Any = files.load("image processor", AutoImageProcessor.from_pretrained, backend="pil")
    try:
        input_size, crop_pct, crop_mode = _geometry(processor)
        if size is not None and (size, size) != input_size:
            _resize(processor, size, crop_pct)
            input_size = (size, size)
        preprocessing = Preprocessing(
            input_size=input_size,
            interpolation=Image.Resampling(processor.resample).name.lower(),
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            mean=tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
            std=tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
            decode=decode,
        )
        transform = HfTransform(processor)
        _compare(transform, preprocessing)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: expected an image processor that resizes, crops and normalises to one size, found "
            f"{type(processor).__name__}: {error}"
        ) from error
    return transform, preprocessing


def _geometry(processor: Any) -> tuple[tuple[int, int], float, str]:
    """Return input size (height, width), crop share and crop mode, in timm's terms."""
    size = dict(processor.size)
    edge, height, width = (size.get(key) for key in ("shortest_edge", "height", "width"))
    crop_pct = getattr(processor, "crop_pct", None)
    if edge and crop_pct is not None:  # ConvNeXt: large inputs are squashed, small ones cropped
        return ((edge, edge), 1.0, "squash") if edge >= 384 else ((edge, edge), float(crop_pct), "center")
    if getattr(processor, "do_center_crop", False):
        crop = dict(processor.crop_size)
        target = (crop["height"], crop["width"])
        if edge and not size.get("longest_edge"):
            return target, min(target) / edge, "center"
        if height and width and target[0] * width == target[1] * height:
            return target, target[0] / height, "squash"
    elif height and width:
        return (height, width), 1.0, "squash"
    raise ValueError(f"its size { ({key: value for key, value in size.items() if value}) } is not one size for all")


def _resize(processor: Any, size: int, crop_pct: float) -> None:
    """Let a processor give squares of another size, of the same share of the image."""
    if getattr(processor, "crop_pct", None) is not None:
        processor.size = {"shortest_edge": size}
        return
    resized = size
    if getattr(processor, "do_center_crop", False):
        resized = round(size / crop_pct)
        processor.crop_size = {"height": size, "width": size}
    by_edge = dict(processor.size).get("shortest_edge")
    processor.size = {"shortest_edge": resized} if by_edge else {"height": resized, "width": resized}


def _compare(transform: HfTransform, preprocessing: Preprocessing) -> None:
    """Raise ValueError unless pixels, normalised as stated, are what the processor gives by itself."""
    noise = np.random.default_rng(0).integers(0, 256, (PROBE_SIZE[1], PROBE_SIZE[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    pixels = np.asarray(transform(image))
    expected = torch.as_tensor(np.asarray(transform.processor(images=image, return_tensors="np")["pixel_values"][0]))
    if pixels.dtype != np.uint8 or pixels.shape != (3, *preprocessing.input_size):
        raise ValueError(f"it gives {pixels.shape} {pixels.dtype}, expected {(3, *preprocessing.input_size)} uint8")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    difference = float(((torch.from_numpy(pixels) / 255 - mean) / std - expected).abs().max())
    if difference > TOLERANCE:
        raise ValueError(f"its normalisation is not (x / 255 - mean) / std: it differs by {difference:.1g}")

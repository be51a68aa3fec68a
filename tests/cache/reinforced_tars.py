"""Tars as those of DataCompDR for tests, made as its authors make them: by torchvision and webdataset's writer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from PIL import Image
from torchvision.transforms import InterpolationMode, RandAugment, RandomResizedCrop
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

CROP_SIDE = 224
MAGNITUDE = 9
SPACE = RandAugment()._augmentation_space(31, (CROP_SIDE, CROP_SIDE))
OP_NAMES = list(SPACE)

Crop = list[Any]  # [[top, left, height, width], [[operation, magnitude], ...]]


class Reinforcement(NamedTuple):
    """What the tars say of one sample; the (n, W) rows are those of all teachers side by side."""

    uid: str
    crops: list[Crop]
    image_emb: np.ndarray
    captions: list[str]  # synthetic ones
    text_emb: np.ndarray


def draw_crop(image: Image.Image, seed: int) -> Crop:
    """A random resized crop and two operations; a few seeds have all of them, in both directions."""
    torch.manual_seed(seed)
    box = RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
    ops = []
    for op_id in (2 * seed % 14, (2 * seed + 1) % 14):
        magnitudes, signed = SPACE[OP_NAMES[op_id]]
        magnitude = float(magnitudes[MAGNITUDE]) if magnitudes.ndim else 0.0
        ops.append([op_id, -magnitude if signed and seed % 3 == 0 else magnitude])
    return [list(box), ops]


def show_crop(image: Image.Image, crop: Crop) -> Image.Image:
    """The crop as the teachers saw it."""
    box, ops = crop
    shown = F.resized_crop(image, *box, [CROP_SIDE, CROP_SIDE], InterpolationMode.BICUBIC)
    for op_id, magnitude in ops:
        shown = _apply_op(shown, OP_NAMES[op_id], magnitude, InterpolationMode.NEAREST, None)
    return shown


def members(sample: Reinforcement, kind: str = "npz") -> dict[str, Any]:
    """The members of a sample as they are given to the writer: float32 in npz, bfloat16 in pth.gz."""
    embeddings: dict[str, Any] = {"image_emb": sample.image_emb, "text_emb": sample.text_emb}
    if kind == "pth.gz":
        embeddings = {name: torch.tensor(rows, dtype=torch.bfloat16) for name, rows in embeddings.items()}
    return {
        "url.txt": f"http://x.invalid/{sample.uid}.jpg",
        "syn.json": json.dumps({"syn_text": sample.captions}),
        "paug.json": json.dumps({"param_aug": sample.crops}),
        kind: embeddings,
        "json": json.dumps({"uid": sample.uid, "sha256": "0" * 64}),
    }


def write_reinforced(path: Path, samples: Sequence[tuple[str, dict[str, Any]]]) -> Path:
    """A tar of (key, members)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as sink:
        for key, found in samples:
            sink.write({"__key__": key} | found)
    return path

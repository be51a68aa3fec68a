"""Pretraining of the equal arm's teachers: classifiers of the main image tower's architecture and input size."""

import gzip
import io
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn import functional as F

from reproduce.folder import Folder, write_json
from reproduce.packages import FASHION_MNIST, read_archive_member
from reproduce.plan import Pretraining
from threetowers.cache.webdataset.sample import read_annotation, read_image
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.trainer.data.transforms import augment, center_crop, random_crop
from threetowers.trainer.model.towers.pointwise import subsample_before_pointwise

logger = logging.getLogger(__name__)
FASHION = "./usr/share/datasets/fashion-mnist/train-{}-ubyte.gz"
FASHION_IMAGES = 20_000
HELD_OUT_EVERY = 10  # one image in so many is kept for the accuracy that is reported

LabelledImages = tuple[list[Image.Image], list[int]]


def pretrain(kind: str, how: Pretraining, folder: Folder, out: Path) -> None:
    """Train a classifier and save it into a folder as timm does, with `pretraining.json` about its training.

    A folder that has that file is left as it is.

    Args:
        kind: Data: emoji, fashion-mnist, or nothing for random weights.
        how: Architecture and settings of the training.
        folder: The folder of the reproduction.
        out: Where the classifier is saved.

    Raises:
        NotAvailable: If the images cannot be obtained.
    """
    if (out / "pretraining.json").exists():
        return
    started = time.perf_counter()
    images, labels = SOURCES[kind](folder)
    classes = max(labels, default=-1) + 1
    torch.manual_seed(how.seed)
    model = timm.create_model(how.model, pretrained=False, num_classes=classes)
    subsample_before_pointwise(model)
    facts: dict[str, float] = {"images": len(images), "classes": classes}
    if images:
        facts |= _train(model, images, labels, how)
    size = how.image_size
    data = {"input_size": (3, size, size), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    model.to(memory_format=torch.contiguous_format)  # channels_last cannot be saved
    save_for_hf(model, str(out), model_args={"num_classes": classes}, data_config=data, safe_serialization=True)
    write_json(out / "pretraining.json", facts | {"seconds": time.perf_counter() - started})


def load_emoji(folder: Folder) -> LabelledImages:
    """Return the training concepts in the teacher's styles, labelled by subgroup."""
    tar = index_tar(folder["data/teacher.tar"])
    names = []
    images = []
    for ordinal in range(len(tar.samples)):
        names.append(str(read_annotation(tar, ordinal).fields["subgroup"]))
        images.append(read_image(tar, ordinal, 1 << 20))
    label = {name: number for number, name in enumerate(sorted(set(names)))}
    return images, [label[name] for name in names]


def load_fashion(folder: Folder) -> LabelledImages:
    """Return the first images of Fashion-MNIST (28 x 28, grey, ten kinds of clothes), from its Debian package."""

    def array(kind: str, header: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        packed = read_archive_member(FASHION_MNIST, FASHION.format(kind), folder["packages"])
        with gzip.open(io.BytesIO(packed)) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    pixels = array("images-idx3", 16).reshape(-1, 28, 28)[:FASHION_IMAGES]
    labels = array("labels-idx1", 8)[:FASHION_IMAGES]
    return [Image.fromarray(image).convert("RGB") for image in pixels], labels.tolist()


def load_nothing(folder: Folder) -> LabelledImages:
    """Return no images, for a teacher with random weights."""
    return [], []


SOURCES = {"emoji": load_emoji, "fashion-mnist": load_fashion, "nothing": load_nothing}


def _train(
    model: nn.Module, images: Sequence[Image.Image], labels: Sequence[int], how: Pretraining
) -> dict[str, float]:
    """Train a classifier on most of the images; return its seconds a step and its accuracy on the others."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    mean = torch.tensor(cfg["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(cfg["std"]).view(1, 3, 1, 1)
    rng = np.random.default_rng(how.seed)
    order = rng.permutation(len(images))
    held_out = order[::HELD_OUT_EVERY]
    training = np.delete(order, np.s_[::HELD_OUT_EVERY])
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.lr, total_steps=how.steps, pct_start=0.1)

    def logits(views: list[Tensor]) -> Tensor:
        x_b3HW = (torch.stack(views).float() / 255 - mean) / std
        scores: Tensor = model(x_b3HW.contiguous(memory_format=torch.channels_last))
        return scores

    model.train().to(memory_format=torch.channels_last)
    started = time.perf_counter()
    for step in range(how.steps):
        chosen = rng.choice(training, how.batch)
        crops = [random_crop(images[n], how.image_size, how.crop_scale, rng) for n in chosen]
        views = [augment(crop, how.augment, rng) for crop in crops]
        loss = F.cross_entropy(logits(views), torch.tensor([labels[n] for n in chosen]), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            logger.info("pretraining: step %d/%d, loss %.3f", step + 1, how.steps, loss.item())
    per_step = (time.perf_counter() - started) / how.steps

    model.eval()
    correct = []
    with torch.inference_mode():
        for start in range(0, len(held_out), how.batch):
            batch = held_out[start : start + how.batch]
            predicted = logits([center_crop(images[n], how.image_size) for n in batch]).argmax(1)
            correct += (predicted == torch.tensor([labels[n] for n in batch])).tolist()
    return {
        "steps": how.steps,
        "seconds_per_step": per_step,
        "held_out_accuracy": float(np.mean(correct)),
        "held_out": len(correct),
    }

"""The teachers of the equal arm: classifiers of the main image tower's architecture and input size, trained here."""

import gzip
import io
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn import functional as F

from reproduce.folder import Folder, write_json
from reproduce.packages import FASHION_MNIST, member
from reproduce.plan import Pretraining
from threetowers.cache.webdataset.sample import read_annotation, read_image
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.trainer.data.transforms import augment, center_crop, random_crop
from threetowers.trainer.model.pointwise import subsample_before_pointwise

logger = logging.getLogger(__name__)
FASHION = "./usr/share/datasets/fashion-mnist/train-{}-ubyte.gz"
FASHION_PICTURES = 20_000
HELD_BACK = 10  # one picture in so many is kept for the accuracy that is reported

Labelled = tuple[list[Image.Image], list[int]]


def pretrain(kind: str, how: Pretraining, folder: Folder, out: Path) -> None:
    """Leave a classifier in the folder `out`, as timm saves it, and what became of it in pretraining.json.

    kind: emoji, fashion-mnist, or nothing: random weights. Raises NotAvailable where its pictures cannot be had.
    """
    if (out / "pretraining.json").exists():
        return
    started = time.perf_counter()
    pictures, labels = SOURCES[kind](folder)
    classes = max(labels, default=-1) + 1
    torch.manual_seed(how.seed)
    model = timm.create_model(how.model, pretrained=False, num_classes=classes)
    subsample_before_pointwise(model)
    facts: dict[str, float] = {"pictures": len(pictures), "classes": classes}
    if pictures:
        facts |= _train(model, pictures, labels, how)
    size = how.image_size
    data = {"input_size": (3, size, size), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    model.to(memory_format=torch.contiguous_format)  # the other cannot be saved
    save_for_hf(model, str(out), model_args={"num_classes": classes}, data_config=data, safe_serialization=True)
    write_json(out / "pretraining.json", facts | {"seconds": time.perf_counter() - started})


def emoji(folder: Folder) -> Labelled:
    """The training concepts in the teacher's styles, by subgroup."""
    tar = index_tar(folder["data/teacher.tar"])
    names = [str(read_annotation(tar, n).fields["subgroup"]) for n in range(len(tar.samples))]
    number = {name: storage for storage, name in enumerate(sorted(set(names)))}
    return [read_image(tar, n, 1 << 20) for n in range(len(tar.samples))], [number[name] for name in names]


def fashion(folder: Folder) -> Labelled:
    """The first pictures of Fashion-MNIST (28 x 28, grey, ten kinds of clothes), as a Debian package ships it."""

    def array(kind: str, header: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        packed = member(FASHION_MNIST, FASHION.format(kind), folder["packages"])
        with gzip.open(io.BytesIO(packed)) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    pixels = array("images-idx3", 16).reshape(-1, 28, 28)[:FASHION_PICTURES]
    return [Image.fromarray(one).convert("RGB") for one in pixels], array("labels-idx1", 8)[:FASHION_PICTURES].tolist()


def nothing(folder: Folder) -> Labelled:
    """No pictures: a teacher with random weights."""
    return [], []


SOURCES = {"emoji": emoji, "fashion-mnist": fashion, "nothing": nothing}


def _train(
    model: nn.Module, pictures: Sequence[Image.Image], labels: Sequence[int], how: Pretraining
) -> dict[str, float]:
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))  # type: ignore[index]
    rng = np.random.default_rng(how.seed)
    order = rng.permutation(len(pictures))
    held, learned = order[::HELD_BACK], np.delete(order, np.s_[::HELD_BACK])
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.lr, total_steps=how.steps, pct_start=0.1)

    def logits(views: list[Tensor]) -> Tensor:
        x_b3HW = (torch.stack(views).float() / 255 - mean) / std
        scores: Tensor = model(x_b3HW.contiguous(memory_format=torch.channels_last))
        return scores

    model.train().to(memory_format=torch.channels_last)
    started = time.perf_counter()
    for step in range(how.steps):
        chosen = rng.choice(learned, how.batch)
        crops = [random_crop(pictures[n], how.image_size, how.crop_scale, rng) for n in chosen]
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
    right = []
    with torch.inference_mode():
        for start in range(0, len(held), how.batch):
            part = held[start : start + how.batch]
            found = logits([center_crop(pictures[n], how.image_size) for n in part]).argmax(1)
            right += (found == torch.tensor([labels[n] for n in part])).tolist()
    return {
        "steps": how.steps,
        "seconds_per_step": per_step,
        "held_back_accuracy": float(np.mean(right)),
        "held_back": len(right),
    }

"""The data of later steps: tars of images the size of photographs, a tokenizer, and a cache by a tiny teacher.

The images are smooth fields of colour under noise, so that their JPEG files and their decoding are those of photographs
(about 60 kB). Captions are drawn from a small vocabulary.
"""

import io
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from webdataset import TarWriter

from tests.gpu.setting import Setting
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.trainer.tokenizer import train_tokenizer

NOUNS = ["boat", "tower", "street", "dog", "bridge", "window", "horse", "table", "garden", "train", "child", "lamp"]
ADJECTIVES = ["red", "old", "small", "wooden", "bright", "distant", "quiet", "broken", "tall", "wet"]
PLACES = ["harbour", "field", "station", "kitchen", "forest", "square", "river", "museum"]


@dataclass(frozen=True)
class Photographs:
    """What this step leaves in the scratch folder, and how much of it there is."""

    folder: Path
    tars: int
    per_tar: int
    size: tuple[int, int]  # width, height in pixels
    vocab_size: int

    @classmethod
    def of(cls, setting: Setting) -> "Photographs":
        """Return those of a day at a GPU, or of a rehearsal."""
        folder = setting.scratch / "photographs"
        if setting.rehearse:
            return cls(folder, 2, 16, (64, 48), 64)
        return cls(folder, 20, 512, (500, 375), 128)

    @property
    def train_tars(self) -> list[str]:
        """The tars to train and to build from."""
        return [str(self.folder / f"train-{number:03d}.tar") for number in range(self.tars)]

    @property
    def test_tar(self) -> str:
        """The tar to evaluate on."""
        return str(self.folder / "test-000.tar")

    @property
    def tokenizer(self) -> str:
        """The SentencePiece model."""
        return str(self.folder / "tokenizer.model")

    @property
    def cache(self) -> str:
        """A cache of the training tars by a tiny teacher: rows for a third tower, soon there."""
        return str(self.folder / "cache")


def run(setting: Setting) -> None:
    data = Photographs.of(setting)
    data.folder.mkdir(parents=True)
    jobs = [(path, number * data.per_tar, data) for number, path in enumerate([*data.train_tars, data.test_tar])]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork")) as pool:
        list(pool.map(write, jobs))
    captions = [caption(np.random.default_rng(number)) for number in range(1000)]
    Path(data.tokenizer).write_bytes(train_tokenizer(captions, data.vocab_size))
    weights = data.folder / "test_vit.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), weights)
    build_cache(
        BuildConfig(tars=data.train_tars, output_dir=data.cache, encoder=f"timm:test_vit:{weights}", device="cpu")
    )


def write(job: tuple[str, int, Photographs]) -> None:
    """Write a tar of samples first, first + 1, ..."""
    path, first, data = job
    with TarWriter(path) as tar:
        for number in range(first, first + data.per_tar):
            rng = np.random.default_rng(number)
            tar.write(
                {"__key__": f"{number:07d}", "jpg": photograph(rng, data.size), "json": {"caption": caption(rng)}}
            )


def photograph(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """Return a JPEG file: a few colours that flow into each other, and the noise of a sensor."""
    coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
    noisy = smooth + rng.normal(0, 9, smooth.shape).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def caption(rng: np.random.Generator) -> str:
    """Return a sentence."""
    one, other = (f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
    return f"a {one} beside a {other} in the {rng.choice(PLACES)}"

"""Small tars of synthetic images, and tiny encoders with random weights saved to disk."""

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

Samples = Sequence[tuple[str, Mapping[str, bytes]]]


def picture(seed: int, size: tuple[int, int] = (40, 52)) -> Image.Image:
    """A smooth random image, (width, height)."""
    grid = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, samples: Samples, mtime: int = 1_700_000_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime = len(data), mtime
                archive.addfile(info, io.BytesIO(data))
    return path


def make_samples(n: int, seed: int) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (f"part/{seed:02d}{i:05d}", {"png": encoded(picture(1000 * seed + i)), "txt": f"picture {i}".encode()})
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def pack() -> Callable[..., Path]:
    """pack(path, samples, mtime=...): write a tar; samples are (key, {extension: bytes})."""
    return write_tar


@pytest.fixture(scope="session")
def samples() -> Callable[[int, int], list[tuple[str, dict[str, bytes]]]]:
    """samples(n, seed): n samples of one image and one text."""
    return make_samples


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """encode(image, kind="png"): the bytes of an image."""
    return encoded


@pytest.fixture(scope="session")
def draw() -> Callable[..., Image.Image]:
    """draw(seed, size=(40, 52)): a random image."""
    return picture


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three tars of 23, 7 and 12 samples, in two folders."""
    root = tmp_path_factory.mktemp("tars")
    sizes = (("a/0.tar", 23), ("a/1.tar", 7), ("b/0.tar", 12))
    return [write_tar(root / name, make_samples(n, i)) for i, (name, n) in enumerate(sizes)]


def save_weights(folder: Path, model: str, seed: int = 0, scale: float = 1.0) -> str:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    state = {name: value.clone() for name, value in timm.create_model(model, pretrained=False).state_dict().items()}
    if scale != 1.0:
        state["norm.weight"] *= scale
    path = folder / f"{model}-{seed}-{scale:g}.safetensors"
    save_file(state, path)
    return str(path)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """weights(model, seed=0, scale=1): a safetensors file of random weights; `scale` enlarges a ViT's last norm."""
    folder = tmp_path_factory.mktemp("weights")
    return lambda model, seed=0, scale=1.0: save_weights(folder, model, seed, scale)


@pytest.fixture(scope="session")
def tiny_encoder(weights: Callable[..., str]) -> Callable[..., str]:
    """tiny_encoder("test_vit@64", seed=0, scale=1): the name of a timm encoder of these `weights`."""
    return lambda model, **which: f"timm:{model}:{weights(model.partition('@')[0], **which)}"

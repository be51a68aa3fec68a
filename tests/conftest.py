"""A small set of tars with pictures and captions, a tokenizer and configs that train on it in seconds."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.crashes import pytest_handlecrashitem, pytest_runtest_logreport
from threetowers.trainer.tokenizer import train_tokenizer

__all__ = ["pytest_handlecrashitem", "pytest_runtest_logreport"]  # pytest finds its hooks here

COLOURS = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}
THINGS = ("disc", "bar", "frame", "dot", "cross")


def picture(colour: str, thing: str, seed: int) -> bytes:
    """A PNG of a coloured thing on a noisy ground."""
    pixels = np.random.default_rng(seed).integers(200, 256, (32, 32, 3), dtype=np.uint8)
    y, x = np.mgrid[:32, :32] - 16
    masks = {
        "disc": x**2 + y**2 < 100,
        "bar": abs(y) < 4,
        "frame": np.maximum(abs(x), abs(y)) // 4 == 2,
        "dot": x**2 + y**2 < 16,
        "cross": np.minimum(abs(x), abs(y)) < 3,
    }
    pixels[masks[thing]] = COLOURS[colour]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> Path:
    """A webdataset tar of (key, members by extension)."""
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def samples_of(start: int, count: int) -> list[tuple[str, dict[str, bytes]]]:
    """Pictures of the combinations of colour and thing, in turn; the concept is the combination."""
    made = []
    for number in range(start, start + count):
        colour, thing = list(COLOURS)[number % 4], THINGS[number % 5]
        fields = {"captions": [f"a {colour} {thing}", f"{thing}, {colour}"], "concept": f"{colour} {thing}"}
        members = {"png": picture(colour, thing, number), "json": json.dumps(fields).encode()}
        made.append((f"s{number:04d}", members))
    return made


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tars of unequal length: 45 samples of 20 concepts."""
    folder = tmp_path_factory.mktemp("tars")
    return [
        write_tar(folder / "a.tar", samples_of(0, 25)),
        write_tar(folder / "b.tar", samples_of(25, 20)),
    ]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer([f"a {c} {t}" for c in COLOURS for t in THINGS] * 2, 48))
    return path


@pytest.fixture
def clip(tars: list[Path], tokenizer: Path, tmp_path: Path) -> dict[str, Any]:
    """A CLIP run on the small tars, as a plain tree."""
    return {
        "output_dir": str(tmp_path / "clip"),
        "global_batch_size": 12,
        "duration": {"steps": 6},
        "embed_dim": 16,
        "data": {
            "tars": [str(tar) for tar in tars],
            "tokenizer": str(tokenizer),
            "image_size": 32,
            "context_length": 8,
            "group_field": "concept",
            "workers": 0,
        },
        "towers": {
            "image": {"kind": "timm", "model": "test_vit"},
            "text": {"kind": "text", "width": 16, "depth": 1, "heads": 2},
        },
        "heads": {"f": {"of": "image"}, "g": {"of": "text"}},
        "terms": {"image-text": {"x": "f", "y": "g"}},
        "deploy": {"image": "f", "text": "g"},
        "log": {"every_steps": 1},
    }


@pytest.fixture(scope="session")
def cache(tars: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the small tars, by a small convolutional teacher with random weights."""
    import timm
    import torch
    from safetensors.torch import save_file

    from threetowers.cache.builder.build import build_cache
    from threetowers.cache.builder.build_config import BuildConfig

    folder = tmp_path_factory.mktemp("cache")
    torch.manual_seed(5)
    weights = folder / "teacher.safetensors"
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
    build_cache(
        BuildConfig(
            tars=[str(tar) for tar in tars],
            output_dir=folder / "cache",
            encoder=f"timm:test_resnet@64:{weights}",
        )
    )
    return folder / "cache"


@pytest.fixture
def three(clip: dict[str, Any], cache: Path, tmp_path: Path) -> dict[str, Any]:
    """A Three Towers run on the small tars, as a plain tree."""
    third = {"kind": "cache", "path": str(cache)}
    heads = {"f_h": {"of": "f"}, "g_h": {"of": "g"}, "h_f": {"of": "third"}, "h_g": {"of": "third"}}
    terms = {"image-third": {"x": "f_h", "y": "h_f"}, "text-third": {"x": "g_h", "y": "h_g"}}
    return clip | {
        "output_dir": str(tmp_path / "three"),
        "towers": clip["towers"] | {"third": third},
        "heads": clip["heads"] | heads,
        "terms": clip["terms"] | terms,
    }


@pytest.fixture
def lit(clip: dict[str, Any], cache: Path, tmp_path: Path) -> dict[str, Any]:
    """A LiT run on the small tars, as a plain tree: the cached teacher is the image tower."""
    towers = {"third": {"kind": "cache", "path": str(cache)}, "text": clip["towers"]["text"]}
    heads = {"h": {"of": "third"}, "g": {"of": "text"}}
    return clip | {
        "output_dir": str(tmp_path / "lit"),
        "towers": towers,
        "heads": heads,
        "terms": {"image-text": {"x": "h", "y": "g"}},
        "deploy": {"image": "h", "text": "g"},
    }


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URL of a bucket of an S3 server on loopback, which also child processes find through the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="towers")
        yield "s3://towers"
    server.stop()

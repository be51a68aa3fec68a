"""The names that users of timm and open_clip have, wherever a model is named: folders, and the hub of Hugging Face."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

from tests.cache.tiny_open_clip import save_open_clip
from threetowers.cache.encoders.encoder import state_digest
from threetowers.cache.encoders.live import live_teacher
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.format.manifest import Manifest
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.load import load_encoder
from threetowers.trainer.config import ImageTower
from threetowers.trainer.model.initial.initial_weights import load_initial
from threetowers.trainer.model.towers.timm_tower import TimmTower

MakeRepo = Callable[[str], Path]


def save_timm(folder: Path, seed: int = 0) -> str:
    """Save a small model as timm does, and return its digest."""
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", pretrained=False, num_classes=7)
    data = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3)}
    save_for_hf(model, str(folder), model_args={"num_classes": 7}, data_config=data, safe_serialization=True)
    return state_digest(model.state_dict())


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRepo:
    """repo(name): the folder in which the hub's client has the files of a repository that it has downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def make(name: str) -> Path:
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(snapshot.name)
        return snapshot

    return make


def test_timm_models_of_the_hub(repo: MakeRepo) -> None:
    digest = save_timm(repo("me/tiny"))
    teacher = load_frozen_encoder("timm:hf-hub:me/tiny")
    assert (teacher.name, teacher.weights, teacher.weights_digest) == ("timm:hf-hub:me/tiny", "pretrained", digest)
    assert teacher.side("image").preprocessing.mean == (0.1, 0.2, 0.3)
    encoder = load_encoder("timm:hf-hub:me/tiny@64", LoadOptions(workers=0))
    assert (encoder.info.name, encoder.info.digest) == ("timm:tiny", digest)
    assert "64 x 64" in encoder.info.preprocessing
    at_revision = load_encoder("timm:hf-hub:me/tiny@main", LoadOptions(workers=0))
    assert (at_revision.info.digest, "32 x 32" in at_revision.info.preprocessing) == (digest, True)
    config = ImageTower("timm", "hf-hub:me/tiny", init="pretrained")
    tower = TimmTower(config, 32)
    load_initial(tower, config, "init")
    assert tower.model.state_dict()["conv1.0.weight"].equal(
        teacher.side("image").model.state_dict()["model.conv1.0.weight"]
    )


def test_folders_of_timm(tmp_path: Path) -> None:
    digest = save_timm(tmp_path / "a:b@c")
    other = tmp_path / "other.pth"
    torch.save({"state_dict": timm.create_model("test_resnet", pretrained=False, num_classes=3).state_dict()}, other)
    for name in (f"{tmp_path}/a:b@c", f"local-dir:{tmp_path}/a:b@c"):
        teacher = load_frozen_encoder(f"timm:{name}")
        assert (teacher.name, teacher.weights_digest) == (f"timm:{tmp_path}/a:b@c", digest)
        assert load_encoder(f"timm:{name}", LoadOptions(workers=0)).info.digest == digest
        assert load_frozen_encoder(f"timm:{name}:{other}").weights == "file:other.pth#state_dict"
        assert TimmTower(ImageTower("timm", name), 32).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    manifest = Manifest(
        encoder=teacher.name,
        weights=teacher.weights,
        weights_digest=digest,
        feature="pooled",
        dim=teacher.side("image").width(),
        dtype="float16",
        samples_per_tar=1,
        rows_per_tar=1,
        chunk_rows=1,
        versions={},
        preprocessing=teacher.side("image").preprocessing,
    )
    assert live_teacher(manifest).weights_digest == digest
    save_timm(tmp_path / "plain")
    encoder = load_encoder(f"timm:local-dir:{tmp_path}/plain@64:{other}#state_dict", LoadOptions(workers=0))
    assert (encoder.info.name, encoder.dim) == ("timm:plain:other", 96)


def test_models_of_open_clip(repo: MakeRepo, tmp_path: Path) -> None:
    digest = save_open_clip(repo("me/clip"))
    save_open_clip(tmp_path / "clip:folder")
    for name in ("hf-hub:me/clip", f"local-dir:{tmp_path}/clip:folder", f"{tmp_path}/clip:folder"):
        encoder = load_encoder(f"open_clip:{name}", LoadOptions(workers=0))
        assert encoder.info.digest == digest, name
        assert "mean 0.1, 0.2, 0.3" in encoder.info.preprocessing
        assert encoder.info.name in ("open_clip:clip", "open_clip:clip:folder")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "timm:hf-hub:me/none",
            r"the pretrained weights of 'hf-hub:me/none': .* name their folder instead",
        ),
        ("open_clip:hf-hub:me/none", "open_clip cannot load hf-hub:me/none: .* name their folder or file instead"),
        ("open_clip:ViT-B-32:openai", "cannot load ViT-B-32 with the weights 'openai': .* name their folder or file"),
        ("timm:test_resnet", "cannot load the pretrained weights of 'test_resnet': .* as the path of a"),
        ("timm:local-dir:nowhere", r"'local-dir:nowhere': .* found no config\.json"),
        ("timm:me/none", "'me/none' is unknown to timm .*; a model of the hub is hf-hub:me/none"),
        ("timm:test_resnet@big", "'test_resnet@big' is unknown to timm"),
        ("open_clip:local-dir:nowhere", r"found no open_clip_config\.json in it"),
        ("open_clip:ViT-B32", r"no folder, and unknown to open_clip .*ViT-B-32"),
        ("open_clip:ViT-B-32:nothing", "'nothing' is neither a file nor a pretrained tag of it; its tags: openai, "),
        ("open_clip:hf-hub:", "open_clip"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(repo: MakeRepo, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_encoder(name, LoadOptions(workers=0))
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


def test_a_tower_that_cannot_be_had_is_said_in_one_line(repo: MakeRepo) -> None:
    with pytest.raises(ValueError, match=r"image tower: timm cannot create .*hf-hub:me/none.* name their folder"):
        TimmTower(ImageTower("timm", "hf-hub:me/none"), 32)

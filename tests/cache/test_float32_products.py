"""TF32 is allowed or forbidden for a process, and forbidden for a while whatever the process has set."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from threetowers.cache.processes.float32_products import allow_tf32, exact_products

BACKENDS: list[Any] = [
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
]


def settings() -> list[str]:
    return [backend.fp32_precision for backend in BACKENDS]


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    before, matmul, convolutions = settings(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions
    for backend, setting in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = setting


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_allowed_or_forbidden_by_both_of_torchs_names(allowed: bool) -> None:
    allow_tf32(allowed)
    assert set(settings()[:2]) <= ({"tf32"} if allowed else {"ieee", "none"})  # none: as a default, which is exact
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is allowed
    before = settings()
    with exact_products():
        assert settings() == ["ieee"] * 4
    assert settings() == before
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")


def test_settings_come_back_after_an_error() -> None:
    allow_tf32(True)
    with pytest.raises(KeyError), exact_products():
        raise KeyError
    assert settings()[:2] == ["tf32", "tf32"]

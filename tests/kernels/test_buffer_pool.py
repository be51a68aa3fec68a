"""The memory of logit caches between steps: reused, and never by two at once."""

import pytest
import torch
from torch import Tensor

from threetowers.kernels import buffer_pool, contrastive_loss
from threetowers.kernels.buffer_pool import MAX_FREE, BufferPool

CPU = torch.device("cpu")
COUNT = 2**19  # 2 MiB of float32


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_pool, "MIN_BYTES", 2**20)


def address_of(pool: BufferPool, count: int = COUNT) -> int:
    """Return where the next buffer lies; it is given back at once."""
    return pool.take(count, torch.float32, CPU).data_ptr()


def test_a_buffer_is_free_when_its_last_tensor_is() -> None:
    pool = BufferPool()
    first_n = pool.take(COUNT, torch.float32, CPU).fill_(1)
    view_n, address = first_n[7:9].detach(), first_n.data_ptr()
    del first_n
    assert address_of(pool) != address  # the view still reads it
    assert view_n.tolist() == [1, 1]
    del view_n
    assert address_of(pool) == address
    doubles_n = pool.take(COUNT // 2, torch.float64, CPU)
    assert (doubles_n.data_ptr(), doubles_n.dtype, len(doubles_n)) == (address, torch.float64, COUNT // 2)


def test_the_number_of_free_buffers_is_bounded() -> None:
    pool = BufferPool()
    alive = [pool.take(COUNT, torch.float32, CPU) for _ in range(MAX_FREE + 5)]
    assert len({part.data_ptr() for part in alive}) == MAX_FREE + 5
    alive.clear()
    (free,) = pool._free.values()
    assert len(free) == MAX_FREE
    address_of(pool, COUNT + 1)  # another size: the old ones are freed
    assert list(map(len, pool._free.values())) == [1]


def test_small_buffers_and_other_devices_are_left_to_torch() -> None:
    pool = BufferPool()
    assert pool.take(3, torch.float32, CPU).shape == (3,)
    assert pool.take(COUNT, torch.float32, torch.device("meta")).is_meta
    assert not pool._free


def test_graphs_alive_at_once_have_separate_caches() -> None:
    """Forward, forward, backward, backward; then again in the same memory. As without a cache, to the bit."""
    batches = [torch.randn(2, 600, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]

    def losses(cache_bytes: int) -> list[tuple[Tensor, list[Tensor]]]:
        made = []
        for pair in batches:
            leaves = [*pair.clone().unbind(), torch.zeros(1)]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            made.append((contrastive_loss(*leaves, logit_cache_bytes=cache_bytes), leaves))  # type: ignore[arg-type]
        return made

    truth = [torch.autograd.grad(loss, leaves) for loss, leaves in losses(0)]
    for _ in range(2):
        made = losses(2**22)
        for again in (True, False):
            for (loss, leaves), want in zip(made, truth, strict=True):
                found = torch.autograd.grad(loss, leaves, retain_graph=again)
                assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        del loss, leaves, made
    assert sorted(map(len, buffer_pool.buffer_pool()._free.values())) == [
        2
    ]  # both graphs' buffers wait for the next step

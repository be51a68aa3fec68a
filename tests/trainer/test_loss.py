"""The way from the command line to the loss, and the ring: the same loss and gradients as with gathered columns."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.trainer.launches import run_command, write_config
from tests.trainer.small_models import inputs_of, model_of
from tests.trainer.test_config import THREE
from threetowers.trainer.loss import total_loss

LOSS_STACK = str(Path(__file__).with_name("loss_stack.py"))
SAMPLES = 11
LOCAL = (slice(0, 7), slice(7, SAMPLES))


def loss_and_gradients(rank: int, **loss: Any) -> list[torch.Tensor]:
    """The total loss, and the gradient of each parameter averaged over two ranks."""
    model = model_of(THREE | {"loss": loss}).double()
    inputs = {name: tensor[LOCAL[rank]] for name, tensor in inputs_of(SAMPLES).items()}
    groups_b = (torch.arange(SAMPLES) % 9)[LOCAL[rank]]
    total, _ = total_loss(model.config, model(inputs), groups_b)
    total.backward()
    gradients = []
    for p in model.parameters():
        assert p.grad is not None
        dist.all_reduce(p.grad)
        gradients.append(p.grad / 2)
    return [total.detach(), *gradients]


def check_ring(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    sent: list[str] = []
    shift = dist.batch_isend_irecv

    def counted_shift(works: Any) -> Any:
        sent.append("ring")
        return shift(works)

    dist.batch_isend_irecv = counted_shift
    for kind in ("softmax", "sigmoid"):
        gathered = loss_and_gradients(rank, kind=kind)
        assert not sent
        ring = loss_and_gradients(rank, kind=kind, ring=True)
        assert sent
        sent.clear()
        for a, b in zip(ring, gathered, strict=True):
            # Sums over columns in another order; embeddings are normalised in float32.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_the_ring_gives_the_same_loss_and_gradients(tmp_path: Path) -> None:
    mp.spawn(check_ring, args=(str(tmp_path / "store"),), nprocs=2)


@pytest.mark.distributed
def test_seven_frames_from_the_command_line_to_the_kernels(clip: dict[str, Any], tmp_path: Path) -> None:
    """From `threetowers train` on, at most seven functions of ours stand above the kernels' operator."""
    file, _ = write_config(clip | {"duration": {"steps": 1}}, tmp_path, "run", micro_batch_size=4)
    output = run_command([sys.executable, LOSS_STACK, file]).stdout
    (stack,) = (json.loads(line) for line in output.splitlines() if line.startswith("["))
    assert stack[0] == "cli.main"
    assert stack[-2:] == ["contrastive.contrastive_losses", "pair_losses.pair_losses"]
    assert len(stack) <= 7, stack

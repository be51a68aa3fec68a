"""Two ranks of NCCL on one card: the loss over their joined batch, averaged gradients included, against float64.

NCCL refuses two ranks on one device of one host. Each rank therefore gives another NCCL_HOSTID, and NCCL takes them for
two hosts that speak through sockets. All collectives of the loss run as between machines, only slower.
"""

import math
import os
import socket
import time
from datetime import timedelta
from multiprocessing import get_context

import torch
from torch import Tensor, distributed
from torch.nn.functional import normalize

from tests.gpu.setting import Setting
from threetowers.kernels import Pair, contrastive_losses, reference_contrastive_loss

WORLD = 2
TERMS = 3
HOSTS_OF_THEIR_OWN = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_DEBUG": "WARN",
}
BOUNDS = {"loss": 1e-4, "gradients": 6e-3}  # of bfloat16 features


def run(setting: Setting) -> None:
    context = get_context("fork")  # this process has not touched CUDA
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    ranks = [context.Process(target=run_rank, args=(setting, rank, port)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    codes = [process.exitcode for process in ranks]
    assert codes == [0] * WORLD, f"the ranks ended with exit codes {codes}"


def run_rank(setting: Setting, rank: int, port: int) -> None:
    """Be one of the ranks."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {**HOSTS_OF_THEIR_OWN, "NCCL_HOSTID": f"host-{rank}"}
    backend = "gloo" if setting.rehearse else "nccl"
    if not setting.rehearse:
        torch.cuda.set_device(setting.device)
    distributed.init_process_group(backend, timeout=timedelta(seconds=45))
    for kind in ("softmax", "sigmoid"):
        for ring in (False, True):
            for grouped in (False, True):
                check(setting, rank, kind, ring, grouped)
    distributed.barrier()
    distributed.destroy_process_group()


def check(setting: Setting, rank: int, kind: str, ring: bool, grouped: bool) -> None:
    """Raise AssertionError where this rank's loss or gradients are not those of one process with the joined batch."""
    local, width = (33, 24) if setting.rehearse else (1000, 256)
    generator = torch.Generator().manual_seed(1)
    joined = [[unit_rows(WORLD * local, width, generator, setting.device) for _ in "xy"] for _ in range(TERMS)]
    groups_B = torch.arange(WORLD * local, device=setting.device) // 3 if grouped else None
    mine = slice(rank * local, (rank + 1) * local)

    # The loss of this package, on all ranks together.
    own = [[z_BD[mine].clone().requires_grad_() for z_BD in pair] for pair in joined]
    log_scale = torch.tensor([math.log(20.0)], device=setting.device, requires_grad=True)
    began = time.perf_counter()
    results = contrastive_losses(
        [Pair(x_bD, y_bD, log_scale) for x_bD, y_bD in own],
        kind=kind,
        ring=ring,
        group_ids=None if groups_B is None else groups_B[mine],
    )
    loss = torch.stack([result.loss for result in results]).sum()
    loss.backward()
    distributed.all_reduce(log_scale.grad)
    value = float(loss.detach())  # waits for the device
    milliseconds = (time.perf_counter() - began) * 1e3

    # One process that has every row, in float64.
    wide = [[z_BD.double().requires_grad_() for z_BD in pair] for pair in joined]
    wide_scale = log_scale.detach().double().requires_grad_()
    truth = torch.stack(
        [reference_contrastive_loss(x_BD, y_BD, wide_scale, kind=kind, group_ids=groups_B) for x_BD, y_BD in wide]
    ).sum()
    truth.backward()

    # Gradients are scaled for averaging over ranks.
    pairs = [
        (z_bD.grad / WORLD, wide_BD.grad[mine])
        for sides, wides in zip(own, wide, strict=True)
        for z_bD, wide_BD in zip(sides, wides, strict=True)
    ]
    pairs.append((log_scale.grad / WORLD, wide_scale.grad))
    found = {
        "loss": abs(value - float(truth.detach())) / abs(float(truth.detach())),
        "gradients": max(float((got.double() - expected).norm() / expected.norm()) for got, expected in pairs),
    }
    name = f"{WORLD} ranks, {kind}{', ring' * ring}{', groups' * grouped}"
    print(f"rank {rank}: {name}: {found}, {milliseconds:.0f} ms", flush=True)
    if rank == 0:
        setting.record(f"worst error of {name}", max(found.values()), "relative")
    for part, error in found.items():
        assert error <= BOUNDS[part], (
            f"rank {rank}, {name}: the error of {part} is {error:.1e}, above {BOUNDS[part]:.0e}"
        )


def unit_rows(count: int, width: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return (count, width) in bfloat16, drawn on the CPU: the same on all ranks."""
    return normalize(torch.randn(count, width, generator=generator)).bfloat16().to(device)

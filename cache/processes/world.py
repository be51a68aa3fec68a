"""The processes that a launcher started together, and which of them this one is."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

# SLURM_STEP_NUM_TASKS, not SLURM_NTASKS: the latter is also set in a batch script that srun did not start
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun, deepspeed
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


@dataclass(frozen=True)
class World:
    """This process's rank among `size` processes, and its local rank among the `local_size` on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and reports for all."""
        return self.rank == 0

    @property
    def device(self) -> "torch.device":
        """The GPU of this local rank where there are GPUs, else the CPU.

        Local ranks take the GPUs that they see in turn: where there are fewer GPUs than processes several share one,
        and where the scheduler shows each process a GPU of its own that is the one.
        """
        import torch  # here, so that `threetowers --help` needs no torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def cores(self, env: Mapping[str, str] = os.environ) -> int:
        """Return the number of CPU cores for this process, at least 1.

        That is an even share of the cores that it may run on; under `srun --cpus-per-task` those of its own task.
        """
        available = len(os.sched_getaffinity(0))
        if env.get("SLURM_STEP_NUM_TASKS") == str(self.size) and "SLURM_CPUS_PER_TASK" in env:
            return max(1, min(available, int(env["SLURM_CPUS_PER_TASK"])))
        return max(1, available // self.local_size)

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Self:
        """Return the world that torchrun, deepspeed, mpirun or srun describe; a single process without a launcher.

        Raises:
            ValueError: The environment holds no numbers, or a rank outside the world.
        """
        for rank, size, local_rank, local_size in LAUNCHERS:
            if rank not in env or size not in env:
                continue
            try:
                world = cls(
                    rank=int(env[rank]),
                    size=int(env[size]),
                    local_rank=int(env.get(local_rank, "0")),
                    local_size=int(env.get(local_size, "1")),
                )
            except ValueError as error:
                raise ValueError(f"environment: {rank}={env[rank]!r}, {size}={env[size]!r}: {error}") from None
            if not 0 <= world.rank < world.size:
                raise ValueError(f"environment: {rank}={world.rank}, expected a number below {size}={world.size}")
            return world
        return cls(rank=0, size=1, local_rank=0, local_size=1)

    @classmethod
    def from_process_group(cls) -> Self:
        """Return the world of torch's process group; a single process where none is initialized."""
        from torch import distributed

        if not distributed.is_initialized():
            return cls(rank=0, size=1, local_rank=0, local_size=1)
        return cls(
            rank=distributed.get_rank(),
            size=distributed.get_world_size(),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )

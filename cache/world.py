"""Who this process is among those a launcher started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

# SLURM_STEP_NUM_TASKS, not SLURM_NTASKS: the latter is also set in a batch script that srun did not start
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun, deepspeed
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


@dataclass(frozen=True)
class Rank:
    """Rank of `world` processes; `local` of `local_world` on this machine."""

    rank: int
    world: int
    local: int
    local_world: int

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Rank:
        """As torchrun, deepspeed, mpirun or srun say; a single process where none of them does.

        Raises:
            ValueError: numbers that cannot be.
        """
        for rank, world, local, local_world in LAUNCHERS:
            if rank in env and world in env:
                try:
                    found = cls(
                        *(
                            int(env.get(name, default))
                            for name, default in ((rank, ""), (world, ""), (local, "0"), (local_world, "1"))
                        )
                    )
                except ValueError as error:
                    raise ValueError(f"environment: {rank}={env[rank]!r}, {world}={env[world]!r}: {error}") from None
                if not 0 <= found.rank < found.world:
                    raise ValueError(f"environment: {rank}={found.rank} is not below {world}={found.world}")
                return found
        return cls(0, 1, 0, 1)

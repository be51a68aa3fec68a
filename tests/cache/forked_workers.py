"""A parent that has everything imported forks workers that build, and kills them: started by tests, in a fresh process.

    python -m tests.cache.forked_workers TARS OUT ENCODER KILLS SEED SIDE...

Builds OUT/0/SIDE, OUT/1/SIDE, ... to the end, the caches of all sides together, killing a random worker after a random
time, until KILLS workers have died.
"""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import webdataset  # noqa: F401 - imported here, so that no fork has to
import zarr  # noqa: F401
from PIL import Image

from threetowers.cache.builder.build import build_caches
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.format.manifest import Side

OPTIONS = {"batch_size": 5, "threads": 1}


def worker(pattern: str, out: Path, encoder: str, sides: Sequence[Side], rank: int, world: int) -> int:
    """Fork a process that builds; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(world)}
    code = 1
    try:
        outputs = [out / side for side in sides]
        build_caches(BuildConfig(tars=[pattern], output_dir=outputs, encoder=encoder, of=sides, **OPTIONS))
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main(pattern: str, root: Path, encoder: str, kills: int, seed: int, sides: Sequence[Side]) -> None:
    torch.set_num_threads(1)
    Image.init()
    timm.create_model("test_vit")
    rng, killed, builds = random.Random(seed), 0, 0
    while killed < kills:
        out, world = root / str(builds), rng.randint(2, 4)
        alive = {rank: worker(pattern, out, encoder, sides, rank, world) for rank in range(world)}
        while alive:
            deadline = time.monotonic() + rng.uniform(0, 0.5)
            while alive and time.monotonic() < deadline:
                for rank, pid in list(alive.items()):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        code = os.waitstatus_to_exitcode(status)
                        assert code == 0, f"worker {rank} ended with {code}"
                        del alive[rank]
                time.sleep(0.002)
            if alive and killed < kills:
                rank = rng.choice(list(alive))
                os.kill(alive[rank], signal.SIGKILL)
                os.waitpid(alive[rank], 0)
                killed += 1
                alive[rank] = worker(pattern, out, encoder, sides, rank, world)
        builds += 1
    print(f"killed {killed} builds {builds}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6:])  # type: ignore[arg-type]

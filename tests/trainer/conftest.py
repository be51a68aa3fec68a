"""What every test of the trainer leaves as it found it."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """Leave the process group that a run in the test's own process joined, and let DeepSpeed forget it.

    Else the next test that starts one finds it started, and DeepSpeed takes the groups of the one before.
    """
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:  # what a run says to DeepSpeed
        del os.environ[name]
    if torch.distributed.is_initialized():
        gc.collect()  # what still holds the group would keep its threads
        torch.distributed.destroy_process_group()
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        comm.cdb = None
        for name, value in vars(groups).items():
            if isinstance(value, torch.distributed.ProcessGroup):
                setattr(groups, name, None)

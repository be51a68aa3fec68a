"""Finds what would make the host wait for a GPU, in code that runs on the CPU.

A GPU's own switch, torch.cuda.set_sync_debug_mode, needs a GPU. Here a dispatch mode sees every torch operator, in the
losses' custom operators and in DeepSpeed too, and notes those that hand values or sizes from the device to the host.
Functions that do so without an operator on the CPU are wrapped, and those that make a tensor on a device from numbers.

What no dispatch on the CPU shows, a copy by `to(device)` for instance, is for the GPU to show.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense": "reads a number",  # item, float, int, bool
    "equal": "reads whether tensors are equal",
    "nonzero": "reads how many there are",
    "masked_select": "reads how many there are",
    "_unique2": "reads how many there are",
    "unique_dim": "reads how many there are",
    "unique_consecutive": "reads how many there are",
    "repeat_interleave": "reads how many there are",  # unless it is told
    "bincount": "reads how many there are",
}
# Files, and what a line in them says, whose tensors are on the CPU wherever the model is.
ON_THE_HOST = (
    ("torch/optim/", ""),  # counts of steps
    ("kernels/distributed/agreement.py", ""),  # what the hosts tell each other
    ("kernels/operator/operators.py", "sizes_W"),  # what they have told
    ("kernels/cpu/", ""),  # chosen for tensors on the CPU alone
)


class HostWaits(TorchDispatchMode):
    """Inside the context, notes each host wait by its place and reason."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "threetowers":  # an operator of ours: look inside
            function = torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn
            with self:
                return function(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8)
            for part in args[1:2]
            if isinstance(part, list | tuple)
            for index in part
        )
        if name in WAITING and kwargs.get("output_size") is None:
            self.note(WAITING[name])
        elif by_mask:
            self.note("counts the rows that a mask marks")
        return func(*args, **kwargs)

    def note(self, reason: str) -> None:
        """Note a host wait at the innermost function that is not torch's."""
        for frame in reversed(traceback.extract_stack()[:-2]):
            if any(file in frame.filename and words in str(frame.line) for file, words in ON_THE_HOST):
                return
            if "/torch/" not in frame.filename and frame.filename != __file__ and "unittest" not in frame.filename:
                path = Path(frame.filename)
                self.found.append(f"{path.parent.name}/{path.name}:{frame.lineno} {reason}: {frame.line}")
                return


@contextmanager
def host_waits() -> Iterator[list[str]]:
    """Give the list of the host waits inside the context, which grows as they happen."""
    from deepspeed.accelerator import get_accelerator

    waits = HostWaits()

    def noted(function: Any, reason: str, waits_for: Callable[..., bool] = lambda **kwargs: True) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if waits_for(**kwargs):
                waits.note(reason)
            return function(*args, **kwargs)

        return call

    def on_a_device(**kwargs: Any) -> bool:
        return kwargs.get("device") is not None

    patches = [mock.patch.object(Tensor, name, noted(getattr(Tensor, name), "reads")) for name in ("tolist", "cpu")]
    patches += [
        mock.patch.object(torch, name, noted(getattr(torch, name), "copies to the device", on_a_device))
        for name in ("tensor", "as_tensor")
    ]
    patches.append(mock.patch.object(Tensor, "new_tensor", noted(Tensor.new_tensor, "copies to the device")))
    accelerator = get_accelerator()
    patches.append(mock.patch.object(accelerator, "synchronize", noted(accelerator.synchronize, "waits")))
    for patch in patches:
        patch.start()
    try:
        with waits:
            yield waits.found
    finally:
        for patch in patches:
            patch.stop()

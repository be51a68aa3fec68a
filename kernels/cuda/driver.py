"""Launching kernels on a GPU through the CUDA driver, on the stream that is torch's current one."""

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import override

from threetowers.kernels.cuda.arguments import Argument, PackedArguments
from threetowers.kernels.cuda.compiler import KernelProgram, cached_cubin
from threetowers.kernels.cuda.launch import BLOCK_THREADS, Launch, Launcher, Limits, StreamLauncher

SHARED_WITHOUT_ASKING = 48 * 1024


class DriverError(RuntimeError):
    """The CUDA driver refused a call."""


class DriverLauncher(Launcher):
    """Launcher of one device, which torch must have initialised. Kernels are loaded at first use."""

    def __init__(self, device_index: int) -> None:
        self._driver: Any = importlib.import_module("cuda.bindings.driver")  # untyped, and optional
        self._index = device_index
        self._device = _checked(self._driver.cuDeviceGet(device_index))
        self._kernels: dict[tuple[str, tuple[str, ...]], Any] = {}
        attributes = self._driver.CUdevice_attribute
        self.limits = Limits(
            capability=torch.cuda.get_device_capability(device_index),
            shared_per_block=self._attribute(attributes.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
            shared_per_processor=self._attribute(attributes.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR),
        )

    @override
    def prepare(self, launches: Sequence[Launch]) -> None:
        with torch.cuda.device(self._index):
            for launch in launches:
                self.kernel(launch)

    @override
    def bind(self) -> "DriverStream":
        return DriverStream(self, torch.cuda.current_stream(self._index).cuda_stream)

    def launch_kernel(self, *arguments: Any) -> None:
        """Call cuLaunchKernel with these arguments."""
        _checked(self._driver.cuLaunchKernel(*arguments))

    def kernel(self, launch: Launch) -> Any:
        """Return the loaded kernel of this launch."""
        key = launch.kernel, launch.defines
        if key not in self._kernels:
            arch = "sm_{}{}".format(*self.limits.capability)
            cubin = cached_cubin(KernelProgram(launch.kernel, arch, launch.defines))
            library = _checked(self._driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
            kernel = _checked(self._driver.cuLibraryGetKernel(library, launch.kernel.encode()))
            if launch.shared_bytes > SHARED_WITHOUT_ASKING:
                ask = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _checked(self._driver.cuKernelSetAttribute(ask, launch.shared_bytes, kernel, self._device))
            self._kernels[key] = self._driver.CUfunction(int(kernel))
        return self._kernels[key]

    def _attribute(self, attribute: Any) -> int:
        return int(_checked(self._driver.cuDeviceGetAttribute(attribute, self._device)))


class DriverStream(StreamLauncher):
    """Launcher on one stream. It keeps each kernel's arguments in place, and must not be shared by threads."""

    def __init__(self, device: DriverLauncher, stream: int) -> None:
        self.limits = device.limits
        self._device = device
        self._stream = stream
        self._kernels: dict[tuple[str, tuple[str, ...]], tuple[Any, PackedArguments, int]] = {}

    @override
    def run(self, launch: Launch, arguments: Sequence[Argument]) -> None:
        key = launch.kernel, launch.defines
        if key in self._kernels:
            kernel, packed, table = self._kernels[key]
            packed.fill(arguments)
        else:
            kernel, packed = self._device.kernel(launch), PackedArguments(arguments)
            table = ctypes.addressof(packed.table)
            self._kernels[key] = kernel, packed, table
        grid_x, grid_y = launch.grid
        self._device.launch_kernel(
            kernel, grid_x, grid_y, 1, BLOCK_THREADS, 1, 1, launch.shared_bytes, self._stream, table, 0
        )


def _checked(answer: tuple[Any, ...]) -> Any:
    result, *values = answer
    if result.value != 0:
        raise DriverError(f"the CUDA driver returned {result.name}")
    return values[0] if values else None

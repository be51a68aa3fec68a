"""The launcher's calls of the CUDA driver through cuda-bindings, recorded by a stub of the driver's library."""

import os
import subprocess
import sys
from pathlib import Path

from emulator import ENGINE, compile_cpp

SCRIPT = """
import contextlib, types
import torch
torch.cuda.get_device_capability = lambda index: (8, 0)
torch.cuda.device = lambda index: contextlib.nullcontext()
torch.cuda.current_stream = lambda index: types.SimpleNamespace(cuda_stream=0x7000)

from threetowers.kernels.cuda import driver
from threetowers.kernels.cuda.arguments import In, Out
from threetowers.kernels.cuda.block_shape import block_launch, narrow_block
from threetowers.kernels.cuda.launch import Limits, columns_launch
driver.cached_cubin = lambda program: "-".join((program.kernel, program.arch, *program.defines)).encode()

launcher = driver.DriverLauncher(0)
assert launcher.limits == Limits((8, 0), 163 * 1024, 164 * 1024)
launcher.prepare([block_launch("stats", torch.float16, 1, 1, narrow_block(launcher.limits), launcher.limits)])
parts_pn2, max_n, sum_n = torch.zeros(4, 500, 2), torch.zeros(500), torch.zeros(500)
arguments = (In(parts_pn2), 4, 500, Out(max_n), Out(sum_n))
other_arguments = (In(parts_pn2), 3, 500, Out(sum_n), Out(None))
stream = launcher.bind()
print("expected", *(hex(tensor.data_ptr()) for tensor in (parts_pn2, max_n, sum_n)), flush=True)
stream.run(columns_launch("merge", 500, 1, launcher.limits), arguments)
stream.run(columns_launch("merge", 500, 1, launcher.limits), other_arguments)
try:
    stream.run(columns_launch("merge", 700, 1, launcher.limits), arguments)
except driver.DriverError as error:
    print(error, flush=True)
"""


def test_driver_calls_and_their_arguments(tmp_path: Path) -> None:
    compile_cpp(["-shared", "-x", "c++", ENGINE / "driver_stub.cc"], tmp_path / "libcuda.so.1")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    (expected,) = (line.split()[1:] for line in said if line.startswith("expected"))
    launch = "launch 0x2005 grid 2 1 1 threads 256 shared 0 stream 0x7000"
    arguments = f"arguments {expected[0]} 4 500 {expected[1]} {expected[2]}"
    assert sorted(line for line in said if not line.startswith("expected")) == sorted(
        [
            "load stats-sm_80-FP16-COLUMNS=128-STAGES=4",
            "kernel stats of 0x1000",
            "attribute 8 = 65536 of 0x2005 on 0",  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            "load merge-sm_80",
            "kernel merge of 0x1000",
            *[launch] * 2,  # loaded once, launched twice
            arguments,
            f"arguments {expected[0]} 3 500 {expected[2]} (nil)",
            launch.replace("grid 2", "grid 3"),
            arguments,
            "the CUDA driver returned CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
        ]
    )

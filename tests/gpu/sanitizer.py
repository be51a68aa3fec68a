"""compute-sanitizer over every kernel of the loss, and over a planted overrun, which it must find."""

import os
import shutil
import subprocess
import sys
from typing import Literal

from tests.gpu.kernel_launches import launch_all
from tests.gpu.setting import Setting
from tests.gpu.tile_shapes import TILE_SHAPES

KERNELS = "stats|merge|softmax_gradient|sigmoid|dense_|distill_"
FOUND = 9  # its exit code where it has found something
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else an overrun ends in memory that torch keeps for later

Tool = Literal["memcheck", "racecheck"]


def check(setting: Setting, tool: Tool) -> None:
    """Raise AssertionError where the tool finds something in our kernels, or does not find what is planted."""
    if setting.rehearse:
        launch_all(setting.device)
        setting.skip(f"compute-sanitizer {tool}", "needs a GPU")
        return
    if shutil.which("compute-sanitizer") is None:
        setting.skip(f"compute-sanitizer {tool}", "is not on the PATH; it comes with the CUDA toolkit")
        return
    code, printed = sanitize(tool)
    print(printed)
    assert code == 0, f"compute-sanitizer {tool} ended with exit code {code}"
    for backend in {*TILE_SHAPES.values(), "DenseTiles"}:
        assert f"ran {backend}" in printed, f"the kernels of {backend} did not run under it"
    if tool == "memcheck":
        code, printed = sanitize(tool, "--overrun")
        assert code == FOUND, f"a write past the end of an output was not found (exit code {code}):\n{printed}"
        print("a planted overrun was found")


def sanitize(tool: Tool, *arguments: str) -> tuple[int, str]:
    """Run the kernels under the tool; return its exit code, and what both printed."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    command += ["--kernel-regex", f"kns=^({KERNELS})"]  # libraries' kernels are not ours to check, and take longer
    command += [sys.executable, "-m", "tests.gpu.kernel_launches", *arguments]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout

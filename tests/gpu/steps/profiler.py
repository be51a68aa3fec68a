"""What bounds the kernels: tensor cores, shared memory, L2, occupancy, as ncu counts them."""

import csv
import io
import shutil
import subprocess
import sys

from tests.gpu.setting import Setting
from tests.gpu.tile_shapes import TILE_SHAPES

METRICS = {
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "processors busy",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor pipe",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed": "shared memory pipe",
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": "L2",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps of what fits",
}
KERNELS = "regex:^(stats|softmax_gradient|sigmoid|distill_.*)$"


def run(setting: Setting) -> None:
    if not setting.gpu_only("ncu"):
        return
    if shutil.which("ncu") is None:
        setting.skip("ncu", "is not on the PATH; it comes with the CUDA toolkit")
        return
    for shape in TILE_SHAPES:
        profile(setting, shape)


def profile(setting: Setting, shape: str) -> None:
    """Record the counters of each kernel on full tiles."""
    command = ["ncu", "--csv", "--clock-control", "none", "--kernel-name", KERNELS, "--launch-count", "12"]
    command += ["--metrics", ",".join(METRICS), sys.executable, "-m", "tests.gpu.kernel_launches", "--large", shape]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode:
        setting.skip(f"ncu of {shape}", f"ended with exit code {done.returncode}; log.txt has what it said")
        return
    for kernel, metric, value in counters(done.stdout):
        setting.record(f"{kernel} {shape}: {METRICS.get(metric, metric)}", value, "%")


def counters(printed: str) -> list[tuple[str, str, float]]:
    """Return (kernel, metric, value) of ncu's CSV output, of the last launch of each kernel."""
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    last: dict[tuple[str, str], float] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:  # "n/a": the card has no such counter
            continue
        last[row["Kernel Name"].split("(")[0], row["Metric Name"]] = value
    return [(kernel, metric, value) for (kernel, metric), value in last.items()]

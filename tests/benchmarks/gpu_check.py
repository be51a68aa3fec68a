"""Check the CUDA kernels on a GPU: correct, clean under the sanitizer, and how fast.

    python tests/benchmarks/gpu_check.py               # everything; minutes
    python tests/benchmarks/gpu_check.py --only tiles  # or loss, sanitizer, time
    python tests/benchmarks/gpu_check.py --rehearse    # on the CPU, tiny: tests this script only

tiles      every kernel on odd tiles against float64 on the same GPU, twice for equal bits
loss       the public loss at B = 4096 and 16384 against the float64 reference on the same GPU
sanitizer  the tiles again under compute-sanitizer's memcheck, racecheck and synccheck, where it is installed
time       forward and backward against open_clip, torch's linear_cross_entropy, memeff and inf-cl, in turns

The last two are optional: pip install memeff inf-cl. The output names what is missing.
"""

import argparse
import functools
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1] / "emulation"))

from tiles_under_test import Case, answers, check

from threetowers.kernels import contrastive_loss, reference_contrastive_loss
from threetowers.kernels.backends import backend_for
from threetowers.kernels.tiles import TorchTiles

ELEMENTS = [torch.bfloat16, torch.float16, torch.float32]
CASES = [
    Case(1, 1, 8),
    Case(5, 1, 40, diagonal=-4, labels=True),
    Case(129, 127, 72, diagonal=1, scale=100.0),
    Case(257, 9, 20, diagonal=-(10**12)),
    Case(1000, 777, 640, diagonal=3, scale=50.0, labels=True),
    Case(4096, 4096, 768, scale=100.0),
]
Step = Callable[[], Tensor]


def check_tiles(device: str) -> None:
    """Raise AssertionError where a back end and float64 disagree, or two runs differ in a bit."""
    with torch.device(device):
        for element in ELEMENTS:
            for case in CASES if device == "cuda" else CASES[:-1]:
                backend = backend_for(case.features(element)[0])
                got = answers(backend, case, element)
                check(got, answers(TorchTiles(torch.float64), case, element), case, element)
                same = answers(backend, case, element).bits() == got.bits()
                assert same, f"{case} in {element}: two runs differ"
                print(f"ok  {type(backend).__name__:16} {element!s:15} {case.rows} x {case.cols} x {case.width}")


def check_loss(sizes: list[tuple[int, int]], device: str) -> None:
    """Raise AssertionError where the loss or a gradient is off; print the errors. sizes: (batch, width)."""
    for batch, width in sizes:
        for kind in ("softmax", "sigmoid"):
            for element in ELEMENTS:
                errors = loss_errors(batch, width, kind, element, device)
                told = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
                print(f"B {batch} D {width} {kind} {element}: {told}")
                bound = 1e-4 if element == torch.float32 else 5e-3
                assert max(errors.values()) <= bound, f"an error is above {bound}"


def loss_errors(batch: int, width: int, kind: str, element: torch.dtype, device: str) -> dict[str, float]:
    """Relative errors (norms) of the loss and its gradients against the float64 reference on the same features."""
    results = []
    for loss_of, dtype in ((contrastive_loss, element), (reference_contrastive_loss, torch.float64)):
        x_BD, y_BD = (z.to(dtype, copy=True).requires_grad_() for z in features(batch, width, element, device))
        log_scale = torch.tensor([math.log(50.0)], device=device, dtype=torch.promote_types(dtype, torch.float32))
        log_scale.requires_grad_()
        bias = torch.full_like(log_scale, -8.0).requires_grad_() if kind == "sigmoid" else None
        loss = loss_of(x_BD, y_BD, log_scale, bias=bias, kind=kind)
        (loss * 2.0**14).backward()  # as mixed precision training does: fp16 cannot hold smaller gradients
        parts = {"loss": loss.detach(), "dx": x_BD.grad, "dy": y_BD.grad, "dscale": log_scale.grad}
        results.append({**parts, "dbias": bias.grad} if bias is not None else parts)
    got, expected = results
    return {name: float((got[name].double() - expected[name]).norm() / expected[name].norm()) for name in got}


def features(batch: int, width: int, element: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Matched unit rows whose positives stand out from the negatives by about as much as these scatter."""
    generator = torch.Generator(device).manual_seed(0)
    x_BD = torch.randn(batch, width, generator=generator, device=device)
    y_BD = x_BD + 4 * torch.randn(batch, width, generator=generator, device=device)
    return normalize(x_BD).to(element), normalize(y_BD).to(element)


def check_under_sanitizer(rehearse: bool) -> None:
    """Run the tiles again under each tool; raise CalledProcessError at its first finding."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("not done: compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)")
        return
    for tool in ("memcheck", "racecheck", "synccheck"):
        print(f"compute-sanitizer {tool}", flush=True)
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, __file__, "--only", "tiles"]
        subprocess.run(command + ["--rehearse"] * rehearse, check=True)


def contenders(x_BD: Tensor, y_BD: Tensor, log_scale: Tensor) -> Iterator[tuple[str, Step | str]]:
    """Every implementation's name and its loss of these features, or why it is missing."""
    yield "threetowers", lambda: contrastive_loss(x_BD, y_BD, log_scale)
    rows_B = torch.arange(len(x_BD), device=x_BD.device)

    def torch_chunked() -> Tensor:
        one_way = torch.nn.functional.linear_cross_entropy
        scale = log_scale.exp().to(x_BD.dtype)
        return (one_way(scale * x_BD, y_BD, rows_B) + one_way(scale * y_BD, x_BD, rows_B)) / 2

    yield "torch linear_cross_entropy", torch_chunked
    try:
        from open_clip import ClipLoss

        yield "open_clip", lambda: ClipLoss()(x_BD, y_BD, log_scale.exp().squeeze())
    except ImportError as error:
        yield "open_clip", str(error)
    try:
        from memeff import MemoryEfficientCLIPLoss

        memeff = MemoryEfficientCLIPLoss(float((-log_scale).exp()), normalized_inputs=True, stable=False)
        yield "memeff (no scale gradient)", lambda: memeff(x_BD, y_BD)
    except ImportError as error:
        yield "memeff", str(error)
    try:
        from inf_cl import cal_flash_loss

        def inf_cl() -> Tensor:
            scale = log_scale.exp().squeeze()
            return (cal_flash_loss(x_BD, y_BD, rows_B, scale) + cal_flash_loss(y_BD, x_BD, rows_B, scale)).mean() / 2

        yield "inf-cl", inf_cl
    except ImportError as error:
        yield "inf-cl", str(error)


def compare_times(batches: list[int], width: int, rounds: int, device: str) -> None:
    """Print milliseconds, the rate counted as 4 passes, peak memory, and the ratio to this package's time."""
    milliseconds = gpu_milliseconds if device == "cuda" else cpu_milliseconds
    for batch in batches:
        x_BD, y_BD = (z.requires_grad_() for z in features(batch, width, torch.bfloat16, device))
        log_scale = torch.tensor([math.log(50.0)], device=device, requires_grad=True)
        named = list(contenders(x_BD, y_BD, log_scale))
        steps = {name: step for name, step in named if not isinstance(step, str)}
        print(f"\nB {batch}, D {width}, bf16, forward + backward, median of {rounds} rounds")
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds + 1):  # the first round compiles and tunes
            for name, step in steps.items():
                times[name].append(milliseconds(step))
        taken = {name: statistics.median(seen[1:]) for name, seen in times.items()}
        for name, step in named:
            if isinstance(step, str):
                print(f"{name:28} not installed: {step}")
                continue
            rate = 8 * batch**2 * width / taken[name] / 1e9
            memory = f"{gpu_peak_bytes(step) / 2**30:7.2f} GiB" if device == "cuda" else ""
            ratio = taken[name] / taken["threetowers"]
            print(f"{name:28} {taken[name]:9.2f} ms {rate:7.0f} TFLOP/s {memory} {ratio:6.2f} x")


def gpu_milliseconds(step: Step) -> float:
    """GPU time of a loss and its gradients; infinite where memory does not suffice."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        start.record()
        step().backward()
        stop.record()
    except torch.cuda.OutOfMemoryError:
        return math.inf
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop))


def gpu_peak_bytes(step: Step) -> float:
    """Memory at its peak over what was there before; infinite where it does not suffice."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return math.inf if gpu_milliseconds(step) == math.inf else torch.cuda.max_memory_allocated() - before


def cpu_milliseconds(step: Step) -> float:
    """The same on the CPU, for a rehearsal."""
    start = time.perf_counter()
    step().backward()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parts = ("tiles", "loss", "sanitizer", "time")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=parts, nargs="+", default=parts)
    parser.add_argument("--batches", type=int, nargs="+", help="of time; default 16384 32768 65536")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rehearse", action="store_true", help="run this script's own logic on the CPU, on tiny sizes")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_check measures on a GPU, and torch finds none here (torch.cuda.is_available() is False)")
    on = "the CPU: a rehearsal, which tests nothing about a GPU" if options.rehearse else torch.cuda.get_device_name()
    print(f"{on}; torch {torch.__version__}", flush=True)
    sizes = [(300, 40)] if options.rehearse else [(4096, 512), (16384, 768)]
    batches = options.batches or ([96] if options.rehearse else [16384, 32768, 65536])
    checks = {
        "tiles": functools.partial(check_tiles, device),
        "loss": functools.partial(check_loss, sizes, device),
        "sanitizer": functools.partial(check_under_sanitizer, options.rehearse),
        "time": functools.partial(compare_times, batches, options.width, options.rounds, device),
    }
    for part in options.only:
        checks[part]()


if __name__ == "__main__":
    main()

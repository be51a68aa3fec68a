"""Time and memory of the contrastive loss on the CPU, as ratios to its floor and to other implementations.

    python tests/benchmarks/bench_loss.py            # B = 8192, D = 512; about five minutes on two cores
    python tests/benchmarks/bench_loss.py --quick    # smaller, under a minute
    python tests/benchmarks/bench_loss.py --softmax  # only the softmax loss, its floor and open_clip's, half a minute
    python tests/benchmarks/bench_loss.py --distill  # only distillation from one teacher, its floor and dense forms
    python tests/benchmarks/bench_loss.py --curves --plot curves.svg   # B from 1k to 32k; many minutes
    python tests/benchmarks/bench_loss.py --cpu-time # one thread's processor time: steadier on a busy machine

As on a processor without AVX-512, all of them: the sweep and torch's operations, oneDNN, and MKL, whose products decide
(on AMD it has no others than for AVX2, whatever the variable says):

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python tests/benchmarks/bench_loss.py

All times are forward plus backward in float32, taken in turns within one run, so that a busy machine slows all alike.
Ratios are printed of the best times, and as the median over rounds of the ratio within a round: where these differ
much, the machine was too busy to tell. The floor is the library's own time for the products that cannot be avoided, on
complete matrices in memory that is already there: 4 passes with logits computed twice, 3 with logits kept ("fresh": in
memory allocated at every step). Curves take one process an implementation and width; a point that would not fit in
memory or take longer than --limit is skipped, which is printed.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from threetowers.kernels import Teacher, contrastive_loss, distillation_loss, reference_contrastive_loss
from threetowers.kernels.backends import backend_for

Step = Callable[[], object]
Clock = Callable[[], float]
GIB = 2**30
EIGHTH = GIB // 8


def features(total: int, width: int, noise: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Matched unit rows: the less noise, the surer the pairs."""
    g = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(total, width, generator=g)
    y_BD = x_BD + noise * torch.randn(total, width, generator=g)
    return normalize(x_BD).requires_grad_(), normalize(y_BD).requires_grad_()


def floor(x_BD: Tensor, y_BD: Tensor, logits_again: bool, fresh: bool = False) -> Step:
    """The products alone, into buffers that are already there; fresh: into logits newly allocated at every step."""
    x, y = x_BD.detach(), y_BD.detach()
    kept_BB = torch.empty(0 if fresh else len(x), 0 if fresh else len(y))
    dx_BD, dy_BD = torch.empty_like(x), torch.empty_like(y)

    def products() -> None:
        sim_BB = x.new_empty(len(x), len(y)) if fresh else kept_BB
        for _ in range(2 if logits_again else 1):
            torch.mm(x, y.T, out=sim_BB)
        torch.mm(sim_BB, y, out=dx_BD)
        torch.mm(sim_BB.T, x, out=dy_BD)

    products()
    return products


def distillation_floor(x_BD: Tensor, y_BD: Tensor, teacher: Teacher, logits_again: bool) -> Step:
    """The products alone: both sides' dots once, or twice as where none are kept, and two gradient products."""
    x, y = x_BD.detach(), y_BD.detach()
    student_BB, teacher_BB = torch.empty(len(x), len(y)), torch.empty(len(x), len(y))
    dx_BD, dy_BD = torch.empty_like(x), torch.empty_like(y)

    def products() -> None:
        for _ in range(2 if logits_again else 1):
            torch.mm(x, y.T, out=student_BB)
            torch.mm(teacher.u, teacher.v.T, out=teacher_BB)
        torch.mm(student_BB, y, out=dx_BD)
        torch.mm(student_BB.T, x, out=dy_BD)

    products()
    return products


def training_step(x_BD: Tensor, y_BD: Tensor, loss: Callable[..., Tensor], **options: object) -> Step:
    """Forward and backward to features and scale."""
    log_scale = torch.tensor([14.3]).log().requires_grad_()
    leaves = [x_BD, y_BD, log_scale]
    return lambda: torch.autograd.grad(loss(*leaves, **options), leaves)


def open_clip_softmax() -> Callable[..., Tensor] | None:
    """open_clip's loss, if it is installed."""
    try:
        from open_clip.loss import ClipLoss
    except ImportError:
        return None
    module = ClipLoss()
    return lambda x, y, log_scale: module(x, y, log_scale.exp())  # type: ignore[no-any-return]


def open_clip_sigmoid() -> Callable[..., Tensor] | None:
    """open_clip's sigmoid loss, if it is installed."""
    try:
        from open_clip.loss import SigLipLoss
    except ImportError:
        return None
    module = SigLipLoss(rank=0, world_size=1)
    return lambda x, y, log_scale: module(x, y, log_scale.exp(), torch.tensor([-10.0]))  # type: ignore[no-any-return]


def dense(x_BD: Tensor, y_BD: Tensor, log_scale: Tensor) -> Tensor:
    """All logits at once, shared by both directions."""
    logits_BB = log_scale.exp() * (x_BD @ y_BD.T)
    target_B = torch.arange(len(x_BD))
    return (cross_entropy(logits_BB, target_B) + cross_entropy(logits_BB.T, target_B)) / 2


def teacher_of(total: int, width: int) -> Teacher:
    """A teacher that knows more of the pairs than the student of `features` does."""
    u_BE, v_BE = (part.detach() for part in features(total, width, noise=1.0, seed=1))
    return Teacher(u_BE, v_BE, torch.tensor([30.0]).log())


def own_distillation(teacher: Teacher, logit_cache_bytes: int = 0) -> Callable[..., Tensor]:
    """The fused loss; half of the target is the pairs' own, as in the forms below."""
    return lambda x, y, log_scale: distillation_loss(
        x, y, log_scale, [teacher], hard_weight=0.5, logit_cache_bytes=logit_cache_bytes
    )


def dense_distillation(teacher: Teacher) -> Callable[..., Tensor]:
    """All logits at once, in as few operations as autograd allows: hard and soft targets share each log-softmax."""

    def loss(x_BD: Tensor, y_BD: Tensor, log_scale: Tensor) -> Tensor:
        logits_BB = log_scale.exp() * (x_BD @ y_BD.T)
        teacher_BB = teacher.log_scale.exp() * (teacher.u @ teacher.v.T)
        total = x_BD.new_zeros(())
        for student, taught in ((logits_BB, teacher_BB), (logits_BB.T, teacher_BB.T)):
            log_p_BB = student.log_softmax(1)
            total = total - (taught.softmax(1) * log_p_BB).sum(1).mean() - log_p_BB.diagonal().mean()
        return total / 4

    return loss


def separate_distillation(teacher: Teacher) -> Callable[..., Tensor]:
    """All logits at once, and a cross entropy for each direction and kind of target."""

    def loss(x_BD: Tensor, y_BD: Tensor, log_scale: Tensor) -> Tensor:
        logits_BB = log_scale.exp() * (x_BD @ y_BD.T)
        teacher_BB = teacher.log_scale.exp() * (teacher.u @ teacher.v.T)
        target_B = torch.arange(len(x_BD))
        soft = cross_entropy(logits_BB, teacher_BB.softmax(1)) + cross_entropy(logits_BB.T, teacher_BB.T.softmax(1))
        hard = cross_entropy(logits_BB, target_B) + cross_entropy(logits_BB.T, target_B)
        return (soft + hard) / 4

    return loss


def open_clip_distillation(teacher: Teacher) -> Callable[..., Tensor] | None:
    """open_clip's distillation loss, if it is installed."""
    try:
        from open_clip.loss import DistillClipLoss
    except ImportError:
        return None
    module = DistillClipLoss()

    def loss(x_BD: Tensor, y_BD: Tensor, log_scale: Tensor) -> Tensor:
        parts = module(x_BD, y_BD, log_scale.exp(), teacher.u, teacher.v, teacher.log_scale.exp())
        total: Tensor = sum(parts) / 2
        return total

    return loss


def linear_cross_entropy() -> Callable[..., Tensor] | None:
    """Torch's chunked linear cross entropy, once for each direction, if this torch has it."""
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        return None

    def loss(x_BD: Tensor, y_BD: Tensor, log_scale: Tensor) -> Tensor:
        target_B, scale = torch.arange(len(x_BD)), log_scale.exp()
        both: Tensor = function(scale * x_BD, y_BD, target_B) + function(scale * y_BD, x_BD, target_B)
        return both / 2

    return loss


def take_turns(steps: dict[str, Step], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of every step in every round, after one that does not count."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)
    return seconds


def report(title: str, steps: dict[str, Step], pairs: list[tuple[str, str]], rounds: int, clock: Clock) -> None:
    """Print times and the ratio of each pair."""
    print(f"\n{title}")
    seconds = take_turns(steps, rounds, clock)
    for name, times in seconds.items():
        print(f"  {name:44s} best {min(times):8.3f} s   median {statistics.median(times):8.3f} s")
    for over, under in pairs:
        if over in seconds and under in seconds:
            ratios = sorted(a / b for a, b in zip(seconds[over], seconds[under], strict=True))
            best = min(seconds[over]) / min(seconds[under])
            spread = f"median of rounds {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}"
            print(f"  {over} / {under}: {best:.2f} best over best ({spread})")


def bench_softmax(total: int, width: int, rounds: int, clock: Clock) -> None:
    """The softmax loss between its floor and open_clip's loss, all in the same rounds."""
    x_BD, y_BD = features(total, width)
    cached = f"softmax, {EIGHTH // 2**20} MiB logit cache"
    steps = {
        "floor of 4 passes": floor(x_BD, y_BD, True),
        "softmax": training_step(x_BD, y_BD, contrastive_loss),
        cached: training_step(x_BD, y_BD, contrastive_loss, logit_cache_bytes=EIGHTH),
    }
    rival = open_clip_softmax()
    if rival is not None:
        steps["open_clip ClipLoss"] = training_step(x_BD, y_BD, rival)
    pairs = [("softmax", "floor of 4 passes"), ("open_clip ClipLoss", "softmax"), ("open_clip ClipLoss", cached)]
    report(f"Softmax, B = {total}, D = {width}", steps, pairs, rounds, clock)


def bench_distillation(total: int, width: int, rounds: int, clock: Clock) -> None:
    """Distillation from one teacher of the student's width between its floors and dense forms, in the same rounds."""
    cached = "distillation, 1 GiB logit cache"
    own: dict[str, Callable[[Teacher], Callable[..., Tensor] | None]] = {
        "distillation": own_distillation,
        cached: lambda teacher: own_distillation(teacher, GIB),
    }
    rivals: dict[str, Callable[[Teacher], Callable[..., Tensor] | None]] = {
        "dense, shared log-softmax": dense_distillation,
        "dense, separate cross entropies": separate_distillation,
        "open_clip DistillClipLoss": open_clip_distillation,
    }

    def training_steps(batch: int) -> dict[str, Step]:
        x_BD, y_BD = features(batch, width)
        losses = {name: loss(teacher_of(batch, width)) for name, loss in (own | rivals).items()}
        return {name: training_step(x_BD, y_BD, loss) for name, loss in losses.items() if loss is not None}

    # Forms with other gradients would not compare.
    gradients: Any = {name: step() for name, step in training_steps(512).items()}
    for name, (dx_BD, *_) in gradients.items():
        apart = float((dx_BD - gradients["distillation"][0]).norm() / dx_BD.norm())
        if apart > 1e-4:
            raise RuntimeError(f"the gradient of {name} differs by {apart:.1e} from distillation's; expected the same")

    x_BD, y_BD = features(total, width)
    teacher = teacher_of(total, width)
    steps = {
        "floor of 6 passes": distillation_floor(x_BD, y_BD, teacher, True),
        "floor of 4 passes": distillation_floor(x_BD, y_BD, teacher, False),
        **training_steps(total),
    }
    pairs = [("distillation", "floor of 6 passes"), (cached, "floor of 4 passes")]
    pairs += [(rival, name) for rival in rivals for name in own]
    report(f"Distillation from one teacher of width {width}, B = {total}, D = {width}", steps, pairs, rounds, clock)


def bench_time(total: int, width: int, rival_total: int, rounds: int, clock: Clock) -> None:
    x_BD, y_BD = features(total, width)
    steps = {
        "floor of 4 passes": floor(x_BD, y_BD, True),
        "softmax": training_step(x_BD, y_BD, contrastive_loss),
        "floor of 3 passes": floor(x_BD, y_BD, False),
        "softmax, 1 GiB logit cache": training_step(x_BD, y_BD, contrastive_loss, logit_cache_bytes=GIB),
        "floor of 3 passes, fresh memory": floor(x_BD, y_BD, False, fresh=True),
        "sigmoid": training_step(x_BD, y_BD, contrastive_loss, kind="sigmoid", bias=torch.tensor([-10.0])),
    }
    floors = [("softmax", "floor of 4 passes"), ("softmax, 1 GiB logit cache", "floor of 3 passes")]
    floors.append(("softmax, 1 GiB logit cache", "floor of 3 passes, fresh memory"))
    report(f"B = {total}, D = {width}", steps, [*floors, ("sigmoid", "floor of 3 passes")], rounds, clock)

    x_BD, y_BD = features(rival_total, width)
    rivals = {
        "open_clip ClipLoss": open_clip_softmax(),
        "dense cross entropy": dense,
        "2 x torch linear_cross_entropy": linear_cross_entropy(),
        "open_clip SigLipLoss": open_clip_sigmoid(),
    }
    eighth = f"softmax, {EIGHTH // 2**20} MiB logit cache"
    steps = {
        "softmax": training_step(x_BD, y_BD, contrastive_loss),
        eighth: training_step(x_BD, y_BD, contrastive_loss, logit_cache_bytes=EIGHTH),
        "softmax, 1 GiB logit cache": training_step(x_BD, y_BD, contrastive_loss, logit_cache_bytes=GIB),
        "sigmoid": training_step(x_BD, y_BD, contrastive_loss, kind="sigmoid", bias=torch.tensor([-10.0])),
    }
    steps |= {name: training_step(x_BD, y_BD, loss) for name, loss in rivals.items() if loss is not None}
    softmax = ["softmax", eighth, "softmax, 1 GiB logit cache"]
    ratios = [(name, own) for name in rivals for own in (["sigmoid"] if "SigLip" in name else softmax)]
    report(f"Others, B = {rival_total}, D = {width}", steps, ratios, max(2, rounds // 2), clock)


def process_bytes(field: str) -> int:
    """VmRSS (in memory now) or VmHWM (the most there was since the last reset) of this process."""
    return proc_field("/proc/self/status", field)


def proc_field(path: str, field: str) -> int:
    """A field in kB of a file under /proc, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in Path(path).read_text().splitlines() if line.startswith(field))


def extra_bytes(step: Step, gradient_bytes: int) -> int:
    """Peak of one step over what was held before it and the gradients it returns. Linux with glibc only."""
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed earlier would be used again and not count
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = process_bytes("VmRSS")
    step()
    return process_bytes("VmHWM") - before - gradient_bytes


MEMORY_KINDS = ["softmax", "sigmoid", "distillation", "dense distillation"]


def measure_memory(total: int, width: int, kind: str) -> None:
    """Print the extra memory of one step, in a process of its own."""

    def loss_of(batch: int) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        if kind == "distillation":
            return own_distillation(teacher_of(batch, width)), {}
        if kind == "dense distillation":
            return dense_distillation(teacher_of(batch, width)), {}
        return contrastive_loss, {"kind": kind} | ({"bias": torch.tensor([-10.0])} if kind == "sigmoid" else {})

    loss, options = loss_of(256)
    training_step(*features(256, width), loss, **options)()  # libraries make their own buffers at first use
    x_BD, y_BD = features(total, width)
    loss, options = loss_of(total)
    extra = extra_bytes(training_step(x_BD, y_BD, loss, **options), 2 * x_BD.nbytes) / 2**20
    print(f"  {kind:18s} B = {total}, D = {width}: {extra:.0f} MiB beyond inputs and gradients")


def bench_memory(totals: dict[str, int], width: int, threads: int) -> None:
    """Memory of these kinds of loss, each at its batch."""
    print("\nMemory of forward and backward", flush=True)
    for kind, total in totals.items():
        command = [sys.executable, __file__, "--memory", kind, "--batch", str(total), "--width", str(width)]
        subprocess.run([*command, "--threads", str(threads)], check=True)


def bench_error() -> None:
    """Relative error of dx against float64, beside that of the dense float32 loss."""
    print("\nRelative gradient error against float64, B = 1024, D = 512: this loss, dense float32")
    x_BD, y_BD = (part.detach() for part in features(1024, 512, noise=8.0))
    for scale in (1.0, 14.3, 100.0, 1000.0):
        grads = []
        for loss, dtype in (
            (contrastive_loss, torch.float32),
            (dense, torch.float32),
            (reference_contrastive_loss, torch.float64),
        ):
            leaf = x_BD.to(dtype).requires_grad_()
            log_scale = torch.tensor([scale], dtype=torch.float32).log().to(dtype)
            grads.append(torch.autograd.grad(loss(leaf, y_BD.to(dtype), log_scale), leaf)[0].double())
        errors = [float((grad - grads[2]).norm() / grads[2].norm()) for grad in grads[:2]]
        print(f"  scale {scale:6.1f}: {errors[0]:.1e}, {errors[1]:.1e}")


CURVES: dict[str, Callable[[], Callable[..., Tensor] | None]] = {
    "this loss": lambda: contrastive_loss,
    "open_clip ClipLoss": open_clip_softmax,
    "2 x torch linear_cross_entropy": linear_cross_entropy,
    "dense cross entropy": lambda: dense,
}


def measure_curve(name: str, width: int, totals: list[int], limit: float) -> None:
    """One implementation's points, a JSON line each: seconds and extra bytes, or why it was skipped."""
    loss = CURVES[name]()
    seconds = extra = 0.0
    before = 256
    if loss is not None:
        training_step(*features(before, width), loss)()
    for total in totals:
        growth = (total / before) ** 2
        available = proc_field("/proc/meminfo", "MemAvailable") * 0.8
        point: dict[str, object] = {"batch": total}
        if loss is None:
            point["skipped"] = "not installed"
        elif seconds * growth > limit:
            point["skipped"] = f"would take about {seconds * growth:.0f} s, over --limit {limit:.0f} s"
        elif extra * growth > available and extra > 2**28:  # grows with the square of B where it is that large
            point["skipped"] = f"would need about {extra * growth / GIB:.0f} GiB, of {available / GIB:.0f} GiB to spare"
        else:
            x_BD, y_BD = features(total, width)
            step = training_step(x_BD, y_BD, loss)
            start = time.perf_counter()
            extra = extra_bytes(step, 2 * x_BD.nbytes)
            rounds = [time.perf_counter() - start]
            rounds += take_turns({"": step}, 3, time.perf_counter)[""] if rounds[0] < 3 else []
            seconds, before = min(rounds), total
            point |= {"seconds": seconds, "extra_bytes": extra}
        print(json.dumps(point), flush=True)


def bench_curves(widths: list[int], totals: list[int], threads: int, limit: float, plot: Path | None) -> None:
    """Time and memory of every implementation against the batch."""
    points: dict[tuple[int, str], list[dict[str, float]]] = {}
    for width in widths:
        print(f"\nForward and backward against B, D = {width}: seconds, MiB beyond inputs and gradients")
        for name in CURVES:
            command = [sys.executable, __file__, "--curve", name, "--width", str(width), "--threads", str(threads)]
            command += ["--limit", str(limit), "--batches", *map(str, totals)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows = [json.loads(line) for line in output.splitlines()]
            print(f"  {name}")
            for row in rows:
                told = row.get("skipped") or f"{row['seconds']:9.3f} s {row['extra_bytes'] / 2**20:9.0f} MiB"
                print(f"    B = {row['batch']:6d}  {told}", flush=True)
            points[width, name] = [row for row in rows if "seconds" in row]
    if plot is not None:
        draw_curves(points, widths, plot)
        print(f"  drawn in {plot}")


def draw_curves(points: dict[tuple[int, str], list[dict[str, float]]], widths: list[int], path: Path) -> None:
    """Both axes logarithmic, one column of plots a width; PNG or SVG by the path's ending."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(widths), figsize=(5 * len(widths), 7), squeeze=False, sharex=True)
    for (width, name), rows in points.items():
        column = widths.index(width)
        batches = [row["batch"] for row in rows]
        axes[0][column].plot(batches, [row["seconds"] for row in rows], marker="o", label=name)
        axes[1][column].plot(batches, [max(row["extra_bytes"] / 2**20, 1) for row in rows], marker="o", label=name)
    for column, width in enumerate(widths):
        axes[0][column].set_title(f"D = {width}, float32, forward + backward")
        axes[1][column].set_xlabel("batch")
        for axis, label in ((axes[0][column], "seconds"), (axes[1][column], "MiB beyond inputs and gradients")):
            axis.set(xscale="log", yscale="log", ylabel=label)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
            axis.set_xticks([row["batch"] for rows in points.values() for row in rows], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)


def bench_share(totals: list[int], rounds: int) -> None:
    """The loss's part of a real training step: a small timm tower at 64 pixels and a text transformer, AdamW."""
    from threetowers.trainer.config import ImageTower, TextTower
    from threetowers.trainer.model.towers.text_transformer import TextTransformer
    from threetowers.trainer.model.towers.timm_tower import TimmTower

    torch.manual_seed(0)
    image = TimmTower(ImageTower(kind="timm", model="resnet10t"), 64)
    text = TextTransformer(TextTower(kind="text", width=192, depth=3, heads=4, pool="mean"), 1000, 16)
    heads = [torch.nn.Linear(tower.width, 256, bias=False) for tower in (image, text)]
    log_scale = torch.nn.Parameter(torch.tensor([14.3]).log())
    parameters = [part for module in (image, text, *heads) for part in module.parameters()]
    optimizer = torch.optim.AdamW([*parameters, log_scale])
    print("\nShare of a training step, resnet10t at 64 pixels and a text transformer of width 192, depth 3; D = 256")
    for total in totals:
        pixels_B3hw = torch.randint(0, 256, (total, 3, 64, 64), dtype=torch.uint8)
        tokens_BL = torch.randint(3, 1000, (total, 16))
        shares = []
        for _ in range(rounds):
            start = time.perf_counter()
            sides = [normalize(heads[0](image(pixels_B3hw))), normalize(heads[1](text(tokens_BL)))]
            leaves = [side.detach().requires_grad_() for side in sides]
            before = time.perf_counter()
            contrastive_loss(leaves[0], leaves[1], log_scale).backward()  # type: ignore[no-untyped-call]
            loss_seconds = time.perf_counter() - before
            torch.autograd.backward(sides, [leaf.grad for leaf in leaves])
            optimizer.step()
            optimizer.zero_grad()
            shares.append((loss_seconds, time.perf_counter() - start))
        loss_seconds, seconds = min(shares[1:] or shares, key=lambda pair: pair[1])  # the first one warms up
        part = f"{loss_seconds / seconds:.2%}"
        print(f"  B = {total}: loss {loss_seconds:.3f} s of {seconds:.3f} s, {part}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--softmax", action="store_true", help="only the softmax loss, its floor and open_clip's")
    parser.add_argument("--distill", action="store_true", help="only distillation, its floor and dense forms")
    parser.add_argument("--batch", type=int, help="B; default 8192, with --quick 2048")
    parser.add_argument("--width", type=int, default=512, help="D")
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its processor time instead of the clock's")
    parser.add_argument("--curves", action="store_true", help="only time and memory against B, for D = 512 and 768")
    parser.add_argument("--plot", type=Path, help="with --curves: draw them in this PNG or SVG file")
    parser.add_argument("--batches", type=int, nargs="+", default=[2**k for k in range(10, 16)], help="of --curves")
    parser.add_argument("--limit", type=float, default=90, help="seconds that a point of --curves may take")
    parser.add_argument("--memory", choices=MEMORY_KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--curve", choices=list(CURVES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.threads = 1 if args.cpu_time else args.threads
    torch.set_num_threads(args.threads)
    batch = args.batch or (2048 if args.quick else 8192)
    if args.memory:
        measure_memory(batch, args.width, args.memory)
        return
    if args.curve:
        measure_curve(args.curve, args.width, args.batches, args.limit)
        return
    backend = type(backend_for(torch.empty(1, 1))).__name__
    vectors = torch.backends.cpu.get_cpu_capability()
    used = f"{args.threads} threads, {vectors}, back end {backend}"
    print(f"torch {torch.__version__}, {used}, load {os.getloadavg()[0]:.1f}", flush=True)
    if args.curves or args.plot:
        totals = [total for total in args.batches if total <= 2048] if args.quick else args.batches
        bench_curves([512] if args.quick else [512, 768], totals, args.threads, args.limit, args.plot)
        return
    clock, rounds = time.thread_time if args.cpu_time else time.perf_counter, args.rounds or (3 if args.quick else 5)
    if args.softmax:
        bench_softmax(batch, args.width, rounds, clock)
        return
    if args.distill:
        bench_distillation(batch, args.width, rounds, clock)
        # The dense form's memory grows with the square of B, and is measured where it fits.
        bench_memory({"distillation": 4 * batch, "dense distillation": batch}, args.width, args.threads)
        return
    bench_error()
    bench_time(batch, args.width, batch, rounds, clock)
    large, narrow = 16384 if args.quick else 32768, 64 if args.quick else args.width
    bench_memory({"softmax": large, "sigmoid": large}, narrow, args.threads)
    bench_share([256] if args.quick else [256, 2048], 2 if args.quick else 3)


if __name__ == "__main__":
    main()

"""Show on one GPU that everything is right, and how fast it is, in ten minutes.

    python -m tests.gpu                    # as `make gpu`: on a machine with a GPU
    python -m tests.gpu --rehearse         # as `make gpu-rehearse`: the steps themselves, on the CPU, at tiny sizes
    python -m tests.gpu --only kernel_tiles loss_errors
    python3 -m tests.gpu --wheels build/gpu-wheels   # where torch is installed and no network is there

The exit code is 1 where a comparison with a reference failed or was not made, 2 where nothing could be run.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes: tests the steps alone")
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", help="these steps, and the first, which looks at the machine"
    )
    parser.add_argument("--seconds", type=float, default=550, help="for all steps together (550)")
    default = os.environ.get("OUT") or str(ROOT / "runs" / "gpu")
    parser.add_argument("--output-dir", type=Path, default=Path(default), help="default: $OUT, else runs/gpu")
    parser.add_argument("--wheels", type=Path, help="folder made by tests/gpu/wheels.sh")
    return parser.parse_args()


def install(wheels: Path) -> None:
    """Install the wheels into a folder beside them, unless it is there, and start again with it on the path."""
    site = (wheels / "installed").resolve()
    files = sorted(str(file) for file in wheels.glob("*.whl"))
    if not files:
        sys.exit(f"--wheels {wheels}: holds no wheels; make them with tests/gpu/wheels.sh {wheels}")
    if not site.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", str(site), *files], check=True)
    rest = [word for word in sys.argv[1:] if word not in ("--wheels", str(wheels))]
    path = os.pathsep.join([str(site), str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execve(sys.executable, [sys.executable, "-m", "tests.gpu", *rest], {**os.environ, "PYTHONPATH": path})


def main() -> int:
    options = arguments()
    if options.wheels is not None:
        install(options.wheels)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # steps are ended, scratch removed
    scratch = Path(tempfile.mkdtemp(prefix="threetowers-gpu-"))
    try:
        return run(options, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run(options: argparse.Namespace, scratch: Path) -> int:
    # Of this process and of those that steps start. Chosen before anything is imported that would look for itself.
    os.environ |= {"DS_ACCELERATOR": "cpu" if options.rehearse else "cuda", "TQDM_DISABLE": "1"}
    os.environ["THREETOWERS_CUDA_CACHE"] = str(scratch / "cubins")
    if options.rehearse:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    from tests.gpu.plan import MACHINE, STEPS
    from tests.gpu.predictions import PREDICTIONS
    from tests.gpu.runner import Runner
    from tests.gpu.summary import summarize

    known = {step.module for step in STEPS}
    if unknown := set(options.only or ()) - known:
        sys.exit(f"--only {' '.join(sorted(unknown))}: expected some of {', '.join(step.module for step in STEPS)}")
    steps = [step for step in STEPS if options.only is None or step.module in options.only or step.background]

    options.output_dir.mkdir(parents=True, exist_ok=True)
    runner = Runner(options.output_dir, scratch, options.seconds, options.rehearse, "tests.gpu.steps")
    outcomes = runner.run([MACHINE])
    if outcomes[0].state != "ok" and not options.rehearse:
        runner.start_method = "spawn"  # if it is the fork that cannot use the GPU
        outcomes = runner.run([MACHINE])
    if outcomes[0].state == "ok":
        import_for_forks()
        outcomes += runner.run(steps)

    text = summarize(outcomes, runner.results, {} if options.rehearse else PREDICTIONS)
    (options.output_dir / "summary.txt").write_text(text)
    print(f"\n{text}\n{runner.passed:.0f} s in all; results.jsonl, summary.txt and log.txt are in {options.output_dir}")
    if outcomes[0].state != "ok":
        return 2
    return int(any(outcome.wrong for outcome in outcomes))


def import_for_forks() -> None:
    """Import what most steps need. None of it may start CUDA: a process that has cannot fork others that use it."""
    import torch

    import threetowers.cache.builder.build
    import threetowers.trainer.train  # noqa: F401

    assert not torch.cuda.is_initialized()


if __name__ == "__main__":
    sys.exit(main())

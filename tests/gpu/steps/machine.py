"""The machine: card, driver, host, versions. Fails where no GPU is found or a package is missing."""

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import torch

from tests.gpu.setting import Setting

ROOT = Path(__file__).parents[3]
MODULES = {  # of distributions that are not imported by their own name
    "faiss-gpu": "faiss",
    "google-crc32c": "google_crc32c",
    "pillow": "PIL",
    "protobuf": "google.protobuf",
    "pyyaml": "yaml",
    "typing-extensions": "typing_extensions",
}


def run(setting: Setting) -> None:
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores")
    shared = shutil.disk_usage("/dev/shm")
    setting.record("/dev/shm", shared.total / 1e9, "GB")
    if not setting.gpu_only("the card"):
        _check_packages()
        return
    if not torch.cuda.is_available():
        raise RuntimeError(
            "no GPU: torch.cuda.is_available() is False; run this where there is one, or rehearse on the CPU with "
            "`make gpu-rehearse`"
        )
    card = torch.cuda.get_device_properties(0)
    print(
        f"{card.name} (sm_{card.major}{card.minor}), {card.total_memory / 1e9:.0f} GB, "
        f"{card.multi_processor_count} multiprocessors"
    )
    print(f"CUDA {torch.version.cuda}, NCCL {torch.cuda.nccl.version()}, cuDNN {torch.backends.cudnn.version()}")
    query = "name,driver_version,clocks.sm,clocks.max.sm,power.limit"
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], check=False)
    ones = torch.ones(1000, device=setting.device)
    if int(ones.sum()) != 1000:
        raise RuntimeError(f"the sum of 1000 ones on the GPU is {int(ones.sum())}")
    _check_packages()


def _check_packages() -> None:
    """Look for what the package depends on, without importing it, and raise an error that names all that is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    missing = []
    for requirement in project["dependencies"]:
        name = re.split(r"[<>=\[ ]", requirement)[0]
        module = MODULES.get(name, name)
        if not _is_installed(module):
            missing.append(name)
            continue
        versions = {importlib.metadata.version(found) for found in _distributions().get(module, [])}
        print(" ".join([name, *sorted(versions)]), end=", ")
    print(flush=True)
    if missing:
        raise RuntimeError(
            f"missing: {', '.join(missing)}; install threetowers, or carry a folder made by tests/gpu/wheels.sh "
            "and name it with --wheels"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


@functools.cache
def _distributions() -> dict[str, list[str]]:
    """Return the distributions that a module comes from: `faiss` may be faiss-gpu or faiss-cpu."""
    return dict(importlib.metadata.packages_distributions())

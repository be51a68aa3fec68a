"""Run what computes once more as processors with fewer vector instructions would: `make test-isa`.

    python tests/instruction_sets.py [PYTEST OPTIONS]

On an x86 processor with AVX-512 that is twice, on one with AVX2 once. Variables that the libraries read at their start
hold back torch (and with it the sweep of the CPU losses), oneDNN, MKL, NumPy's and SciPy's OpenBLAS, and faiss.
"""

import os
import platform
import subprocess
import sys

import pytest
import torch

# From the least on; the names are those of torch.backends.cpu.get_cpu_capability().
HELD_BACK = {
    "DEFAULT": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Nehalem",
        "FAISS_SIMD_LEVEL": "NONE",
    },
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "FAISS_SIMD_LEVEL": "AVX2",
    },
}
KERNELS_AND_TOWERS = [
    "tests/kernels",
    "tests/trainer/test_grad_cache.py",
    "tests/trainer/test_masked.py",
    "tests/trainer/test_model.py",
    "tests/trainer/test_pointwise.py",
    "tests/trainer/test_models.py",
]
# AVX2 is what most machines have; the least is tried where that is cheap.
TESTS = {
    "DEFAULT": KERNELS_AND_TOWERS,
    "AVX2": [*KERNELS_AND_TOWERS, "tests/cache/test_timm_encoder.py", "tests/trainer/test_export.py", "tests/eval"],
}


def main(options: list[str]) -> int:
    if platform.machine() not in ("x86_64", "AMD64"):
        return 0
    best = torch.backends.cpu.get_cpu_capability()
    for name, variables in HELD_BACK.items():
        if name == best:
            break
        print(f"as a processor without more than {name}: {variables}", flush=True)
        command = [sys.executable, "-m", "pytest", *options, *TESTS[name]]
        code = subprocess.run(command, env=os.environ | variables).returncode
        if code != pytest.ExitCode.OK:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The one part of the build that pyproject.toml cannot say: the optional C++ sweep of the CPU losses."""

from setuptools import Extension, setup

SWEEP = Extension(
    "threetowers.kernels.cpu.sweep",  # loaded by ctypes, not imported: plain C, no Python in it
    sources=["kernels/cpu/sweep.cpp"],
    depends=[f"kernels/cpu/{part}_isa.h" for part in ("sweep", "vector", "tile", "softmax", "sigmoid", "distillation")],
    language="c++",
    extra_compile_args=[
        "-std=gnu++17",
        "-O3",
        "-ffp-contract=off",  # the source says where products and sums are fused
        "-fno-math-errno",
        "-fno-trapping-math",  # with the next: lets "a > b ? a : b" become one instruction
        "-fno-signed-zeros",
        "-Wno-psabi",
    ],
    extra_link_args=["-pthread", "-ldl"],
    optional=True,  # without a compiler the package still installs, and computes the same in torch ops
)

setup(ext_modules=[SWEEP])

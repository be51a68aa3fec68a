"""NVRTC compiles the kernels for every architecture without warnings or spills, to the intended instructions.

Needs neither a GPU nor a toolkit: the compiler comes with torch, the disassembler with Triton.
"""

import functools
import importlib.util
import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from threetowers.kernels.cuda.compiler import (
    SOURCES,
    CompiledKernel,
    CompileError,
    KernelProgram,
    cached_cubin,
    compile_program,
)
from threetowers.kernels.cuda.launch import BLOCK_THREADS

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
BLOCK_KERNELS = ["stats", "softmax_gradient", "sigmoid"]
DISTILLATION_KERNELS = ["distill_stats", "distill_gradient", "distill_sigmoid"]
DENSE_KERNELS = [
    "merge",
    "merge_expectations",
    "dense_row_stats",
    "dense_column_stats",
    "dense_softmax_gradient",
    "dense_sigmoid",
]
REGISTERS = 65536  # of a processor

STAGES = {"sm_80": 4, "sm_90": 4, "sm_100": 4}
compiled = functools.cache(compile_program)


def block_programs() -> Iterator[object]:
    """Yield the tensor-core kernels on every architecture; fp16 differs from bf16 in a few instructions' names only."""
    for arch, kernel, element in itertools.product(ARCHITECTURES, BLOCK_KERNELS, ((), ("FP16",))):
        program = KernelProgram(kernel, arch, (*element, "COLUMNS=128", f"STAGES={STAGES.get(arch, 3)}"))
        yield parameter(program, slow=bool(element) and arch not in ("sm_80", "sm_120"))
        if arch in STAGES:
            program = KernelProgram(kernel, arch, (*element, "COLUMNS=256", "STAGES=4"))
            yield parameter(program, slow=bool(element) or arch != "sm_90")


def swept_programs() -> Iterator[object]:
    """Yield the same kernels, with dots from memory."""
    for arch, kernel, element in itertools.product(ARCHITECTURES, BLOCK_KERNELS, ((), ("FP16",))):
        program = KernelProgram(kernel, arch, (*element, "COLUMNS=128", "LIBRARY_DOTS"))
        yield parameter(program, slow=bool(element) or arch != "sm_90")


def distillation_programs() -> Iterator[object]:
    """Yield the kernels of distillation by number of teachers; elements differ in how gradients are packed only."""
    for arch, kernel, teachers in itertools.product(ARCHITECTURES, DISTILLATION_KERNELS, (1, 2, 5)):
        for element in ((),) if kernel == "distill_stats" or teachers != 2 else ((), ("FP16",), ("FP32",)):
            defines = (*element, "ROWS=64", "COLUMNS=64", "LIBRARY_DOTS", f"TEACHERS={teachers}")
            slow = arch not in ("sm_80", "sm_90") or element == ("FP16",) or teachers == 5
            yield parameter(KernelProgram(kernel, arch, defines), slow)


def dense_programs() -> Iterator[object]:
    """Yield the generic kernels on every architecture."""
    for arch, kernel in itertools.product(ARCHITECTURES, DENSE_KERNELS):
        yield parameter(KernelProgram(kernel, arch))


def parameter(program: KernelProgram, slow: bool = False) -> object:
    name = "-".join((program.kernel, program.arch, *program.defines))
    return pytest.param(program, id=name, marks=[pytest.mark.slow] if slow else [])


def test_every_kernel_is_listed() -> None:
    assert sorted(path.stem for path in SOURCES.glob("*.cu")) == sorted(
        BLOCK_KERNELS + DISTILLATION_KERNELS + DENSE_KERNELS
    )


@pytest.mark.parametrize("program", [*block_programs(), *swept_programs(), *distillation_programs(), *dense_programs()])
def test_compiles_without_warnings_or_spills(program: KernelProgram) -> None:
    log = compiled(program).log
    assert "warning" not in log.lower(), log
    (registers,) = re.findall(r"Used (\d+) registers", log)
    blocks = 1 if "COLUMNS=256" in program.defines else 2  # at once on a processor
    assert int(registers) <= min(255, REGISTERS // BLOCK_THREADS // blocks)
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log) == [
        ("0",) * 3
    ]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", BLOCK_KERNELS)
def test_limits_on_dots_spill_next_to_nothing(kernel: str, arch: str) -> None:
    """Two registers in the widest blocks, once a block; none in the others."""
    for shape, most in (("COLUMNS=128", 0), ("COLUMNS=256", 8)):
        log = compiled(KernelProgram(kernel, arch, (shape, "STAGES=4", "DOT_LIMITS"))).log
        assert "warning" not in log.lower(), log
        ((_, stored, _),) = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
        )
        assert int(stored) <= most, (shape, stored)


@pytest.mark.parametrize("program", [*block_programs()])
def test_uses_tensor_cores_and_asynchronous_copies(program: KernelProgram, tmp_path: Path) -> None:
    listing = disassembled(compiled(program), tmp_path)
    check_memory_and_exponentials(listing)
    loop = [text.split()[0] for text in innermost_loop_around(listing, "HMMA")]
    product = "HMMA.16816.F32" if "FP16" in program.defines else "HMMA.16816.F32.BF16"
    wide = "COLUMNS=256" in program.defines
    products = 64 if wide else 32  # 64 x 64 x 32, or 64 x 32 x 32 a warp
    assert sum(name == product for name in loop) == products
    assert sum(name.startswith("LDSM.16") and name.endswith(".4") for name in loop) == (16 if wide else 12)
    assert sum(name.startswith("LDGSTS") and name.endswith(".128") for name in loop) == (6 if wide else 4)
    assert len(loop) <= (3.0 if wide else 4.5) * products, "the loop does much besides multiplying"


@pytest.mark.parametrize("program", [*swept_programs()])
def test_reads_dots_in_wide_words(program: KernelProgram, tmp_path: Path) -> None:
    listing = disassembled(compiled(program), tmp_path)
    check_memory_and_exponentials(listing)
    assert wide_reads(listing) == 16  # 64 dots a thread, four at a time


@pytest.mark.parametrize("program", [*distillation_programs()])
def test_reads_the_dots_of_all_teachers_once(program: KernelProgram, tmp_path: Path) -> None:
    listing = disassembled(compiled(program), tmp_path)
    check_memory_and_exponentials(listing)
    (teachers,) = (int(define.split("=")[1]) for define in program.defines if define.startswith("TEACHERS"))
    assert wide_reads(listing) == 4 * (1 + teachers)  # 16 dots a thread, four at a time


def wide_reads(listing: "Listing") -> int:
    """Return how many 16-byte reads of global memory a thread makes."""
    return sum(text.startswith("LDG") and ".128" in text.split()[0] for _, text in listing)


def check_memory_and_exponentials(listing: "Listing") -> None:
    """Assert that nothing is spilled, nothing is atomic, and exponentials are the fast ones."""
    instructions = {text.split()[0] for _, text in listing}
    assert not {name for name in instructions if name.startswith(("LDL", "STL", "ATOM", "RED."))}
    assert any(name.startswith("MUFU.EX2") for name in instructions)


@pytest.mark.parametrize("kernel", [*DENSE_KERNELS, *DISTILLATION_KERNELS])
def test_the_generic_path_compiles_for_older_devices(kernel: str) -> None:
    defines = ("FP32", "ROWS=64", "COLUMNS=64", "LIBRARY_DOTS") if kernel in DISTILLATION_KERNELS else ()
    assert compiled(KernelProgram(kernel, "sm_75", defines)).cubin


Listing = list[tuple[int, str]]  # address and instruction, predicates left out


def disassembled(program: CompiledKernel, folder: Path) -> Listing:
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    cuobjdump = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(program.cubin)
    text = subprocess.run([cuobjdump, "-sass", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", text)
    listing = [(int(address, 16), instruction) for address, instruction in found]
    assert any(instruction == "EXIT" for _, instruction in listing)
    return listing


def innermost_loop_around(listing: Listing, name: str) -> list[str]:
    """Return the instructions of the shortest loop, from a branch's target to the branch, that spans all of `name`."""
    places = [address for address, text in listing if text.startswith(name)]
    branches = [(int(to, 16), at) for at, text in listing for to in re.findall(r"^BRA.*?(0x[0-9a-f]+)", text)]
    start, stop = min(
        ((to, at) for to, at in branches if to <= places[0] and at >= places[-1]), key=lambda loop: loop[1] - loop[0]
    )
    return [text for address, text in listing if start <= address <= stop]


def test_a_compile_error_shows_the_compilers_log() -> None:
    with pytest.raises(CompileError, match=r"(?s)stats\.cu for sm_80.*STAGES"):
        compile_program(KernelProgram("stats", "sm_80", ("STAGES=none",)))


def test_cubins_are_cached_by_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THREETOWERS_CUDA_CACHE", str(tmp_path / "cubins"))
    program = KernelProgram("merge", "sm_80")
    first = cached_cubin(program)
    (path,) = (tmp_path / "cubins").iterdir()
    assert path.read_bytes() == first
    path.write_bytes(b"cached")
    assert cached_cubin(program) == b"cached"
    cached_cubin(KernelProgram("merge", "sm_90"))
    cached_cubin(KernelProgram("merge", "sm_80", ("FP16",)))
    assert len(list((tmp_path / "cubins").iterdir())) == 3


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("THREETOWERS_CUDA_CACHE", str(tmp_path / "file" / "cubins"))
    assert cached_cubin(KernelProgram("merge", "sm_80"))

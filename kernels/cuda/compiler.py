"""Compiling CUDA C++ to machine code with NVRTC, which comes with torch's wheel: no toolkit or GPU is needed."""

import contextlib
import hashlib
import importlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent
CACHE_VARIABLE = "THREETOWERS_CUDA_CACHE"


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message holds its log."""


@dataclass(frozen=True, slots=True)
class KernelProgram:
    """One kernel for one architecture."""

    kernel: str  # the file's name and the entry point's
    arch: str  # such as "sm_90"
    defines: tuple[str, ...] = ()  # such as "FP16", "STAGES=4"

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's options."""
        defines = (f"--define-macro={define}" for define in self.defines)
        return (f"--gpu-architecture={self.arch}", "--std=c++17", "-default-device", "--ptxas-options=-v", *defines)


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A cubin, and the log of the compiler and assembler: warnings, registers, spills."""

    cubin: bytes
    log: str


def compile_program(program: KernelProgram) -> CompiledKernel:
    """Compile without a cache.

    Raises:
        CompileError: the compiler refused the kernel; the message holds its log.
        ImportError: cuda-bindings is not installed.
    """
    nvrtc = _nvrtc()
    headers = sorted(SOURCES.glob("*.h"))
    source = (SOURCES / f"{program.kernel}.cu").read_bytes()
    handle = _checked(
        nvrtc.nvrtcCreateProgram(
            source,
            f"{program.kernel}.cu".encode(),
            len(headers),
            [header.read_bytes() for header in headers],
            [header.name.encode() for header in headers],
        )
    )
    try:
        options = [option.encode() for option in program.options]
        (result,) = nvrtc.nvrtcCompileProgram(handle, len(options), options)
        raw_log = _read_text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, handle)
        log = raw_log.decode(errors="replace").strip("\0\n ")
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(
                f"NVRTC could not compile {program.kernel}.cu for {program.arch} ({result.name}):\n{log}"
            )
        return CompiledKernel(_read_text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, handle), log)
    finally:
        nvrtc.nvrtcDestroyProgram(handle)


def cached_cubin(program: KernelProgram) -> bytes:
    """Return the program's machine code, from disk where it was compiled before from this source with these options.

    The folder is ``$THREETOWERS_CUDA_CACHE``, or else ``~/.cache/threetowers/cuda``. Files are completed before they
    are renamed into place, so that any number of processes may start at once. A folder that cannot be written costs
    time only.
    """
    path = cache_folder() / f"{program.kernel}-{program.arch}-{_digest(program)}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        cubin = compile_program(program).cubin
    with contextlib.suppress(OSError):  # compiled again next time
        _write_atomically(path, cubin)
    return cubin


def cache_folder() -> Path:
    """Return the folder of cached cubins."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(home) / "threetowers" / "cuda")


def _digest(program: KernelProgram) -> str:
    digest = hashlib.sha256(repr((program.options, _nvrtc().nvrtcVersion())).encode())
    for path in (SOURCES / f"{program.kernel}.cu", *sorted(SOURCES.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _nvrtc() -> Any:
    return importlib.import_module("cuda.bindings.nvrtc")  # untyped, and optional


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.replace(file.name, path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


def _checked(answer: tuple[Any, ...]) -> Any:
    result, *values = answer
    if result.value != 0:
        raise CompileError(f"NVRTC failed: {result.name}")
    return values[0] if values else None


def _read_text(size_of: Any, read: Any, handle: Any) -> bytes:
    buffer = b" " * int(_checked(size_of(handle)))
    _checked(read(handle, buffer))
    return buffer

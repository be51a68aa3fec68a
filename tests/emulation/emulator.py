"""Running the CUDA kernels on the CPU: builds the .cu files with g++ against emulator.h and calls them through ctypes.

Every tensor that a kernel gets is registered with its size, so that an access outside of all of them is found.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from threetowers.kernels.cuda.arguments import Argument, In, Out, PackedArguments
from threetowers.kernels.cuda.compiler import SOURCES
from threetowers.kernels.cuda.launch import BLOCK_THREADS, Launch, Limits

ENGINE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
SMALL = Limits((8, 6), 99 * 1024, 100 * 1024)  # sm_86: three slices in flight
LARGE = Limits((8, 0), 163 * 1024, 164 * 1024)  # sm_80: four
HOPPER = Limits((9, 0), 227 * 1024, 228 * 1024)  # sm_90: blocks of 128 x 256


class EmulationError(AssertionError):
    """A kernel broke a rule; the message names the thread and what it did."""


class Schedule(ctypes.Structure):
    """How threads interleave (block.h)."""

    _fields_ = (
        ("greedy", ctypes.c_bool),
        ("early", ctypes.c_bool),
        ("races", ctypes.c_bool),
        ("seed", ctypes.c_uint),
    )

    def __repr__(self) -> str:
        turns, copies = "greedy" if self.greedy else "turns", "early" if self.early else "late"
        return f"{turns}-{copies}-{'races' if self.races else 'values'}-{self.seed}"


@dataclass(frozen=True)
class Mutation:
    """A bug to plant: replace the one `old` in a source file by `new`."""

    file: str
    old: str
    new: str


@dataclass
class Emulator:
    """A `Launcher` without a GPU."""

    folder: Path
    limits: Limits = SMALL
    schedule: Schedule = field(default_factory=lambda: Schedule(False, False, True, 0))
    mutation: Mutation | None = None
    portable: bool = False  # without the hand-written switch of fiber.cpp
    last_block_only: bool = False  # of each launch: for grids too large to run
    loaded: dict[tuple[str, tuple[str, ...]], ctypes.CDLL] = field(default_factory=dict, repr=False)

    def prepare(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            self._library(launch)

    def bind(self) -> "Emulator":
        return self

    def run(self, launch: Launch, arguments: Sequence[Argument]) -> None:
        library, packed = self._library(launch), PackedArguments(arguments)
        library.emulator_forget_buffers()
        for argument in tensor_arguments(arguments):
            if argument.tensor is not None:
                assert argument.tensor.is_contiguous()
                at, size = argument.tensor.data_ptr(), argument.tensor.nbytes
                library.emulator_buffer(ctypes.c_void_p(at), ctypes.c_size_t(size), isinstance(argument, Out))
        shape = (*launch.grid, BLOCK_THREADS, launch.shared_bytes, self.last_block_only)
        error = library.emulator_launch(*shape, self.schedule, packed.table)
        if error is not None:
            raise EmulationError(f"{launch.kernel} under {self.schedule!r}: {error.decode()}")

    def _library(self, launch: Launch) -> ctypes.CDLL:
        key = launch.kernel, launch.defines
        if key not in self.loaded:
            library = ctypes.CDLL(str(self._built(launch)))
            library.emulator_launch.restype = ctypes.c_char_p
            library.emulator_launch.argtypes = [ctypes.c_int] * 5 + [Schedule, ctypes.c_void_p]
            self.loaded[key] = library
        return self.loaded[key]

    def _built(self, launch: Launch) -> Path:
        sources = _with_headers(f"{launch.kernel}.cu")
        if self.mutation is not None and self.mutation.file in sources:
            sources[self.mutation.file] = _mutated(sources[self.mutation.file], self.mutation)
        macros = [f'-DKERNEL_FILE="{launch.kernel}.cu"', f"-DKERNEL_NAME={launch.kernel}"]
        macros += [f"-D{define}" for define in launch.defines]
        objects = [self._object(path) for path in sorted(ENGINE.glob("*.cpp")) if path.name != "kernel_entry.cpp"]
        entry = [(ENGINE / name).read_text() for name in ("emulator.h", "kernel_entry.cpp")]
        folder = self.folder / f"{launch.kernel}-{_digest(macros, sources, entry, [path.name for path in objects])}"
        library = folder / "kernel.so"
        if not library.exists():
            folder.mkdir(exist_ok=True)
            for name, text in sources.items():
                (folder / name).write_text(text)
            warnings = [] if self.mutation is None else ["-w"]  # a planted bug may leave things unused
            inputs = [f"-I{folder}", f"-I{ENGINE}", ENGINE / "kernel_entry.cpp", *objects]
            compile_cpp(["-shared", *warnings, *macros, *inputs], library)
        return library

    def _object(self, source: Path) -> Path:
        headers = [
            path.read_text() for path in (*sorted(ENGINE.glob("*.h")), SOURCES / "device.h", SOURCES / "tensor_core.h")
        ]
        portable = ["-DPORTABLE"] if self.portable else []
        target = self.folder / f"{source.stem}-{_digest(source.read_text(), headers, portable)}.o"
        if not target.exists():
            compile_cpp(["-c", *portable, f"-I{SOURCES}", f"-I{ENGINE}", source], target)
        return target


def compile_cpp(arguments: Sequence[str | Path], target: Path) -> None:
    """Run the C++ compiler, and move its complete output into place."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"the emulator's tests need a C++17 compiler, {compiler!r} is not on the PATH: install g++ or set CXX"
        )
    partial = target.with_suffix(f".{os.getpid()}")
    command = [compiler, *FLAGS, *map(str, arguments), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or done.stderr:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    partial.replace(target)


def _with_headers(name: str) -> dict[str, str]:
    """Return a source file and all that it includes, by name, except the engine's own header."""
    text = (SOURCES / name).read_text()
    found = {name: text}
    for header in re.findall(r'#include "(\w+\.h)"', text):
        if (SOURCES / header).exists():
            found |= _with_headers(header)
    return found


def _mutated(text: str, mutation: Mutation) -> str:
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times, expected once")
    return text.replace(mutation.old, mutation.new)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr((FLAGS, os.environ.get("CXX"), *parts)).encode()).hexdigest()[:24]


def tensor_arguments(arguments: Sequence[Argument]) -> Iterator[In | Out]:
    """Yield every tensor among the arguments, those inside structs included."""
    for argument in arguments:
        for part in argument if isinstance(argument, tuple) else (argument,):
            if isinstance(part, In | Out):
                yield part

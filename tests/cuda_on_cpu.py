"""Builds CUDA sources for the CPU and runs their kernels there: slowly, without a GPU, in both orders of threads."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kernels import gpu

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas")
KERNEL = re.compile(r'extern\s+"C"\s+CUDA_KERNEL\s+(?:BOUNDS\s+)?void\s+(?:BOUNDS\s+)?(\w+)\s*\(')
DYNAMIC = re.compile(r"extern\s+CUDA_SHARED\s+((?:__align__\s*\(\d+\)\s*)?)([\w:<> ]+?)\s+(\w+)\s*\[\s*\]\s*;")
# What the compiler's preprocessor is told, to find kernels that macros declare.
MARKS = ("-D__global__=CUDA_KERNEL", "-D__shared__=CUDA_SHARED", "-D__launch_bounds__(...)=BOUNDS")


def missing() -> str:
    """Why nothing can be built here; "" if it can."""
    return "" if shutil.which("g++") else "there is no g++ here"


class Library:
    """A CUDA source, built for the CPU: `launch` is what `kernels.gpu.launch` is on a GPU."""

    def __init__(self, path: Path, functions: Sequence[str]):
        self.functions = tuple(functions)
        self._loaded = ctypes.CDLL(str(path))

    def launch(
        self, function: str, blocks: int | tuple[int, ...], threads: int | tuple[int, ...],
        arguments: Sequence[int | np.generic], descending: bool = False, shared: int = 0,
    ) -> None:
        """Run one kernel to its end; arguments are addresses (int) and numpy scalars.

        Raises ValueError if their number or sizes differ from the kernel's, if threads wait for each other, or if
        more dynamic shared memory is written than was asked for.
        """
        packed = gpu.by_value(arguments)
        pointers = (ctypes.c_void_p * len(packed))(*[value.ctypes.data for value in packed])
        sizes = (ctypes.c_int64 * len(packed))(*[value.itemsize for value in packed])
        run, error = getattr(self._loaded, f"run_{function}"), ctypes.create_string_buffer(200)
        run(
            *[(ctypes.c_uint * 3)(*given) for given in (_three(blocks), _three(threads))], ctypes.c_size_t(shared),
            ctypes.c_int(descending), pointers, sizes, ctypes.c_int64(len(packed)), error,
            ctypes.c_size_t(len(error)),
        )
        if error.value:
            raise ValueError(f"{function}: {error.value.decode()}")


def _three(given: int | tuple[int, ...]) -> tuple[int, ...]:
    return ((given,) if isinstance(given, int) else given) + (1,) * (2 if isinstance(given, int) else 3 - len(given))


def build(source: str | Path, folder: Path) -> Library:
    """A file of kernels/src (or the whole path of another), built in `folder`. Raises ValueError with g++'s words."""
    path = gpu.SOURCES / source
    include = f"-I{gpu.SOURCES}"
    text = _run("g++", "-E", "-P", "-x", "c++", *MARKS, include, str(path))
    functions, dynamic = KERNEL.findall(text), sorted(set(DYNAMIC.findall(text)))
    if not functions or len(dynamic) > 1:
        raise ValueError(
            f'{path.name}: expected kernels that are extern "C" __global__ void, and dynamic shared memory under one '
            f"name and type; got {functions} and {dynamic}"
        )
    lines = ['#include "cuda_on_cpu.h"', f'#include "{path}"']
    for _, kind, name in dynamic:
        lines.append(f"alignas(16) thread_local {kind} {name}[cuda_on_cpu::kDynamic / sizeof({kind})];")
    bytes_of = f"reinterpret_cast<unsigned char*>({dynamic[0][2]})" if dynamic else "nullptr"
    for name in functions:
        lines.append(
            f'extern "C" void run_{name}(const unsigned* b, const unsigned* t, size_t shared, int descending, '
            "void** a, const int64_t* sizes, int64_t count, char* error, size_t room) { "
            f"cuda_on_cpu::launch({name}, {{{{b[0], b[1], b[2]}}, {{t[0], t[1], t[2]}}, shared, {bytes_of}, "
            "descending != 0, a, sizes, count}, error, room); }"
        )
    wrapper, built = folder / f"{path.stem}_on_cpu.cpp", folder / f"{path.stem}_on_cpu.so"
    wrapper.write_text("\n".join(lines) + "\n")
    _run("g++", *FLAGS, f"-I{HERE}", include, "-o", str(built), str(wrapper))
    return Library(built, functions)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ValueError(f"{command[-1]} does not compile:\n{done.stderr}")
    return done.stdout

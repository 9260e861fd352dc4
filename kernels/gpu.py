"""What CuPy does for Trireme: CUDA kernels, device memory that other processes can map, and NCCL.

The only place that imports cupy, and only when it is called for. Running anything of this needs a GPU; compiling does
not. Tensors are torch's own, over memory of CuPy's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

SOURCES = Path(__file__).parent / "src"
# Products and sums are rounded each by itself, as on the CPU; a kernel that wants them fused calls fmaf.
OPTIONS = ("-fmad=false", f"-I{SOURCES}")
CUPYS_OWN = ("-ftz=true", "--device-as-default-execution-space")  # what CuPy adds when it compiles for a device
SMALL_SHARED = 48 << 10  # bytes of shared memory that a block may have without being asked for by name


def missing() -> str:
    """Why CuPy cannot be used here; "" if it can."""
    try:
        import cupy
    except ModuleNotFoundError:
        return "CuPy is not installed"
    except Exception as error:  # a CuPy for another CUDA, a broken installation, ...
        return " ".join(f"CuPy cannot be used ({type(error).__name__}: {error})".split())
    try:
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # no driver, one that is too old, no device
        return " ".join(f"CuPy finds no GPU that it can use (cupy.cuda.runtime: {error})".split())
    return ""


def serves(tensor: torch.Tensor) -> bool:
    """Whether the CUDA kernels take this tensor: float32, on a GPU, where CuPy can be used."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and not missing()


def nccl_missing() -> str:
    """Why NCCL cannot be used here; "" if it can."""
    if why := missing():
        return why
    try:
        from cupy.cuda import nccl

        return "" if nccl.available else "CuPy has no NCCL"
    except Exception as error:
        return " ".join(f"CuPy's NCCL cannot be used ({type(error).__name__}: {error})".split())


def bus(device: torch.device) -> str:
    """Where a GPU is in its host: its PCI address, or its number where CuPy is missing."""
    if missing():
        return str(device)
    import cupy

    return cupy.cuda.runtime.deviceGetPCIBusId(device.index)


# -- kernels ----------------------------------------------------------------------------------------------------------


def launch(
    source: str, function: str, blocks: int | tuple[int, ...], threads: int | tuple[int, ...],
    arguments: Sequence[int | np.generic], device: torch.device, shared: int = 0,
) -> None:
    """Queue a kernel on the stream that is current in torch; it is compiled when a device first needs it.

    source     a file of kernels/src
    function   an `extern "C" __global__` of it
    blocks     of the grid, one to three numbers, none of them 0
    threads    of a block, likewise
    arguments  addresses as int, all else as numpy scalars of the size that the kernel declares
    device     where the memory lies
    shared     bytes of dynamic shared memory a block
    """
    import cupy

    with cupy.cuda.Device(device.index), _queue(torch.cuda.current_stream(device)):
        kernel = _kernel(source, function, device.index)
        if shared > SMALL_SHARED:
            kernel.max_dynamic_shared_size_bytes = shared
        kernel(_dimensions(blocks), _dimensions(threads), tuple(by_value(arguments)), shared_mem=shared)


def by_value(arguments: Sequence[int | np.generic]) -> list[np.ndarray]:
    """A kernel's arguments as arrays of one element each, which is how CuPy takes whole structs too."""
    for argument in arguments:
        if not isinstance(argument, int | np.generic):
            raise TypeError(f"a kernel takes addresses (int) and numpy scalars; got {type(argument).__name__}")
    return [np.array(a, np.uint64) if isinstance(a, int) else np.array(a) for a in arguments]


def _dimensions(given: int | tuple[int, ...]) -> tuple[int, ...]:
    return (given,) if isinstance(given, int) else given


@cache
def _queue(stream: torch.cuda.Stream) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(stream)


@cache
def _kernel(source: str, function: str, device: int) -> Any:
    import cupy

    return cupy.RawModule(code=_code(SOURCES / source), options=OPTIONS, backend="nvrtc").get_function(function)


def _code(path: Path) -> str:
    """The source and a digest of the headers: CuPy keeps on disk what it compiled, and looks at the source only."""
    headers = b"".join(header.read_bytes() for header in sorted(SOURCES.glob("*.h")))
    return f"{path.read_text()}\n// headers: {hashlib.sha256(headers).hexdigest()}\n"


def compiler_missing() -> str:
    """Why kernels cannot be compiled here; "" if they can. A GPU is not needed."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except ModuleNotFoundError:
        return "CuPy is not installed"
    except Exception as error:
        words = str(error).splitlines() or [""]
        return f"NVRTC cannot be used ({type(error).__name__}: {words[0].strip()})"
    return ""


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs on one kind of GPU."""

    function: str
    registers: int  # a thread
    shared: int  # bytes of static shared memory a block
    stack: int  # bytes a thread: arrays that are indexed by variables, or registers that ran out; in slow memory
    spilled: int  # bytes that a thread stores and loads because registers ran out

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.spilled)


def compiled(source: str | Path, architecture: str) -> list[Compiled]:
    """Every kernel of a source as compiled for one kind of GPU, by name; nothing is run, and no GPU needed.

    source        a file of kernels/src, or the whole path of another
    architecture  such as "sm_90"

    Raises ValueError with the compiler's words if it does not compile, OSError if there is no such file.
    """
    from cupy._core import core
    from cupy.cuda import nvrtc

    path = SOURCES / source
    asked = (f"--gpu-architecture={architecture}", "--ptxas-options=-v")
    program = nvrtc.createProgram(_code(path), path.name, [], [])
    try:
        nvrtc.compileProgram(program, (*core.assemble_cupy_compiler_options(OPTIONS), *CUPYS_OWN, *asked))
        return _read_log(nvrtc.getProgramLog(program))
    except nvrtc.NVRTCError as error:
        words = nvrtc.getProgramLog(program).strip() or str(error)
        raise ValueError(f"{path.name} does not compile for {architecture}:\n{words}") from None
    finally:
        nvrtc.destroyProgram(program)


def _read_log(log: str) -> list[Compiled]:
    """From what the assembler tells of each kernel, and after it of functions that were not inlined into it."""
    found = []
    for entry in log.split("Compiling entry function '")[1:]:
        amounts = {
            unit: sum(map(int, re.findall(rf"(\d+) {unit}", entry)))
            for unit in ("registers", "bytes smem", "bytes stack frame", "bytes spill stores", "bytes spill loads")
        }
        registers, shared, stack, stores, loads = amounts.values()
        found.append(Compiled(entry.split("'")[0], registers, shared, stack, stores + loads))
    return sorted(found, key=lambda kernel: kernel.function)


# -- memory that other processes can map ------------------------------------------------------------------------------


def zeros(count: int, device: torch.device) -> torch.Tensor:
    """Zeroed float32 [count] in an allocation of its own, of which `handle` can be taken. Raises OSError without."""
    if why := missing():
        raise OSError(why)
    import cupy

    with cupy.cuda.Device(device.index):
        memory = cupy.cuda.Memory(4 * max(count, 1))  # not from a pool: a handle stands for a whole allocation
        tensor = _tensor(memory, count)
    tensor.zero_()
    torch.cuda.synchronize(device)
    return tensor


def handle(tensor: torch.Tensor) -> str:
    """What another process of this host needs to map a tensor that `zeros` made, as text."""
    import cupy

    with cupy.cuda.Device(tensor.device.index):
        return cupy.cuda.runtime.ipcGetMemHandle(tensor.data_ptr()).hex()


def mapped(handle: str, count: int, device: torch.device) -> torch.Tensor:
    """Another process's float32 [count], for kernels of this device, whichever device it lies on.

    Raises what CuPy raises where it cannot be mapped: devices without a way to each other, parts of a GPU (MIG),
    containers that hide their processes from each other.
    """
    import cupy

    with cupy.cuda.Device(device.index):
        address = cupy.cuda.runtime.ipcOpenMemHandle(bytes.fromhex(handle))
        # torch wants all tensors of a sum on one device, so the mapping is said to lie on the one that reads it
        return _tensor(cupy.cuda.UnownedMemory(address, 4 * max(count, 1), None, device.index), count)


def _tensor(memory: Any, count: int) -> torch.Tensor:
    import cupy

    return torch.from_dlpack(cupy.ndarray((count,), cupy.float32, cupy.cuda.MemoryPointer(memory, 0)))


# -- NCCL -------------------------------------------------------------------------------------------------------------


def nccl_name() -> list[int]:
    """A new name by which ranks find each other: made by one of them, told to all."""
    from cupy.cuda import nccl

    return list(nccl.get_unique_id())


class NcclLink:
    """The ranks of a job, linked by NCCL; everything is queued on the stream that is current in torch.

    size, rank  how many ranks, and which of them this is
    name        from `nccl_name`, the same on all
    device      this rank's own
    """

    def __init__(self, size: int, rank: int, name: Sequence[int], device: torch.device):
        import cupy
        from cupy.cuda import nccl

        self._nccl = nccl
        with cupy.cuda.Device(device.index):
            self._link = nccl.NcclCommunicator(size, tuple(name), rank)

    def sum_up(self, pieces: Sequence[tuple[int, torch.Tensor]], flag: torch.Tensor) -> None:
        """Sum float32 pieces over ranks, in place where their owner is; raise `flag` (int32 [1]) if any rank's is."""
        self._nccl.groupStart()
        for owner, piece in pieces:
            at = piece.data_ptr()
            self._link.reduce(at, at, len(piece), self._nccl.NCCL_FLOAT32, self._nccl.NCCL_SUM, owner, _stream())
        at = flag.data_ptr()
        self._link.allReduce(at, at, 1, self._nccl.NCCL_INT32, self._nccl.NCCL_MAX, _stream())
        self._nccl.groupEnd()

    def spread(self, pieces: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Copy every float32 piece from its owner to all ranks, in place."""
        self._nccl.groupStart()
        for owner, piece in pieces:
            at = piece.data_ptr()
            self._link.broadcast(at, at, len(piece), self._nccl.NCCL_FLOAT32, owner, _stream())
        self._nccl.groupEnd()

    def check(self) -> None:
        """Raise what went wrong in something queued earlier."""
        self._link.check_async_error()


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream

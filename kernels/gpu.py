"""What CuPy does for Trireme: device memory that other processes can map, and NCCL. The only place that imports cupy.

CuPy is imported when it is called for, and only GPU machines need it. Tensors are torch's own, over memory of CuPy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def missing() -> str:
    """Why CuPy cannot be used here; "" if it can."""
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except ModuleNotFoundError:
        return "CuPy is not installed"
    except Exception as error:  # a CuPy for another CUDA, a driver that is too old, ...
        return " ".join(f"CuPy cannot be used ({type(error).__name__}: {error})".split())
    return ""


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


# -- memory that other processes can map ------------------------------------------------------------------------------


def zeros(count: int, device: torch.device) -> torch.Tensor:
    """Zeroed float32 [count] in an allocation of its own, of which `handle` can be taken."""
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

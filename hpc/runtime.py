"""What a rank process is: its device, threads, stop signals and log."""

from __future__ import annotations

import ctypes
import importlib.metadata as metadata
import logging
import platform
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType

import torch

PREEMPTED = 75  # exit code (EX_TEMPFAIL): checkpointed, start the same command again to go on
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Device:
    """Where a rank computes, and in which precision.

    name        "cpu", "cuda", or "auto": a GPU if torch sees one
    precision   "float32", or "bfloat16": matrix products in bfloat16, weights and sums in float32
    local_rank  this rank's number on its host: GPUs are dealt round robin
    threads     threads of the CPU's matrix library

    Raises ValueError if "cuda" is asked for and torch sees no GPU.
    """

    def __init__(self, name: str, precision: str, local_rank: int, threads: int):
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and not torch.cuda.is_available():
            raise ValueError("device = 'cuda', but torch sees no GPU here; set device = 'cpu' or see 'trireme doctor'")
        self.torch = torch.device(f"cuda:{local_rank % torch.cuda.device_count()}" if name == "cuda" else name)
        if self.torch.type == "cuda":
            torch.cuda.set_device(self.torch)  # pinned buffers belong to the current device
        self.precision = precision
        self.threads = threads
        torch.set_num_threads(threads)
        keep_freed_memory()

    def place(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor on this device."""
        return value.to(self.torch, non_blocking=True)

    def autocast(self) -> AbstractContextManager:
        """The context in which losses are computed."""
        if self.precision == "bfloat16":
            return torch.autocast(self.torch.type, torch.bfloat16)
        return nullcontext()


def keep_freed_memory() -> None:
    """From now on large arrays that are freed stay with this process, and the next ones take their place.

    Otherwise glibc gives anything above 32 MiB back at once, and the kernel clears every page anew at the next step: of
    a language model's step, with its [words, vocabulary] logits, that was a fifth. Elsewhere than on glibc: nothing.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, 1 << 30)
        set_option(M_TRIM_THRESHOLD, (1 << 31) - 1)


class StopFlag:
    """Raised by SIGTERM, SIGUSR1, SIGUSR2 (preemption, time limit) or a first Ctrl-C: checkpoint, then exit."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> StopFlag:
        """Catch the signals from now on (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._caught)
        return self

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def open_log(rank: int, host: str, folder: Path | None) -> logging.Logger:
    """The rank's log: warnings (rank 0: everything) to stderr with the rank in front, everything to its own file."""
    log = logging.getLogger("trireme")
    log.handlers.clear()
    log.setLevel(logging.DEBUG)
    log.propagate = False
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(logging.WARNING if rank else logging.INFO)
    handlers: list[logging.Handler] = [screen]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / f"rank-{rank:05d}.log", encoding="utf-8"))
    said = f"%(asctime)s [rank {rank} on {host}] %(message)s"
    for handler in handlers:
        handler.setFormatter(logging.Formatter(said, "%H:%M:%S" if handler is screen else None))
        log.addHandler(handler)
    return log


def versions() -> dict[str, str]:
    """The versions of what a run was made with."""
    names = ("trireme", "torch", "numpy", "h5py", "mpi4py", "safetensors")
    found = {"python": platform.python_version(), "cpu": torch.backends.cpu.get_cpu_capability()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found

"""Whether the ranks that were started are the ranks that MPI sees, and whether they can share the splits."""

from __future__ import annotations

from collections.abc import Mapping

# What each launcher promises its ranks. SLURM_STEP_NUM_TASKS is set inside srun's steps only, not in a batch script.
PROMISES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


class LaunchError(RuntimeError):
    """The ranks that were started are not the ranks that MPI sees."""


def promised_size(environment: Mapping[str, str]) -> int | None:
    """How many ranks the launcher says it started, or None if no launcher is known to have started this process."""
    found = [int(environment[name]) for name in PROMISES if environment.get(name, "").isdigit()]
    return max(found) if found else None


def check_world_size(size: int, environment: Mapping[str, str], library: str) -> None:
    """Raise LaunchError if the launcher promised another number of ranks than MPI, of this library, reports.

    One MPI's mpiexec with another's library gives several worlds of one rank, each of which believes it is rank 0.
    """
    promised = promised_size(environment)
    if promised is not None and promised != size:
        raise LaunchError(
            f"the launcher started {promised} ranks, but MPI sees a world of {size}: mpiexec and the MPI library "
            f"({library}) do not match; use that library's own mpiexec ('trireme doctor' shows both)"
        )


def check_dealing(n_splits: int, ranks: int) -> None:
    """Raise ValueError if the splits cannot be dealt evenly to the ranks."""
    if n_splits % ranks:
        fitting = [k for k in range(1, n_splits + 1) if n_splits % k == 0]
        raise ValueError(
            f"splits = {n_splits} cannot be dealt evenly to {ranks} ranks; start one of {fitting} ranks, or set "
            f"'splits' to a multiple of {ranks} (what is learned depends on it)"
        )

"""Whether the MPI library says that it reads and writes GPU memory itself.

It is only asked, never tried: a library that cannot do it ends the process with a segmentation fault. What it does not
say in so many words counts as no. Imports neither MPI nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUERY = "MPIX_Query_cuda_support"  # of Open MPI, MPICH and MVAPICH: 1 if built with CUDA, and not switched off
OFF = ("0", "false", "no", "f", "n")

# Variables by which a user switches support off, whatever a library was built with.
SWITCHES = ("MPIR_CVAR_ENABLE_GPU", "OMPI_MCA_opal_cuda_support", "OMPI_MCA_mpi_cuda_support")

# Libraries that were built for GPUs, but crash on their memory unless one of these variables is 1.
NEEDS = {"CRAY MPICH": ("MPICH_GPU_SUPPORT_ENABLED",), "MVAPICH": ("MV2_USE_CUDA", "MVP_USE_CUDA")}


def cuda_aware(library: Any, version: str, environment: Mapping[str, str]) -> tuple[bool, str]:
    """Whether GPU buffers may be handed to MPI, and what that is read from.

    library      the loaded MPI library (`ctypes.CDLL`), after MPI was initialised
    version      its name and version
    environment  the process's variables

    >>> cuda_aware(object(), "MPICH 3.4", {})
    (False, 'there is no MPIX_Query_cuda_support to ask')
    """
    for name in SWITCHES:
        if environment.get(name, "").lower() in OFF:
            return False, f"{name} = {environment[name]}"
    for start, names in NEEDS.items():
        if version.upper().startswith(start) and not any(environment.get(name) == "1" for name in names):
            return False, f"{' or '.join(names)} is not 1"
    query = getattr(library, QUERY, None)
    if query is None:
        return False, f"there is no {QUERY} to ask"
    answer = int(query())
    return answer == 1, f"{QUERY}() = {answer}"

"""The CPU sides of the kernels: one small library, built by `pip install` where there is a C++ compiler.

Without it the torch and Python references serve: the same numbers, more slowly. `trireme doctor` says which it is.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch  # noqa: F401  first of all: it brings the OpenMP whose threads the library shares

POINTER, INT32, INT64, UINT32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32

# name -> argument types, result type
FUNCTIONS: dict[str, tuple[list[type], type | None]] = {
    "trireme_tree_sum": ([POINTER, POINTER, INT32, POINTER, INT64, INT32], None),
    "trireme_post": ([POINTER, UINT32], None),
    "trireme_wait": ([POINTER, UINT32, INT32, INT64], INT32),
    "trireme_wait_all": ([POINTER, INT32, UINT32, INT32, INT64], INT32),
    "trireme_meet_and_sum": ([POINTER], INT32),
    "trireme_transpose": ([POINTER, POINTER, INT64, INT64, INT64], None),
    "trireme_block": ([POINTER] * 4 + [INT64, POINTER], INT32),
    "trireme_departure": ([POINTER] * 3 + [INT64, ctypes.c_float], None),
    "trireme_onebit_quantize": ([POINTER] * 3 + [INT64, POINTER, INT64], INT32),
    "trireme_onebit_accumulate": ([POINTER, POINTER, INT64, INT64, POINTER, INT64, INT32, INT64], None),
    **{f"trireme_{rule}": ([POINTER] * 4 + [INT64, POINTER], INT32)
       for rule in (
           "sgd", "momentum", "nesterov", "adagrad", "adagrad_momentum", "momentum_adagrad", "adam", "adamax",
       )},
    **{f"trireme_sru_{name}": ([POINTER], None)
       for name in (f"{side}{kind}" for side in ("forward", "backward") for kind in ("", "_bfloat16", "_double"))},
}


@cache
def library() -> ctypes.CDLL | None:
    """The library with its functions typed, or None where it was not built. Calls release Python's lock."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return None
    try:
        loaded = ctypes.CDLL(str(found[0]))
    except OSError:  # built for another kind of machine
        return None
    for name, (arguments, result) in FUNCTIONS.items():
        function = getattr(loaded, name, None)
        if function is None:  # built from older sources
            return None
        function.argtypes, function.restype = arguments, result
    return loaded

"""Compiles the kernels' CUDA sources for several generations of GPUs, without having one: `make kernels`.

What it shows decides how fast a kernel can be: registers and shared memory (how many threads fit on a processor at a
time), and what spills into slow memory, which is an error here.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from kernels import gpu

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")  # Turing, Ampere, consumers' Ampere, Ada, Hopper
INSTALL = "install what compiles kernels, which needs no GPU: make setup, or pip install 'trireme[kernels]'"
EXAMPLES = """examples:
  python -m kernels.compile                                    every source, for every generation
  python -m kernels.compile update.cu --architectures sm_90    one source, for Hopper

exit status: 0 if all is well, 1 if something does not compile or spills, 2 if CuPy or NVRTC is missing
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m kernels.compile", description="Compile the CUDA sources; show registers, shared memory and spills.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("sources", metavar="SOURCE", nargs="*", help="files of kernels/src (default: every .cu)")
    parser.add_argument(
        "--architectures", metavar="LIST", default=",".join(ARCHITECTURES),
        help="kinds of GPU, separated by commas (default: %(default)s)",
    )  # fmt: skip
    return parser


def sources() -> list[str]:
    """The names of all CUDA sources."""
    return sorted(path.name for path in gpu.SOURCES.glob("*.cu"))


def main(words: list[str] | None = None) -> int:
    """Compile, print a table, and return the exit status."""
    asked = build_parser().parse_args(words)
    if why := gpu.compiler_missing():
        print(f"{why}; {INSTALL}", file=sys.stderr)
        return 2
    wrong = []
    for source in asked.sources or sources():
        table = Table("kernel", "GPU", title=f"{source} (all but registers in bytes)", title_justify="left")
        for name in ("registers", "shared", "stack", "spilled"):
            table.add_column(name, justify="right", no_wrap=True)
        for architecture in asked.architectures.split(","):
            try:
                found = gpu.compiled(source, architecture)
            except (ValueError, OSError) as error:
                wrong.append(str(error))
                continue
            for one in found:
                numbers = (one.registers, one.shared, one.stack, one.spilled)
                table.add_row(one.function, architecture, *map(str, numbers), style="red" if one.spills else None)
            wrong += [_sentence(source, one, architecture) for one in found if one.spills]
        if table.row_count:
            Console().print(table)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return int(bool(wrong))


def _sentence(source: str, found: gpu.Compiled, architecture: str) -> str:
    return (
        f"{source}: {found.function} spills on {architecture}: {found.stack} bytes of stack, {found.spilled} stored "
        "and loaded; use fewer values at a time, index arrays by constants, or name fewer threads in __launch_bounds__"
    )


if __name__ == "__main__":
    sys.exit(main())

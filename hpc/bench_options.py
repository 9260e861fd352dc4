"""What can be asked of `trireme bench`, and how it is read: sizes, rates, lists of numbers.

What is not understood is refused before anything is measured.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc.hosts import MOST

DATA_EXAMPLES = """examples:
  trireme bench data --gb 1
  trireme bench data --data data/demo/train --split-frames 100000 --repeat 30 --out results.jsonl
"""
TRAIN_EXAMPLES = """examples:
  trireme bench train
  trireme bench train --precision bfloat16
  trireme bench train --layers 7 --width 2048 --classes 9304 --batch 1024 --ranks 1,2,4 --steps 3
  trireme bench train --hosts 2 --link 1gbit --batch 4096
"""
ALLREDUCE_EXAMPLES = """examples:
  trireme bench allreduce --plot all-reduce.png        one host with 2 and 4 ranks, and two throttled hosts
  trireme bench allreduce --ranks 2 --sizes 1K,64M,256M --out results.jsonl
  trireme bench allreduce --ranks 2,4 --hosts 2 --link 1gbit --bucket 4M
"""
SRU_EXAMPLES = """examples:
  trireme bench sru                                    figure 1 of the SRU paper: some hours
  trireme bench sru --d 512 --length 128 --batch 32 --threads 1
  trireme bench sru --d 128,1024 --precision bfloat16 --out sru.jsonl --plot sru.png

The package `sru` is measured too where it is installed (pip install sru).
"""
ONEBIT_EXAMPLES = """examples:
  trireme bench onebit                                 a matrix, one long column, small ones: some minutes
  trireme bench onebit --sizes 2048x2048 --threads 1 --rounds 31 --out onebit.jsonl
  trireme bench onebit --sizes 128x1024 --mib 0        one set of arrays, which stays in the caches
"""
KIB = 1 << 10
SIZES = [KIB << shift for shift in range(0, 20, 2)]  # 1 KiB to 256 MiB
SLOWEST, QUICKEST = 1e5, 1e12  # bits a second that a link can be throttled to
UNITS = {"": 1, "K": KIB, "M": KIB << 10, "G": KIB << 20}


def data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = DATA_EXAMPLES
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--data", metavar="FOLDER", type=Path, help="a data set; without it one is generated")
    where.add_argument("--gb", type=positive(float), default=1.0, help="size of the generated data set (default 1)")
    parser.add_argument(
        "--split-frames", type=positive(int), default=262144, metavar="N", help="frames of a split (default 262144)"
    )
    parser.add_argument("--batch", type=positive(int), default=1024, help="frames of a batch (default 1024)")
    parser.add_argument("--repeat", type=positive(int), default=15, metavar="R", help="pairs to measure (default 15)")
    parser.add_argument(
        "--steps", type=positive(int), default=60, help="training steps for the share of waiting (default 60)"
    )


def train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = TRAIN_EXAMPLES
    number = positive(int)
    parser.add_argument("--layers", type=number, default=7, help="hidden layers (default 7)")
    parser.add_argument("--width", type=number, default=1024, help="units a hidden layer (default 1024)")
    parser.add_argument("--classes", type=number, default=1000, help="classes (default 1000)")
    parser.add_argument("--activation", choices=("sigmoid", "relu"), default="sigmoid")
    parser.add_argument("--batch", type=number, default=1024, help="frames of a step, over all splits (default 1024)")
    parser.add_argument(
        "--ranks", type=dividing, default=[1, 2], metavar="K,K", help="numbers of ranks (default 1,2)"
    )
    parser.add_argument(
        "--hosts", type=host, default=1, metavar="H", help="pretend hosts on this machine (default 1: itself)"
    )
    parser.add_argument("--link", type=link, default="1gbit", help="rate of every pretend host's link (default 1gbit)")
    parser.add_argument(
        "--bucket", type=size, default=UNITS["M"], metavar="B",
        help="bytes that several hosts exchange at a time (default 1M)",
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="(default cpu)")
    parser.add_argument("--threads", type=number, default=1, help="threads a rank (default 1)")
    parser.add_argument("--steps", type=number, default=4, help="steps a turn, after one that settles (default 4)")
    parser.add_argument("--repeat", type=number, default=15, metavar="R", help="turns of every side (default 15)")
    parser.add_argument("--bind", action="store_true", help="let mpiexec bind every rank to a core of its own")


def allreduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = ALLREDUCE_EXAMPLES
    parser.add_argument(
        "--sizes", type=sizes, default=SIZES, metavar="B,B", help="bytes; K, M: KiB, MiB (default 1K,4K,16K ... 256M)"
    )
    parser.add_argument("--ranks", type=numbers, metavar="K,K", help="numbers of ranks, over all hosts")
    parser.add_argument(
        "--hosts", type=hosts, metavar="H,H",
        help="numbers of pretend hosts on this machine (default, without --ranks: 2 and 4 ranks on one, 2 on two)",
    )
    parser.add_argument("--link", type=link, default="1gbit", help="rate of every pretend host's link (default 1gbit)")
    parser.add_argument("--rounds", type=positive(int), default=15, metavar="R", help="turns of all (default 15)")
    parser.add_argument(
        "--seconds", type=positive(float), default=60.0, metavar="S",
        help="begin no further round of a size after so long, but for the first three (default 60)",
    )
    parser.add_argument(
        "--bucket", type=size, default=UNITS["M"], metavar="B",
        help="bytes that several hosts exchange at a time (default 1M); within a host all at once",
    )
    parser.add_argument("--plot", metavar="FILE", type=picture, help="draw the result (PNG)")


def sru_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = SRU_EXAMPLES
    for name, default, what in (
        ("d", [128, 256, 512, 1024], "units of a layer, and width of its input"),
        ("length", [32, 128, 256], "steps of a sequence"), ("batch", [1, 16, 64], "sequences"),
        ("threads", [1, 2], "threads"),
    ):
        shown = ",".join(map(str, default))
        parser.add_argument(f"--{name}", type=numbers, default=default, metavar="N,N", help=f"{what} (default {shown})")
    parser.add_argument(
        "--precision", type=precisions, default=["float32", "bfloat16"], metavar="P,P",
        help="float32, or bfloat16 autocast (default float32,bfloat16)",
    )
    parser.add_argument("--rounds", type=positive(int), default=9, metavar="R", help="turns of all (default 9)")
    parser.add_argument(
        "--seconds", type=positive(float), default=20.0, metavar="S",
        help="begin no further round of a size and pass after so long, but for the first three (default 20)",
    )
    parser.add_argument("--plot", metavar="FILE", type=picture, help="draw forward with backward (PNG)")


def onebit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = ONEBIT_EXAMPLES
    parser.add_argument(
        "--sizes", type=matrices, default=[(2048, 2048), (1, 1 << 21), (1 << 15, 40)], metavar="CxW,CxW",
        help="columns and floats of each (default 2048x2048,1x2097152,32768x40)",
    )
    parser.add_argument("--splits", type=positive(int), default=4, metavar="N", help="rows of a fresh sum (default 4)")
    parser.add_argument("--threads", type=numbers, default=[1, 2], metavar="N,N", help="threads (default 1,2)")
    parser.add_argument("--rounds", type=positive(int), default=15, metavar="R", help="turns of all (default 15)")
    parser.add_argument(
        "--mib", type=whole, metavar="M",
        help="MiB of arrays that calls take turns with (default: four times the last cache); 0: one set of arrays",
    )


def matrices(text: str) -> list[tuple[int, int]]:
    """Sizes such as "2048x2048"."""
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word) for word in text.lower().split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of sizes such as 2048x2048,32768x40")
    return [(int(one[1]), int(one[2])) for one in found if one]


def whole(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 on")
    return int(text)


def precisions(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [word for word in found if word not in ("float32", "bfloat16")]:
        raise argparse.ArgumentTypeError(f"'{unknown[0]}' is not a precision; choose from float32, bfloat16")
    return found


def positive(kind: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.inf
        if value == math.inf:
            raise argparse.ArgumentTypeError(f"'{text}' is not a {'whole ' if kind is int else ''}number above 0")
        if not value > 0:
            raise argparse.ArgumentTypeError(f"'{text}' is not above 0")
        return value

    return parse


def numbers(text: str) -> list[int]:
    try:
        found = sorted({int(word) for word in text.split(",")})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers such as 1,2,4") from error
    if found[0] < 1:
        raise argparse.ArgumentTypeError(f"'{text}': every number must be above 0")
    return found


def hosts(text: str) -> list[int]:
    found = numbers(text)
    if found[-1] > MOST:
        raise argparse.ArgumentTypeError(f"'{text}': this machine can pretend to be 1 to {MOST} hosts")
    return found


def host(text: str) -> int:
    found = hosts(text)
    if len(found) > 1:
        raise argparse.ArgumentTypeError(f"'{text}': one number of hosts at a time")
    return found[0]


def bits_of(text: str) -> float:
    """The bits a second of a rate in tc's words; 0 for other words."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)bit", text.lower())
    return float(found[1]) * 1000.0 ** " kmgt".index(found[2] or " ") if found else 0.0


def link(text: str) -> str:
    """A rate in tc's words, of bits a second."""
    if not SLOWEST <= bits_of(text) <= QUICKEST:
        raise argparse.ArgumentTypeError(f"'{text}' is not a rate such as 100mbit or 1gbit, from 100kbit to 1tbit")
    return text


def writable(text: str) -> Path:
    """A file to write: found out now, not after all was measured."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}': there is no folder '{path.parent}'; make it first")
    return path


def picture(text: str) -> Path:
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"'{text}' is not the name of a PNG file; end it in .png")
    return writable(text)


def dividing(text: str) -> list[int]:
    found = numbers(text)
    if any(found[-1] % k for k in found):
        raise argparse.ArgumentTypeError(f"'{text}': every number must be above 0 and divide the largest")
    return found


def size(text: str) -> int:
    """Bytes: "4096", "4K", "1M"; whole float32 values."""
    word = text.strip().upper().removesuffix("IB")
    digits, unit = (word[:-1], word[-1]) if word[-1:].isalpha() else (word, "")
    if not digits.isdigit() or unit not in UNITS or not int(digits) or int(digits) * UNITS[unit] % 4:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 4K or 256M, a multiple of 4 bytes")
    return int(digits) * UNITS[unit]


def sizes(text: str) -> list[int]:
    return sorted({size(word) for word in text.split(",")})

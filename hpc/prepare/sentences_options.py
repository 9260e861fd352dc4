"""The command line of `trireme prepare sentences`: its options, and the table at the end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hpc.prepare.sentence_lines import Part

ABOUT = """Write data sets of labelled sentences to OUT/train, OUT/validation and OUT/test, or with --folds to
OUT/fold-00/train ... for cross-validation ('trireme folds' trains on them all).

FILE has a line a sentence, its first word being the label: "label sentence", as Kim's (2014) sets have. Words are what
white space separates. What cannot be trained on is an error that names file and line."""

EXAMPLES = """examples:

  ten-fold cross-validation, in each fold a tenth of the training part for validation:
    trireme prepare sentences rt-polarity.all data/mr --folds 10

  files of its own for each:
    trireme prepare sentences stsa.fine.train data/sst --validation stsa.fine.dev --test stsa.fine.test

  a tenth for validation (of what is not for testing), a fifth for testing; rare words are unknown:
    trireme prepare sentences custrev.all data/cr --test 0.2 --min-count 2

  with word vectors, every word that has one is known, also where it occurs in test sentences alone:
    trireme prepare sentences rt-polarity.all data/mr --folds 10 --vectors glove.6B.300d.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = ABOUT, EXAMPLES
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="sentences, 'label sentence' a line")
    add("out", type=Path, metavar="OUT", help="the folder to write data sets to")
    add("--folds", type=int, default=0, metavar="K",
        help="cross-validation: another Kth of FILE is the test set each time")
    add("--validation", default="0.1", metavar="F|FILE", help="this fraction, or this file (default 0.1; 0: none)")
    add("--test", default="0", metavar="F|FILE", help="this fraction, or this file (default 0: none)")
    add("--encoding", default="auto", metavar="NAME",
        help="of the files, e.g. utf-8, latin-1 (default auto: UTF-8, or latin-1 for a file that is not)")
    add("--min-count", type=int, default=1, metavar="N",
        help="words that the training part has less often are unknown (default 1)")
    add("--lower", action="store_true", help="put words into lower case")
    add("--vectors", type=Path, metavar="FILE",
        help="word vectors (GloVe or word2vec text): words that have one are known")
    add("--seed", type=int, default=0, metavar="N", help="decides the order and what is held out (default 0)")
    add("--shards", type=int, default=1, metavar="N", help="pairs of shards that the largest set has (default 1)")
    add("--overwrite", action="store_true", help="remove what another preparation left in the sets' folders")


def part_of(text: str) -> Part:
    """A fraction if it reads as a number, else a file (./0.1 is one). Raises ValueError if that does not exist."""
    try:
        return float(text)
    except ValueError:
        if not Path(text).is_file():
            raise ValueError(f"'{text}' is neither a fraction, e.g. 0.1, nor a file") from None
        return Path(text)


def plain(part: Part) -> float | str:
    """A part as it is kept in JSON."""
    return str(part) if isinstance(part, Path) else part


def show(report: dict[str, Any], out: Path) -> None:
    """Print what was prepared."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table(box=None, pad_edge=False)
    for heading in ("set", "sentences", "words", "longest", "vocabulary", "unknown", "classes", "majority"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("set", "majority") else "right")
    for row in report["sets"]:
        name, share = row["majority"]
        table.add_row(
            row["set"], f"{row['sentences']:,}", f"{row['words']:,}", str(row["longest"]), f"{row['vocabulary']:,}",
            f"{row['unknown']:.2%}", str(row["classes"]), f"{share:.1%} {name}",
        )
    console.print(table)
    say = [f"note: {note}" for note in report["notes"]]
    if report["resumed"]:
        say.append(f"{report['resumed']} shards were finished before and were kept")
    if report["state"] == "finished":
        say.append(f"'{out}' was finished before with the same options and data; nothing was done")
    else:
        say.append(f"written to '{out}' in {report['seconds']:.1f} s")
    for line in say:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

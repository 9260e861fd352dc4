"""The command line of `trireme prepare sentences`: its options, and the table at the end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hpc.prepare.options import part_of, show_prepared
from hpc.prepare.sentence_plan import HELD

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

  another test set for a model that was trained on data/cr/train:
    trireme prepare sentences reviews.txt data/cr --set reviews --vocabulary-from data/cr/train
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = ABOUT, EXAMPLES
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="sentences, 'label sentence' a line")
    add("out", type=Path, metavar="OUT", help="the folder to write data sets to")
    add("--folds", type=int, default=0, metavar="K",
        help="cross-validation: another Kth of FILE is the test set each time")
    add("--validation", metavar="F|FILE",
        help=f"this fraction, or this file (default {HELD}; 0: none; what reads as a number is one: ./0.1 is a file)")
    add("--test", metavar="F|FILE", help="this fraction, or this file (default 0: none)")
    add("--set", metavar="NAME", help="write all of FILE to OUT/NAME and hold nothing out, e.g. another test set")
    add("--vocabulary-from", type=Path, metavar="DATASET", help="another data set's words, numbers, case and classes")
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


def choices_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the options choose, as `Plan` takes it."""
    judged, tested = (None if given is None else part_of(given) for given in (args.validation, args.test))
    names = ("folds", "vocabulary_from", "encoding", "min_count", "lower", "vectors", "seed", "shards")
    return {"validation": judged, "test": tested, "into": args.set} | {name: getattr(args, name) for name in names}


def show(report: dict[str, Any], out: Path) -> None:
    """Print what was prepared."""
    rows = [(
        row["set"], f"{row['sentences']:,}", f"{row['words']:,}", str(row["longest"]), f"{row['vocabulary']:,}",
        f"{row['unknown']:.2%}", str(row["classes"]), f"{row['majority'][1]:.1%} {row['majority'][0]}",
    ) for row in report["sets"]]
    columns = ("set", "sentences", "words", "longest", "vocabulary", "unknown", "classes", "majority")
    show_prepared(report, out, columns, rows)

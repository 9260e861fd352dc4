"""The command line of `trireme prepare text`: its options, what they choose, and the table at the end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hpc.prepare.options import check_set, part_of, show_prepared
from hpc.prepare.vocabulary import Choice

ABOUT = """Write running text as data sets for language models to OUT/train, OUT/validation and OUT/test: words as
numbers, in the order of the text.

Words are what stands between spaces; every line is a sentence, after which a word <eos> stands. Words that are not in
the vocabulary become <unk>. Text with punctuation at its words, or in capitals, is split first (see the examples) or
read with --lower. Files may be compressed (.gz); a folder stands for all files in it.

An interrupted preparation is continued by the same command. Several ranks share the work:
mpiexec -n 4 python -m mpi4py -m hpc prepare text ..."""

EXAMPLES = """examples:

  Penn Treebank, as it is usually distributed:
    trireme prepare text ptb.train.txt data/ptb --validation ptb.valid.txt --test ptb.test.txt

  the King James Bible from two Debian packages (no need to install them), 790,000 words and their punctuation:
    apt-get download bible-kjv bible-kjv-text
    for package in bible-kjv*.deb; do dpkg -x $package kjv; done
    kjv/usr/bin/bible -p kjv/usr/lib -f 'Gen1:1-Rev22:21' | sed 's/[^ ]* //; s/[.,:;?!()]/ & /g' > kjv.txt
    trireme prepare text kjv.txt data/kjv --lower --words 10000 --validation 0.05 --test 0.05

  another test set with the same numbers:
    trireme prepare text letters/ data/kjv --set letters --vocabulary-from data/kjv/train"""

HELD = 0.05  # of the lines, for validation, where nothing is said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, the description and the examples to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = ABOUT, EXAMPLES
    add = parser.add_argument
    add("files", nargs="+", metavar="FILES", help="text files or folders, in the order they are to be read")
    add("out", metavar="OUT", help="the folder to write data sets to, right after FILES")
    add("--encoding", default="utf-8", metavar="NAME", help="of all files (default utf-8)")
    add("--lower", action="store_true", help="read words in lower case")
    add("--sentence-end", metavar="WORD", help="what stands after every line (default <eos>); none: nothing")
    add("--unknown", metavar="WORD", help="what stands for words outside the vocabulary (default <unk>)")
    add("--shards", type=int, default=8, metavar="N", help="files a set has at most (default 8)")
    add("--overwrite", action="store_true", help="remove what another preparation left in the sets' folders")

    add = parser.add_argument_group(
        "what is held out, or which set is written",
        "A fraction of the lines is held out in whole stretches, spread evenly: the text is cut into 20 even parts\n"
        "(fewer if it is short); the last lines of every part are held out, validation's first, then the test's.",
    ).add_argument
    add("--validation", action="append", metavar="FILE|F",
        help="a file or folder, repeatable, or a fraction of FILES' lines (default 0.05; 0: none; ./0.1: a file)")
    add("--test", action="append", metavar="FILE|F", help="the same for OUT/test (default: none)")
    add("--set", metavar="NAME", help="write all of FILES to OUT/NAME and hold nothing out, e.g. another test set")

    add = parser.add_argument_group(
        "the vocabulary (default: every word of the training text)",
        "Only the training part is counted; numbers are given by falling count, then by the words' letters.",
    ).add_argument
    add("--words", type=int, metavar="N", help="the most frequent words, N in all with <unk> and <eos>")
    add("--min-count", type=int, metavar="N", help="words that occur N times or more")
    add("--vocabulary", metavar="FILE", help="a word a line, numbered in this order; <unk> and <eos> are added")
    add("--vocabulary-from", metavar="DATASET", help="another data set's words, numbers and case")


def checked(args: argparse.Namespace) -> dict[str, Any]:
    """All options by name. Call on rank 0: one complaint, not one a rank. Raises ValueError for what contradicts."""
    if args.set is not None:
        if args.validation is not None or args.test is not None:
            raise ValueError("--set writes one set and holds nothing out; leave out --set, or --validation and --test")
        check_set(args.set)
    if args.vocabulary_from is not None and (args.sentence_end is not None or args.unknown is not None):
        raise ValueError("--vocabulary-from brings its own --sentence-end and --unknown; leave them out")
    files_of(args)
    choice_of(args)
    return vars(args)


def files_of(args: argparse.Namespace) -> tuple[dict[str, list[Path]], dict[str, float]]:
    """The files of every set, and what fraction of the first set's lines is held out for others.

    Raises ValueError for a fraction beside files.
    """
    files = {args.set or "train": [Path(file) for file in args.files]}
    if args.set is not None:
        return files, {}
    held = {}
    for name, given in (("validation", args.validation or [str(HELD)]), ("test", args.test or ["0"])):
        parts = [part_of(part) for part in given]
        paths = [part for part in parts if isinstance(part, Path)]
        if len(paths) == len(parts):
            files[name] = paths
        elif isinstance(parts[0], float) and len(parts) == 1:
            held[name] = parts[0]
        else:
            raise ValueError(f"--{name} {' '.join(given)}: expected one fraction, or files (./0.1 is one)")
    return files, held


def choice_of(args: argparse.Namespace) -> Choice:
    """How the vocabulary is chosen. Raises ValueError if options contradict each other."""
    end = args.sentence_end or "<eos>"
    return Choice(
        words=args.words, least=args.min_count, file=_path(args.vocabulary), dataset=_path(args.vocabulary_from),
        unknown=args.unknown or "<unk>", sentence_end=None if end == "none" else end,
    )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def show(report: dict[str, Any], out: Path) -> None:
    """Print what was prepared: a table of the sets, and what is worth knowing."""
    rows = [(
        row["set"], str(row["shards"]), f"{row['sentences']:,}", f"{row['words']:,}", f"{row['vocabulary']:,}",
        f"{row['unknown']:.2%}",
    ) for row in report["sets"]]
    show_prepared(report, out, ("set", "shards", "sentences", "words", "vocabulary", "unknown"), rows)

"""The command line of `trireme prepare frames`: its options, what they choose, and the table at the end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from collectives.comm import Comm
from hpc.everywhere import made_everywhere
from hpc.prepare.audio import find_audio
from hpc.prepare.holdout import Holdout
from hpc.prepare.kaldi import KaldiSource
from hpc.prepare.labels import read_keys, read_names
from hpc.prepare.options import show_prepared
from hpc.prepare.pairs import Source
from hpc.prepare.sphinx import SphinxSource

ABOUT = """Write data sets of frames with labels to OUT/train and OUT/validation, from sound files (the class of a
folder labels every frame), from Kaldi (features by scp, alignments), or from Sphinx (.mfc files, label lines).

Everything is checked on the way; what cannot be trained on is an error that names the utterance. An interrupted
preparation is continued by the same command. Several ranks share the work:
mpiexec -n 4 python -m mpi4py -m hpc prepare frames ..."""

EXAMPLES = """examples:

  which language is it? one folder a class, a tenth of the files held out:
    trireme prepare frames --from audio en=recordings/english fr=recordings/french --mels 40 data/languages
    trireme prepare frames --from audio recordings --exclude '*/silence/*' --sample-rate 8000 data/languages

  Kaldi: alignments as classes first, then whole speakers (here the key up to the first '-') held out:
    ali-to-pdf exp/tri3/final.mdl ark:"gunzip -c exp/tri3_ali/ali.*.gz|" ark,scp:pdf.ark,pdf.scp
    trireme prepare frames --from kaldi --feats data/train/feats.scp --alignments pdf.scp \\
        --group '^([^-]+)-' --validation 0.1 data/tri3

  Sphinx: 13 MFCC with two orders of deltas, nine speakers held out:
    trireme prepare frames --from sphinx --mfc an4/feat --labels an4/train.ali --names an4/states.txt --deltas 2 \\
        --group '/([^/]+)/' --validation-groups 9 data/an4

  an official test set beside them, normalised and numbered like the training set:
    trireme prepare frames --from sphinx --mfc an4/feat --labels an4/test.ali --deltas 2 \\
        --set test --stats-from data/an4/train data/an4"""

OF_SOURCE = {
    "audio": ("exclude", "sample_rate", "mels"),
    "kaldi": ("feats", "alignments", "classes", "names"),
    "sphinx": ("mfc", "labels", "fileids", "width", "drop_last_frame", "names"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, the description and the examples to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = ABOUT, EXAMPLES
    add = parser.add_argument
    add("--from", dest="origin", nargs="+", required=True, metavar=("audio|kaldi|sphinx", "NAME=DIR"),
        help="the source; audio is followed by NAME=DIR once a class, or by one DIR with a sub-folder a class")
    add("out", nargs="?", metavar="OUT", help="the folder to write data sets to")
    add("--shards", type=int, default=8, metavar="N", help="pairs of shards a set has at most (default 8)")
    add("--deltas", type=int, default=0, metavar="N", help="orders of deltas to add: 0, 1 or 2 (default 0)")
    add("--frame-shift", type=float, default=10.0, metavar="MS", help="milliseconds from frame to frame (default 10)")
    add("--seed", type=int, default=0, metavar="N", help="decides the order and what is held out (default 0)")
    add("--overwrite", action="store_true", help="remove what another preparation left in the sets' folders")

    add = parser.add_argument_group("what is held out, or which set is written").add_argument
    add("--validation", type=float, metavar="F", help="this fraction of utterances or groups (default 0.1; 0: none)")
    add("--group", metavar="REGEX", help="hold out whole groups: the first capture in the key, e.g. the speaker")
    add("--validation-groups", type=int, metavar="N", help="exactly this many groups")
    add("--validation-list", metavar="FILE", help="exactly these utterances, a key a line")
    add("--set", metavar="NAME", help="write everything to OUT/NAME and hold nothing out, e.g. an official test set")
    add("--stats-from", metavar="DATASET", help="take mean, standard deviation and class names from this data set")

    add = parser.add_argument_group("--from audio (.wav, .flac, .ogg)").add_argument
    add("--exclude", action="append", metavar="GLOB", help="leave out CLASS/relative/path.wav that match; repeatable")
    add("--sample-rate", type=int, metavar="HZ", help="resample to this (default: the files' own, which must agree)")
    add("--mels", type=int, metavar="N", help="mel filters (default 40)")

    add = parser.add_argument_group("--from kaldi").add_argument
    add("--feats", metavar="SCP", help="features, e.g. feats.scp")
    add("--alignments", nargs="+", metavar="FILE", help="classes a frame: scp, binary ark, or text 'key 3 3 4 ...'")
    add("--classes", type=int, metavar="N", help="how many classes (default: as many as the labels show)")
    add("--names", metavar="FILE", help="class names, a line each (kaldi and sphinx)")

    add = parser.add_argument_group("--from sphinx").add_argument
    add("--mfc", metavar="DIR", help="the folder that holds KEY.mfc")
    add("--labels", metavar="FILE", help="lines 'key 3 3 4 ...'")
    add("--fileids", metavar="FILE", help="take these keys alone, one a line")
    add("--width", type=int, metavar="N", help="values a frame (default 13)")
    add("--drop-last-frame", action="store_true", default=None,
        help="drop the last feature frame where labels are one frame short, and count it")


def checked(args: argparse.Namespace) -> dict[str, Any]:
    """All options by name, with OUT found. Call on rank 0: one complaint, not one a rank.

    Raises ValueError for what is missing, contradicts or belongs to another source; OSError if a list cannot be read.
    """
    args.out = str(out_of(args))
    holdout_of(args)
    origin = args.origin[0]
    if origin not in OF_SOURCE:
        raise ValueError(f"--from {origin}: expected one of {sorted(OF_SOURCE)}")
    others = {option for options in OF_SOURCE.values() for option in options} - set(OF_SOURCE[origin])
    wrong = sorted("--" + option.replace("_", "-") for option in others if getattr(args, option) is not None)
    if wrong or (origin != "audio" and len(args.origin) > 1):
        raise ValueError(f"--from {origin} does not take {wrong or args.origin[1:]}; --help lists what it takes")
    needed = {"audio": (), "kaldi": ("feats", "alignments"), "sphinx": ("mfc", "labels")}[origin]
    missing = [f"--{option}" for option in needed if getattr(args, option) is None]
    if missing:
        raise ValueError(f"--from {origin} needs {' and '.join(missing)}; see --help for an example")
    return vars(args)


def out_of(args: argparse.Namespace) -> Path:
    """The folder OUT, also where an option that takes several values stands just before it and has swallowed it.

    Raises ValueError if there is none.
    """
    if args.out is None:
        for swallowed, least in ((args.origin, 1), (args.alignments, 1)):
            if swallowed and len(swallowed) > least and "=" not in swallowed[-1]:
                args.out = swallowed.pop()
                break
    if args.out is None:
        raise ValueError("OUT, the folder to write to, is missing; add it at the end")
    return Path(args.out)


def holdout_of(args: argparse.Namespace) -> Holdout:
    """What the options hold out. Raises ValueError if they contradict each other, OSError if a list cannot be read."""
    given = (args.validation, args.group, args.validation_groups, args.validation_list)
    if args.set is not None and any(value is not None for value in given):
        raise ValueError("--set writes one set and holds nothing out; leave out --set, or --validation and --group")
    keys = None if args.validation_list is None else tuple(read_keys(Path(args.validation_list)))
    fraction = args.validation
    if fraction is None and args.validation_groups is None and keys is None:
        fraction = 0.1
    return Holdout(fraction=fraction, pattern=args.group, groups=args.validation_groups, keys=keys)


def source_of(args: argparse.Namespace, comm: Comm, names: list[str] | None) -> Source:
    """The source that options which are `checked` describe (collective).

    names  class names of the data set given with --stats-from, or None

    Raises what the source raises, on every rank.
    """
    if args.origin[0] == "audio":
        return find_audio(
            comm, args.origin[1:], exclude=args.exclude or (), sample_rate=args.sample_rate,
            mels=40 if args.mels is None else args.mels, frame_shift_ms=args.frame_shift, names=names,
        )
    return made_everywhere(comm, lambda: _listed(args))


def _listed(args: argparse.Namespace) -> Source:
    """A source that every rank reads the lists of."""
    names = None if args.names is None else read_names(Path(args.names))
    if args.origin[0] == "sphinx":
        return SphinxSource(
            Path(args.mfc), Path(args.labels), fileids=None if args.fileids is None else Path(args.fileids),
            width=13 if args.width is None else args.width, names=names, drop_last_frame=bool(args.drop_last_frame),
            frame_shift_ms=args.frame_shift,
        )
    if args.classes is not None:
        if args.classes < 1 or (names is not None and len(names) != args.classes):
            raise ValueError(f"--classes {args.classes} does not fit the {len(names or [])} of --names; leave it out")
        names = names or [str(label) for label in range(args.classes)]
    return KaldiSource(
        Path(args.feats), [Path(path) for path in args.alignments], names=names, frame_shift_ms=args.frame_shift
    )


def show(report: dict[str, Any], out: Path) -> None:
    """Print what was prepared: a table of the sets, and what was left out."""
    columns = ("set", "shards", "utterances", "frames", "hours", "values", "classes", "majority")
    rows = [(
        row["set"], str(row["shards"]), f"{row['utterances']:,}", f"{row['frames']:,}", f"{row['hours']:.2f}",
        str(row["width"]), f"{row['present']}/{row['classes']}", f"{row['majority'][1]:.1%} {row['majority'][0]}",
    ) for row in report["sets"]]
    show_prepared(report, out, columns, rows)

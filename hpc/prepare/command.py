"""`trireme prepare KIND`: one converter a kind of data."""

from __future__ import annotations

import argparse

from collectives.comm import Comm
from hpc.prepare import frames, sentences, text

KINDS = {
    "frames": (frames, "make data sets of frames with a label each, from audio, Kaldi or Sphinx files"),
    "sentences": (sentences, "make data sets of sentences with a label each, also for cross-validation"),
    "text": (text, "make data sets of running text for language models, from any text files"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, (module, about) in KINDS.items():
        kind = kinds.add_parser(
            name, help=about, description=f"{about[0].upper()}{about[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(kind)


def run(arguments: argparse.Namespace, comm: Comm) -> int:
    """Make the data sets (collective)."""
    return KINDS[arguments.kind][0].run(arguments, comm)

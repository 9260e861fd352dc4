"""Kathleen's ARCTIC prompts as frames with 120 monophone states: a second data set for `bmuf.py accuracy`.

    python benchmarks/blocks/kathleen.py KATHLEEN data/kathleen

KATHLEEN holds flac/ and align/all.ali, align/states.txt. 40 log-mel energies every 10 ms, as Kaldi's; of the prompts,
in the order of a permutation, 100 are the test set, 100 the validation set, and the rest is trained on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import kaldiio
import numpy as np
import soundfile

from hpc.prepare.audio import LogMel

MELS, SHIFT_MS, HELD_OUT = 40, 10.0, 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    lines = (arguments.source / "align" / "all.ali").read_text().splitlines()
    labels = {line.split(maxsplit=1)[0]: line for line in lines}
    keys = np.random.default_rng(1).permutation(sorted(labels)).tolist()
    test, validation = keys[:HELD_OUT], keys[HELD_OUT : 2 * HELD_OUT]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, own in (("test", test), ("train", keys[HELD_OUT:])):
            write_features(arguments.source / "flac", own, work, name)
            (work / f"{name}.ali").write_text("".join(f"{labels[key]}\n" for key in own))
        (work / "validation").write_text("".join(f"{key}\n" for key in validation))
        names = work / "names"
        states = (arguments.source / "align" / "states.txt").read_text().splitlines()
        names.write_text("".join(f"{line.split()[-1]}\n" for line in states))
        prepare(work, "train", names, "--validation-list", work / "validation", arguments.out)
        prepare(work, "test", names, "--set", "test", "--stats-from", arguments.out / "train", arguments.out)
    return 0


def write_features(sounds: Path, keys: list[str], work: Path, name: str) -> None:
    """An archive of log-mel energies, with its scp."""
    make = None
    with kaldiio.WriteHelper(f"ark,scp:{work / name}.ark,{work / name}.scp") as archive:
        for key in keys:
            samples, rate = soundfile.read(sounds / f"{key}.flac", dtype="float32")
            make = make or LogMel(rate, MELS, SHIFT_MS)
            archive(key, make(samples))


def prepare(work: Path, name: str, names: Path, *more: object) -> None:
    words = [
        "prepare", "frames", "--from", "kaldi", "--feats", work / f"{name}.scp", "--alignments", work / f"{name}.ali",
        "--classes", len(names.read_text().splitlines()), "--names", names, *more,
    ]
    subprocess.run([sys.executable, "-m", "mpi4py", "-m", "hpc", *map(str, words)], check=True)


if __name__ == "__main__":
    sys.exit(main())

"""Utterances from Kaldi: features by an scp file, one label a frame from alignments.

Alignments must be in classes, not transition ids:

    ali-to-pdf exp/tri3/final.mdl ark:"gunzip -c exp/tri3_ali/ali.*.gz|" ark,scp:pdf.ark,pdf.scp
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpc.files import sha256_of
from hpc.prepare.arks import read_entry, read_scp, stamps
from hpc.prepare.labels import LabelFiles, check_lengths, some
from hpc.shards import DataError

ADVICE = (
    "use the features that the alignment was made from (a chain model with frame subsampling 3 gives a label only "
    "every third frame)"
)


class KaldiSource:
    """Utterances that have both features and an alignment; the others are left out and counted in `notes`.

    feats           an scp file of feature matrices [T, D]
    alignments      label files as in `labels.LabelFiles`
    names           class names, or None if they are to be counted from the labels
    frame_shift_ms  milliseconds from one frame to the next

    Raises DataError for a repeated key or an entry that is not numbers, OSError if a file cannot be read.
    """

    def __init__(
        self, feats: Path, alignments: Sequence[Path], *, names: list[str] | None = None, frame_shift_ms: float = 10.0
    ):
        self._list = feats
        self._feats = read_scp(feats)
        self._labels = LabelFiles(alignments)
        self.names = names
        self.tally: dict[str, int] = {}
        self.description: dict[str, Any] = {"source": "kaldi", "frames_per_second": 1000 / frame_shift_ms}
        self.options: dict[str, Any] = {
            "source": "kaldi", "feats": str(feats), "alignments": [str(p) for p in alignments], "names": names,
            "frame_shift_ms": frame_shift_ms,
        }
        unlabelled = [key for key in self._feats if key not in self._labels]
        featureless = [key for key in self._labels if key not in self._feats]
        self.notes = []
        if unlabelled:
            self.notes.append(
                f"{len(unlabelled)} of {len(self._feats)} utterances have no alignment and were left out: "
                f"{some(unlabelled)}"
            )
        if featureless:
            self.notes.append(f"{len(featureless)} alignments have no features and were left out: {some(featureless)}")

    def keys(self) -> list[str]:
        return [key for key in self._feats if key in self._labels]

    def digest(self) -> list[str]:
        keys = self.keys()
        return [sha256_of(self._list), *stamps({key: self._feats[key] for key in keys}), *self._labels.digest(keys)]

    def load(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        features = read_entry(key, self._feats[key])
        if features.ndim != 2:
            raise DataError(f"utterance '{key}': its features have shape {features.shape}, expected [frames, values]")
        labels = self._labels.load(key)
        check_lengths(key, len(features), len(labels), ADVICE)
        return features.astype(np.float32), labels

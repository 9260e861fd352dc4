"""One pair of shards, features and labels of the same utterances: loaded, checked, written and summed up.

Legend: T frames, D values a frame, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hpc.prepare.deltas import add_deltas
from hpc.prepare.labels import check_lengths
from hpc.shards import DataError, ShardWriter, shard_name

MOST_CLASSES = 1_000_000  # without a known number of classes, a larger label is taken for a mistake


class Source(Protocol):
    """Where utterances come from; any rank can load any of them on its own.

    names        class names, or None if the classes are to be counted from the labels
    description  how the features are computed, in JSON; with "frames_per_second"
    options      what the user chose, in JSON
    notes        what was left out and why, for the user
    tally        what `load` did besides loading, counted since the tally was last cleared
    """

    names: list[str] | None
    description: dict[str, Any]
    options: dict[str, Any]
    notes: list[str]
    tally: dict[str, int]

    def keys(self) -> list[str]:
        """The keys of all utterances."""
        ...

    def digest(self) -> list[str]:
        """Lines that change when a file that is read changes. Raises DataError, OSError for one that is not there."""
        ...

    def load(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 [T, D] and labels, whole numbers [T]. Raises DataError naming the utterance, or OSError."""
        ...


@dataclass(frozen=True)
class Form:
    """What every utterance must look like.

    width    values a frame as the source gives them, before deltas
    first    the key whose width that is, for messages
    classes  how many classes, or None if not known beforehand
    deltas   orders of deltas to add
    """

    width: int
    first: str
    classes: int | None
    deltas: int

    @property
    def final_width(self) -> int:
        return self.width * (1 + self.deltas)


def build_pair(
    source: Source, keys: Sequence[str], folder: Path, index: int, count: int, form: Form,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Write the pair of shards `index` of `count`, and return its record.

    keys     its utterances, in order
    advance  called with the number of frames after every utterance

    Returns {"files": [feature file's summary, label file's], "frames", "utterances", "counts" [up to C], "sums" [D],
    "squares" [D], "tally"}; sums are float64, added in the order of utterances.
    Raises DataError, naming the utterance, for anything that cannot be trained on; no file appears then.
    """
    source.tally.clear()
    width = form.final_width
    sums, squares = np.zeros(width), np.zeros(width)
    counts = np.zeros(form.classes or 0, np.int64)
    frames = 0
    feature_file = ShardWriter(folder / shard_name("features", index, count), {"features": ((width,), np.float32)})
    label_file = ShardWriter(folder / shard_name("labels", index, count), {"labels": ((), np.int32)})
    with feature_file, label_file:
        for key in keys:
            features_TD, labels_T = checked(key, source.load(key), form)
            feature_file.append(key, {"features": features_TD})
            label_file.append(key, {"labels": labels_T})
            exact = features_TD.astype(np.float64)
            sums += exact.sum(axis=0)
            squares += np.square(exact).sum(axis=0)
            found = np.bincount(labels_T, minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
            frames += len(labels_T)
            advance(len(labels_T))
    return {
        "files": [feature_file.summary, label_file.summary], "frames": frames, "utterances": len(keys),
        "counts": counts.tolist(), "sums": sums.tolist(), "squares": squares.tolist(), "tally": dict(source.tally),
    }


def checked(key: str, loaded: tuple[np.ndarray, np.ndarray], form: Form) -> tuple[np.ndarray, np.ndarray]:
    """An utterance as it is written: features with deltas float32 [T, D], labels int32 [T].

    Raises DataError, naming the utterance, if it is empty, has another width, holds NaN or infinity, has another number
    of labels than frames, or a label that is no class.
    """
    features, labels = loaded
    if len(features) == 0:
        raise DataError(f"utterance '{key}' is empty (0 frames); leave it out")
    if features.ndim != 2 or features.shape[1] != form.width:
        raise DataError(
            f"utterance '{key}' has {features.shape[1:]} values a frame, expected ({form.width},) as in utterance "
            f"'{form.first}'; prepare utterances of one kind together"
        )
    check_lengths(key, len(features), len(labels), "give labels made from these features")
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise DataError(
            f"utterance '{key}' holds NaN or infinity, first at frame {int(np.argmin(finite))} of {len(features)}; "
            "compute its features again or leave it out"
        )
    classes = MOST_CLASSES if form.classes is None else form.classes
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DataError(
            f"utterance '{key}' has label {int(labels[at])} at frame {at}, expected 0 to {classes - 1}; "
            + ("give --classes or --names" if form.classes is None else "correct the labels or the number of classes")
        )
    return add_deltas(features, form.deltas), labels.astype(np.int32)

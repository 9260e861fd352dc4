"""The manifest of a set of frames: mean and standard deviation, classes and their counts, from the shards' records.

Legend: D values a frame, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.files import sha256_of
from hpc.shards import MANIFEST, DataError, read_manifest

FLOOR = 1e-5  # of the mean's size, or of 1: a constant value's standard deviation, lest it divides by 0


def mean_and_std(records: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every value of a frame, [D] each, from the sums in shards' records.

    The sums are added exactly and rounded once, so that their order does not matter.
    """
    frames = sum(record["frames"] for record in records)
    mean = [math.fsum(column) / frames for column in zip(*(r["sums"] for r in records), strict=True)]
    squares = [math.fsum(column) / frames for column in zip(*(r["squares"] for r in records), strict=True)]
    spread = [math.sqrt(max(0.0, square - m * m)) for m, square in zip(mean, squares, strict=True)]
    std = [max(s, FLOOR * max(1.0, abs(m))) for m, s in zip(mean, spread, strict=True)]
    return mean, std


def class_counts(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Frames of every class, up to the last class that occurs or is known."""
    longest = max(len(record["counts"]) for record in records)
    counts = [0] * longest
    for record in records:
        for label, count in enumerate(record["counts"]):
            counts[label] += count
    return counts


def given_statistics(folder: Path) -> dict[str, Any]:
    """What a set takes over from another: {"mean", "std", "names", "description", "sha256"}. Raises DataError."""
    manifest = read_manifest(folder)
    try:
        features, labels = manifest["fields"]["features"], manifest["fields"]["labels"]
        return {
            "mean": features["mean"], "std": features["std"], "names": labels["names"],
            "description": features["description"], "sha256": sha256_of(folder / MANIFEST),
        }
    except KeyError as error:
        raise DataError(f"'{folder}' is no data set of frames (no {error} in it); give one for --stats-from") from error


def check_description(given: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    """Raise DataError if features are computed otherwise than those of the data set that statistics come from."""
    other = {n: (given[n], own[n]) for n in own if n in given and n != "source" and given[n] != own[n]}
    if other:
        said = ", ".join(f"{n} is {ours!r}, there {theirs!r}" for n, (theirs, ours) in other.items())
        raise DataError(f"these features are not computed as in '{folder}': {said}; give the same options for both")


def frames_manifest(
    records: Sequence[Mapping[str, Any]], mean: list[float], std: list[float], names: list[str],
    description: Mapping[str, Any], prepared: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest of one set.

    records      its shards' records, in order
    mean, std    of the training set, [D] each
    names        of the classes, C of them
    description  how the features were computed
    prepared     the options it was prepared with
    """
    counts = class_counts(records)
    return {
        "kind": "frames",
        "fields": {
            "features": {
                "dtype": "float32", "width": len(mean), "mean": mean, "std": std, "description": dict(description)
            },
            "labels": {
                "dtype": "int32", "classes": len(names), "names": names,
                "counts": counts + [0] * (len(names) - len(counts)),
            },
        },
        "utterances": sum(record["utterances"] for record in records),
        "frames": sum(record["frames"] for record in records),
        "shards": [{"files": record["files"]} for record in records],
        "prepared": dict(prepared),
    }

"""Small real data sets and recipes for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hpc import shards
from hpc.shards import ShardWriter, read_manifest, shard_name

WIDTH, CLASSES = 6, 5


def shared_data(name: str) -> Path | None:
    """A folder of real data, if this checkout has one beside it (TRIREME_DATA or ../shared/data)."""
    root = Path(os.environ.get("TRIREME_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return root / name if (root / name).is_dir() else None


def write_frames(folder: Path, *, utterances: int = 60, shards: int = 3, seed: int = 0, width: int = WIDTH) -> Path:
    """A data set of frames whose class can be learned: noise around the class's mean."""
    random = np.random.default_rng([seed, 99])
    means = np.random.default_rng(7).normal(size=(CLASSES, width)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    entries, counts, every = [], np.zeros(CLASSES, int), []
    for shard, numbers in enumerate(np.array_split(np.arange(utterances), shards)):
        names = [shard_name(kind, shard, shards) for kind in ("features", "labels")]
        with (
            ShardWriter(folder / names[0], {"features": ((width,), np.float32)}) as features,
            ShardWriter(folder / names[1], {"labels": ((), np.int32)}) as labels,
        ):
            for number in numbers:
                truth = np.repeat(random.integers(CLASSES, size=int(random.integers(2, 9))), random.integers(2, 7))
                values = means[truth] + random.normal(size=(len(truth), width)).astype(np.float32)
                features.append(f"utterance-{number:03d}", {"features": values})
                labels.append(f"utterance-{number:03d}", {"labels": truth})
                counts += np.bincount(truth, minlength=CLASSES)
                every.append(values)
        entries.append({"files": [features.summary, labels.summary]})
    values = np.concatenate(every)
    write_manifest(folder, entries, values.mean(0), values.std(0), counts, utterances)
    return folder


def write_manifest(folder, entries, mean, deviation, counts, utterances) -> None:
    shards.write_manifest(folder, {
        "kind": "frames", "utterances": utterances, "frames": int(counts.sum()), "shards": entries,
        "fields": {
            "features": {"dtype": "float32", "width": len(mean), "mean": mean.tolist(), "std": deviation.tolist()},
            "labels": {
                "dtype": "int32", "classes": len(counts), "names": [str(i) for i in range(len(counts))],
                "counts": counts.tolist(),
            },
        },
    })


@contextmanager
def edited_manifest(folder: Path) -> Iterator[dict[str, Any]]:
    """A data set's manifest to be changed, and then sealed as if it had been written so."""
    manifest = read_manifest(folder)
    yield manifest
    shards.write_manifest(folder, manifest)


RECIPE = """
run = "{run}"
seed = 3
splits = {splits}
[data]
train = "{data}/train"
validation = "{data}/validation"
batch = {batch}
split_frames = 96
runs = 3
[task]
name = "frames"
context = 2
layers = 2
width = 40
dropout = 0.1
[optim]
name = "momentum"
learning_rate = 0.5
momentum_first_epoch = 0.5
[strategy]
name = "allreduce"
clip_norm = 0.5
[schedule]
name = "newbob"
epochs = 4
min_epochs = 99
[validate]
every = 600
[checkpoint]
every = 600
[log]
every = 5
tensorboard = false
"""


def write_recipe(folder: Path, *, splits: int = 4, batch: int = 48, text: str = RECIPE) -> Path:
    """A recipe over the data below `folder` (train and validation are made if they are not there)."""
    for name, seed, count in (("train", 1, 60), ("validation", 2, 20)):
        if not (folder / name).exists():
            write_frames(folder / name, seed=seed, utterances=count)
    path = folder / "recipe.toml"
    path.write_text(text.format(run=folder / "run", splits=splits, batch=batch, data=folder))
    return path

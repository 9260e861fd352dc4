"""What the tests of `trireme prepare frames` share: utterances, as files and in memory, and their reading back."""

from __future__ import annotations

import kaldiio
import numpy as np

from hpc.shards import Dataset


class Given:
    """A source of utterances given in memory."""

    def __init__(self, utterances, names=None, order=None):
        self.utterances, self.names = utterances, names
        self.order = list(utterances) if order is None else order
        self.description = {"source": "given", "frames_per_second": 100.0}
        self.options, self.notes, self.tally = {"source": "given"}, [], {}

    def keys(self):
        return self.order

    def digest(self):
        return []

    def load(self, key):
        return self.utterances[key]


def utterances(count=10, width=3, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    made = {}
    for i in range(count):
        frames = int(rng.integers(1, 30))
        features = rng.normal(3, 2, (frames, width)).astype(np.float32)
        made[f"s{i % 5}-u{i:02d}"] = (features, rng.integers(0, classes, frames))
    return made


def write_kaldi(folder, made):
    """feats.scp, and alignments as text, archive and scp."""
    folder.mkdir(parents=True, exist_ok=True)
    kaldiio.save_ark(str(folder / "feats.ark"), {k: f for k, (f, _) in made.items()}, scp=str(folder / "feats.scp"))
    labels = {k: np.asarray(v, np.int32) for k, (_, v) in made.items()}
    kaldiio.save_ark(str(folder / "ali.ark"), labels, scp=str(folder / "ali.scp"))
    (folder / "ali.txt").write_text("".join(f"{k} {' '.join(map(str, v))}\n" for k, v in labels.items()))


def stored(folder):
    """A data set read back: {key: (features, labels)}, in its order."""
    data = Dataset(folder)
    for shard in range(len(data.manifest["shards"])):
        data.verify(shard)
    width = data.field("features")["width"]
    features, labels = np.empty((data.rows, width), np.float32), np.empty(data.rows, np.int32)
    data.read("features", 0, data.rows, features)
    data.read("labels", 0, data.rows, labels)
    pieces = zip(data.keys(), data.starts, data.starts[1:], strict=False)
    found = {key: (features[low:high], labels[low:high]) for key, low, high in pieces}
    data.close()
    return found


def same(a, b):
    return a.keys() == b.keys() and all(
        np.array_equal(a[k][0], b[k][0]) and np.array_equal(a[k][1], b[k][1]) for k in a
    )


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

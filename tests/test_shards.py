"""Shards: what is written is what is read, and whatever is damaged is named, not trained on."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from material import edited_manifest, write_frames

from hpc.shards import MANIFEST, DataError, Dataset, ShardWriter, shard_name, write_manifest

FIELDS = {"features": ((3,), np.float32)}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return write_frames(tmp_path_factory.mktemp("clean") / "train", utterances=20, shards=2)


@pytest.fixture
def folder(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "train")


def everything(folder):
    data = Dataset(folder)
    for shard in range(len(data.manifest["shards"])):
        data.verify(shard)
    values = np.empty((data.rows, data.field("features")["width"]), np.float32)
    data.read("features", 0, data.rows, values)
    data.close()
    return values


@settings(deadline=None, max_examples=20)
@given(some.lists(some.integers(1, 40), min_size=1, max_size=12), some.integers(1, 5), some.integers(0, 9))
def test_ragged_rows_come_back_as_they_were_written(tmp_path_factory, lengths, width, seed):
    path = tmp_path_factory.mktemp("shard") / shard_name("features", 0, 1)
    random = np.random.default_rng(seed)
    given = {f"k{i}é": random.normal(size=(n, width)).astype(np.float32) for i, n in enumerate(lengths)}
    with ShardWriter(path, {"features": ((width,), np.float32)}) as writer:
        for key, values in given.items():
            writer.append(key, {"features": values})
    about = {"dtype": "float32", "width": width}
    write_manifest(path.parent, {"shards": [{"files": [writer.summary]}], "fields": {"features": about}})
    data = Dataset(path.parent, ["features"])
    data.verify(0)
    assert data.keys() == list(given) and [data.key(i) for i in range(data.utterances)] == list(given)
    out = np.empty((data.rows, width), np.float32)
    data.read("features", 0, data.rows, out)
    assert np.array_equal(out, np.concatenate(list(given.values())))
    data.close()


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path):
    path = tmp_path / "f.h5"
    for bad in ({"features": np.zeros((0, 3))}, {"features": np.zeros((2, 4))}, {"other": np.zeros((2, 3))}):
        with pytest.raises(DataError, match="utterance 'a'"), ShardWriter(path, FIELDS) as writer:
            writer.append("a", bad)
    with pytest.raises(DataError, match="twice"), ShardWriter(path, FIELDS) as writer:
        writer.append("a", {"features": np.zeros((2, 3))})
        writer.append("a", {"features": np.zeros((2, 3))})
    assert not list(tmp_path.iterdir())


def test_a_missing_shard(folder):
    (folder / shard_name("labels", 1, 2)).unlink()
    with pytest.raises(DataError, match=r"labels-00001-of-00002\.h5' is missing.*prepare"):
        Dataset(folder)


def test_a_shard_cut_short(folder):
    path = folder / shard_name("features", 0, 2)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"features-00000.*bytes.*cut short"):
        Dataset(folder)


def test_every_flipped_bit_is_found(folder):
    """A bit anywhere: found by SHA-256 always; without it, never read as another value in silence."""
    reference = everything(folder)
    path = folder / shard_name("features", 1, 2)
    whole = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            data = Dataset(folder)
        except DataError:
            continue
        with pytest.raises(DataError, match=r"features-00001-of-00002\.h5'|cannot be opened"):
            data.verify(1)
        out = np.empty_like(reference)
        try:
            data.read("features", 0, data.rows, out)
            assert np.array_equal(out, reference), f"byte {at} changed the values and nobody noticed"
        except DataError as error:
            assert "features-00001-of-00002.h5" in str(error)
        data.close()


def test_a_manifest_that_disagrees(folder):
    with edited_manifest(folder) as manifest:
        manifest["shards"][0]["files"][0]["rows"]["features"] += 1
    with pytest.raises(DataError, match=r"rows and .* utterances, dataset.json says"):
        Dataset(folder)


def replace_labels(folder, change):
    """Rewrite the labels of shard 0 with another content but a manifest that fits the file."""
    data = Dataset(folder)
    keys, starts = data.keys()[: int(data.shard_utterances[1])], data.starts
    labels = np.empty(data.rows, np.int32)
    data.read("labels", 0, data.rows, labels)
    data.close()
    path = folder / shard_name("labels", 0, 2)
    with ShardWriter(path, {"labels": ((), np.int32)}) as writer:
        for i, key in enumerate(keys):
            key, values = change(i, key, labels[starts[i] : starts[i + 1]])
            writer.append(key, {"labels": values})
    with edited_manifest(folder) as manifest:
        manifest["shards"][0]["files"][1] = writer.summary


def test_counts_that_differ_between_features_and_labels(folder):
    replace_labels(folder, lambda i, key, values: (key, values[:-1] if i == 3 else values))
    with pytest.raises(DataError, match=r"labels-00000.*'labels' has .* rows.*'features' has"):
        Dataset(folder)


def test_labels_of_other_utterances(folder):
    replace_labels(folder, lambda i, key, values: (f"other-{key}" if i == 4 else key, values))
    with pytest.raises(DataError, match=r"other utterances.*first difference at utterance 4"):
        Dataset(folder).verify(0)


def test_realigned_labels_need_no_new_features(folder):
    replace_labels(folder, lambda i, key, values: (key, (values + 1) % 5))
    Dataset(folder).verify(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a data set manifest"), ('{"schema": 1, "shards": [], "fields": {}}', "schema: Input should be 2"),
        ('{"schema": 2, "shards": [], "fields": {}}', "no \"seal\""), ("[" * 100_000, "nested too deeply"),
        ('{"schema": 2, "shards": [], "fields": {}, "seal": "00"}', "was altered"),
        ('{"schema": 2, "shards": [1], "fields": {}}', "shards.0"),
    ],
)
def test_a_broken_manifest(tmp_path, text, message):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=message):
        Dataset(tmp_path)


def test_a_folder_that_only_holds_data_sets_says_which(clean):
    with pytest.raises(DataError, match=r"holds the data sets \['train'\]"):
        Dataset(clean.parent)

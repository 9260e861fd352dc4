"""Staging: what is copied to a node-local disk, by whom, and what an interrupted copy leaves to do."""

from __future__ import annotations

import os

import pytest
from material import write_frames

from collectives.comm import Comm, RootFailed
from hpc.files import sha256_of
from hpc.pulse import Pulse
from hpc.shards import MANIFEST, DataError, Dataset, read_manifest
from hpc.staging import copy_dataset, stage, staged_name

two_ranks = pytest.mark.mpi(ranks=[2], timeout=60)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def identities(folder):
    """Every file's inode: a file that is copied again gets another one."""
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path):
    return write_frames(tmp_path / "source", utterances=12)


@two_ranks
def test_the_first_rank_of_a_host_copies_and_all_read_the_same(shared_folder):
    comm = Comm()
    source, target = shared_folder / "source", shared_folder / "local"
    comm.on_root(lambda: str(write_frames(source, utterances=12)))
    place = stage(source, str(target), comm, Pulse(0))
    assert place == target / staged_name(source) and files(place) == files(source)
    data = Dataset(place)
    for shard in range(len(data.manifest["shards"])):
        data.verify(shard)
    data.close()
    kept = identities(place)
    comm.barrier()
    assert stage(source, str(target), comm, Pulse(0)) == place and identities(place) == kept
    assert comm.local_size == 2 and comm.gather(comm.local_rank) == [0, 1]  # the two really share a host


@two_ranks
def test_a_failing_copy_ends_every_rank(shared_folder):
    comm = Comm()
    source = shared_folder / "source"
    comm.on_root(lambda: str(write_frames(source, utterances=12)))
    comm.on_root(lambda: os.remove(source / "labels-00002-of-00003.h5"))
    with pytest.raises(RootFailed if comm.local_rank else DataError, match=r"labels-00002-of-00003.h5' is missing"):
        stage(source, str(shared_folder / "local"), comm, Pulse(0))


@pytest.mark.parametrize("victim", ["features-00001-of-00003.h5", "labels-00000-of-00003.h5", MANIFEST])
@pytest.mark.parametrize("left", ["shorter", "nothing"])
def test_an_interrupted_copy_is_completed(source, tmp_path, victim, left):
    place = tmp_path / "place"
    copy_dataset(source, place, Pulse(0))
    kept = identities(place)
    torn = place / victim
    if left == "shorter":  # the manifest is there all the same: it is no proof that the shards are
        os.truncate(torn, torn.stat().st_size - 1)
    else:
        torn.unlink()
    copy_dataset(source, place, Pulse(0))
    assert files(place) == files(source)
    now = identities(place)
    assert {name for name in now if name != victim and now[name] != kept[name]} == set()


def test_another_manifest_is_another_place(source, tmp_path):
    other = write_frames(tmp_path / "other", utterances=12, seed=1)
    places = [stage(folder, str(tmp_path / "local"), Comm(), Pulse(0)) for folder in (source, other)]
    assert places[0] != places[1] and [files(p) for p in places] == [files(source), files(other)]


@pytest.mark.parametrize("kind", ["features", "labels"])
def test_a_missing_or_torn_file_of_the_source_is_an_error_that_names_it(source, tmp_path, kind):
    path = source / f"{kind}-00001-of-00003.h5"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(DataError, match=rf"'{path}' has {size - 1} bytes, {MANIFEST} says {size}"):
        copy_dataset(source, tmp_path / "place", Pulse(0))
    path.unlink()
    with pytest.raises(DataError, match=rf"'{path}' is missing"):
        copy_dataset(source, tmp_path / "place", Pulse(0))
    left = {p.name for p in (tmp_path / "place").iterdir()}
    assert MANIFEST not in left and not any(".tmp" in name for name in left)


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a data set"):
        stage(tmp_path, str(tmp_path / "local"), Comm(), Pulse(0))
    assert not (tmp_path / "local").exists()


def test_a_source_file_that_is_already_staged_is_not_needed_again(source, tmp_path):
    copy_dataset(source, tmp_path / "place", Pulse(0))
    entry = read_manifest(source)["shards"][0]["files"][0]
    (source / entry["name"]).unlink()
    copy_dataset(source, tmp_path / "place", Pulse(0))
    assert sha256_of(tmp_path / "place" / entry["name"]) == entry["sha256"]

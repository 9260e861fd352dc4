"""`trireme prepare frames` on several ranks: the same bytes, and an end for all when one fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import soundfile

from hpc.shards import Dataset

MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec: install trireme[mpich] or another MPI")
PREPARE = [sys.executable, "-m", "mpi4py", "-m", "hpc", "prepare", "frames"]


def launch(ranks, *words):
    command = [MPIEXEC, "-n", str(ranks), *PREPARE, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def kaldi(tmp_path):
    rng = np.random.default_rng(0)
    features = {f"u{i:02d}": rng.normal(size=(int(rng.integers(1, 40)), 4)).astype(np.float32) for i in range(30)}
    labels = {key: rng.integers(0, 5, len(value)).astype(np.int32) for key, value in features.items()}

    def write():
        kaldiio.save_ark(str(tmp_path / "feats.ark"), features, scp=str(tmp_path / "feats.scp"))
        kaldiio.save_ark(str(tmp_path / "ali.ark"), labels)
        os.utime(tmp_path / "feats.ark", ns=(0, 0))  # bytes that rot on the disk change no time, nor does their repair

    write()
    words = ("--from", "kaldi", "--feats", tmp_path / "feats.scp", "--alignments", tmp_path / "ali.ark", "--deltas", 2)
    return words, features, write


def test_the_output_is_the_same_for_any_number_of_ranks(tmp_path, kaldi):
    words, _, _ = kaldi
    for ranks in (1, 2, 3):
        done = launch(ranks, *words, tmp_path / f"on{ranks}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written to") == 1
    one = tree(tmp_path / "on1")
    assert len(one) == 2 + 2 * 8 + 2 * 1
    assert one == tree(tmp_path / "on2") == tree(tmp_path / "on3")


def test_one_failing_rank_ends_all_and_the_rest_is_continued(tmp_path, kaldi):
    words, features, write = kaldi
    assert launch(1, *words, tmp_path / "straight").returncode == 0
    data = Dataset(tmp_path / "straight/train")
    victim = data.key(int(data.shard_utterances[3]) + 1)  # in the second round of two ranks: rank 1's
    data.close()
    whole = features[victim].copy()
    features[victim][-1, 2] = np.nan
    write()
    failed = launch(2, *words, tmp_path / "out")
    assert failed.returncode != 0
    assert f"utterance '{victim}' holds NaN or infinity, first at frame {len(whole) - 1}" in failed.stderr
    assert "Traceback" not in failed.stderr and not list((tmp_path / "out").rglob("dataset.json"))
    assert len(list((tmp_path / "out").rglob("done-*"))) == 3  # the first round's two, and rank 0's of the second
    features[victim][:] = whole
    write()
    healed = launch(3, *words, tmp_path / "out")  # and with another number of ranks
    assert healed.returncode == 0 and "3 shards were finished before and were kept" in healed.stdout
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


def test_sound_files_are_shared_out(tmp_path):
    rng = np.random.default_rng(1)
    for name in ("a/1", "a/2", "a/3", "b/1", "b/2"):
        path = tmp_path / "in" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.uniform(-0.5, 0.5, 2000), 8000)
    shutil.copy(tmp_path / "in/a/2.wav", tmp_path / "in/b/3.wav")
    for ranks in (1, 2):
        done = launch(ranks, "--from", "audio", tmp_path / "in", tmp_path / f"on{ranks}")
        assert done.returncode == 0, done.stderr
        assert "'b/3.wav = a/2.wav'" in done.stdout
    assert tree(tmp_path / "on1") == tree(tmp_path / "on2")
    soundfile.write(tmp_path / "in/b/4.wav", np.full(2000, 0.1), 16000)
    refused = launch(2, "--from", "audio", tmp_path / "in", tmp_path / "on2")
    assert refused.returncode != 0 and refused.stderr.count("different sample rates") == 1

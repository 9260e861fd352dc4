"""A file that was touched or replaced under its name since the data set was made is noticed, for every source."""

from __future__ import annotations

import os
import re

import kaldiio
import numpy as np
import pytest
import soundfile
from prepare_material import tree, utterances, write_kaldi

from collectives.comm import Comm
from hpc.prepare.audio import find_audio
from hpc.prepare.frames import prepare_frames
from hpc.prepare.kaldi import KaldiSource
from hpc.prepare.sphinx import SphinxSource
from hpc.shards import DataError


@pytest.fixture(scope="module")
def comm():
    return Comm()


def kaldi(folder, alignments="ali.txt"):
    made = utterances(10)
    write_kaldi(folder, made)
    return lambda comm: KaldiSource(folder / "feats.scp", [folder / alignments])


def sphinx(folder):
    lines = []
    for key, (features, labels) in utterances(10).items():
        (folder / f"{key}.mfc").write_bytes(np.array([features.size], "<i4").tobytes() + features.tobytes())
        lines.append(f"{key} {' '.join(map(str, labels))}\n")
    (folder / "labels").write_text("".join(lines))
    (folder / "stranger.mfc").write_bytes(b"")
    return lambda comm: SphinxSource(folder, folder / "labels", width=3)


def audio(folder):
    rng = np.random.default_rng(0)
    for name in ("en/a", "en/b", "fr/a", "fr/b"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{name}.wav", rng.uniform(-0.3, 0.3, 2000), 8000)
    return lambda comm: find_audio(comm, [str(folder)])


SOURCES = {
    "kaldi features": (kaldi, "feats.ark"),
    "kaldi alignments": (lambda folder: kaldi(folder, "ali.scp"), "ali.ark"),
    "sphinx": (sphinx, "s3-u03.mfc"),
    "audio": (audio, "fr/b.wav"),
}
BYTE = {"feats.ark": -2, "ali.ark": -4, "s3-u03.mfc": -2, "b.wav": -2002}  # of a value, a label, a value, a sample


def touch(path):
    about = path.stat()
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 1))


def replace(path):
    """The same size, other content, and an older time, as a copy from elsewhere may have."""
    body = bytearray(path.read_bytes())
    body[BYTE[path.name]] ^= 1
    new = path.with_name("new")
    new.write_bytes(body)
    os.utime(new, ns=(0, path.stat().st_mtime_ns - 10**9))
    os.replace(new, path)


@pytest.mark.parametrize("change", [touch, replace])
@pytest.mark.parametrize("name", SOURCES)
def test_a_file_that_was_changed_is_not_taken_for_the_same_data(comm, tmp_path, name, change):
    (tmp_path / "in").mkdir()
    make, victim = SOURCES[name]
    source = make(tmp_path / "in")
    assert prepare_frames(comm, source(comm), tmp_path / "out", quiet=True)["state"] == "new"
    assert prepare_frames(comm, source(comm), tmp_path / "out", quiet=True)["state"] == "finished"
    before = tree(tmp_path / "out")
    change(tmp_path / "in" / victim)
    with pytest.raises(DataError, match=r"a file that is read was changed.*--overwrite"):
        prepare_frames(comm, source(comm), tmp_path / "out", quiet=True)
    assert tree(tmp_path / "out") == before
    assert prepare_frames(comm, source(comm), tmp_path / "out", overwrite=True, quiet=True)["state"] == "new"
    same = {n: body == before[n] for n, body in tree(tmp_path / "out").items() if n.endswith(".h5")}
    assert len(same) > 0 and all(same.values()) == (change is touch)


def test_a_file_that_is_not_read_may_change(comm, tmp_path):
    source = sphinx(tmp_path)
    prepare_frames(comm, source(comm), tmp_path / "out", quiet=True)
    touch(tmp_path / "stranger.mfc")
    touch(tmp_path / "labels")  # its content is compared, and is the same
    assert prepare_frames(comm, source(comm), tmp_path / "out", quiet=True)["state"] == "finished"


def test_a_replaced_label_file_is_noticed_by_its_content(comm, tmp_path):
    source = sphinx(tmp_path)
    prepare_frames(comm, source(comm), tmp_path / "out", quiet=True)
    path, about = tmp_path / "labels", (tmp_path / "labels").stat()
    path.write_text(re.sub(r" 1\b", " 2", path.read_text()))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    with pytest.raises(DataError, match="a file that is read was changed"):
        prepare_frames(comm, source(comm), tmp_path / "out", quiet=True)


@pytest.mark.parametrize(("name", "message"), [
    ("kaldi features", "utterance '.*': no file '.*feats.ark'"),
    ("kaldi alignments", "utterance '.*': no file '.*ali.ark'"),
    ("sphinx", "utterance 's3-u03' has labels but no file"),
])
def test_a_missing_file_is_named_before_anything_is_written(comm, tmp_path, name, message):
    (tmp_path / "in").mkdir()
    make, victim = SOURCES[name]
    source = make(tmp_path / "in")
    (tmp_path / "in" / victim).unlink()
    with pytest.raises(DataError, match=message):
        prepare_frames(comm, source(comm), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_an_archive_of_utterances_that_have_no_labels_is_not_looked_for(comm, tmp_path):
    source = kaldi(tmp_path)
    other = str(tmp_path / "gone.ark")
    kaldiio.save_ark(other, {"stranger": np.ones((2, 3), np.float32)}, scp=str(tmp_path / "other.scp"))
    os.remove(other)
    with open(tmp_path / "feats.scp", "a") as file:
        file.write((tmp_path / "other.scp").read_text())
    assert prepare_frames(comm, source(comm), tmp_path / "out", quiet=True)["state"] == "new"

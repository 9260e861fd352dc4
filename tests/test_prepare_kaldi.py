"""Kaldi files as sources of `trireme prepare frames`, names of classes, and the command line."""

from __future__ import annotations

import argparse
import os
import re
import shlex

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_material import same, utterances, write_kaldi

from collectives.comm import Comm
from hpc.failure import FAILED
from hpc.prepare import frames_options
from hpc.prepare.frames import prepare_frames, run
from hpc.prepare.kaldi import KaldiSource
from hpc.prepare.labels import read_names
from hpc.shards import DataError, read_manifest

GOOD = np.ones((4, 3), np.float32)


@pytest.fixture(scope="module")
def comm():
    return Comm()


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2**32 - 1)), min_size=1, max_size=6),
    st.sampled_from(["ali.txt", "ali.ark", "ali.scp"]),
)
@settings(max_examples=25, deadline=None)
def test_ragged_data_comes_back_through_kaldi_archives(tmp_path_factory, lengths, form):
    folder = tmp_path_factory.mktemp("kaldi")
    rng = [np.random.default_rng(seed) for _, seed in lengths]
    made = {
        f"u{i}": (g.normal(size=(n, 5)).astype(np.float32), g.integers(0, 2**31 - 1, n))
        for i, ((n, _), g) in enumerate(zip(lengths, rng, strict=True))
    }
    write_kaldi(folder, made)
    source = KaldiSource(folder / "feats.scp", [folder / form])
    assert same({key: source.load(key) for key in source.keys()}, made)  # noqa: SIM118


def test_utterances_without_alignment_are_left_out_and_counted(comm, tmp_path):
    made = utterances(10)
    write_kaldi(tmp_path, made)
    lines = (tmp_path / "ali.txt").read_text().splitlines()
    (tmp_path / "ali.1.txt").write_text("\n".join(lines[:4]) + "\n")
    (tmp_path / "ali.2.txt").write_text("\n".join(lines[5:9]) + "\nstranger 1 2\n")
    source = KaldiSource(tmp_path / "feats.scp", [tmp_path / "ali.1.txt", tmp_path / "ali.2.txt"])
    assert len(source.keys()) == 8
    assert source.notes[0].startswith("2 of 10 utterances have no alignment") and "'s4-u04'" in source.notes[0]
    assert source.notes[1] == "1 alignments have no features and were left out: 'stranger'"
    report = prepare_frames(comm, source, tmp_path / "out", quiet=True)
    assert report["notes"] == source.notes == read_manifest(tmp_path / "out/train")["prepared"]["notes"]


def test_what_kaldi_lists_cannot_say_is_refused(tmp_path):
    write_kaldi(tmp_path, {"u": (GOOD, [0, 1, 2])})
    with pytest.raises(DataError, match=r"'u' has 4 feature frames and 3 labels.*chain model"):
        KaldiSource(tmp_path / "feats.scp", [tmp_path / "ali.txt"]).load("u")
    with pytest.raises(DataError, match="key 'u' appears twice"):
        KaldiSource(tmp_path / "feats.scp", [tmp_path / "ali.txt", tmp_path / "ali.ark"])
    (tmp_path / "pipe.scp").write_text("u touch pwned |\n")
    with pytest.raises(DataError, match="commands are not run"):
        KaldiSource(tmp_path / "pipe.scp", [tmp_path / "ali.txt"])
    (tmp_path / "object.ark").write_bytes(b"PKL\x80\x04.")
    (tmp_path / "object.scp").write_text(f"u {tmp_path}/object.ark:0\n")
    with pytest.raises(DataError, match="neither a binary nor a text matrix"):
        KaldiSource(tmp_path / "object.scp", [tmp_path / "ali.txt"]).load("u")
    (tmp_path / "gone.scp").write_text("u nowhere.ark:5\n")
    with pytest.raises(DataError, match=r"no file 'nowhere.ark'"):
        KaldiSource(tmp_path / "gone.scp", [tmp_path / "ali.txt"]).load("u")
    archive = (tmp_path / "feats.ark").read_bytes()
    ali = (tmp_path / "ali.ark").read_bytes()
    for cut in (1, 4, 5, 10, 12, 14):
        (tmp_path / "feats.ark").write_bytes(archive[:-cut])
        with pytest.raises(DataError, match=r"'u'.*cannot be read"):
            KaldiSource(tmp_path / "feats.scp", [tmp_path / "ali.txt"]).load("u")
        (tmp_path / "ali.ark").write_bytes(ali[:-cut])
        with pytest.raises(DataError, match=r"ali.ark': utterance 'u' cannot be read"):
            KaldiSource(tmp_path / "feats.scp", [tmp_path / "ali.ark"])
    (tmp_path / "feats.ark").write_bytes(archive)
    (tmp_path / "ali.gz").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(DataError, match="gunzip"):
        KaldiSource(tmp_path / "feats.scp", [tmp_path / "ali.gz"])
    (tmp_path / "float.txt").write_text("u 0 1.5 2 3\n")
    with pytest.raises(DataError, match=r"'u'.*whole numbers"):
        KaldiSource(tmp_path / "feats.scp", [tmp_path / "float.txt"]).load("u")


def test_rows_of_an_entry_include_the_last(tmp_path):
    features = np.arange(30, dtype=np.float32).reshape(10, 3)
    write_kaldi(tmp_path, {"u": (features, [7, 8, 9])})
    entry = (tmp_path / "feats.scp").read_text().strip()
    (tmp_path / "part.scp").write_text(entry + "[2:4]\n")
    got, labels = KaldiSource(tmp_path / "part.scp", [tmp_path / "ali.scp"]).load("u")
    assert np.array_equal(got, features[2:5]) and labels.tolist() == [7, 8, 9]


# -- names and the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["x\ny\nz\n", "0 x\n1 y\n2 z\n", "x 0\nz 2\ny 1\n"])
def test_names_with_or_without_an_index(tmp_path, text):
    (tmp_path / "names").write_text(text)
    assert read_names(tmp_path / "names") == ["x", "y", "z"]
    (tmp_path / "names").write_text("x\ny\nx\n")
    with pytest.raises(DataError, match=r"repeated are \['x'\]"):
        read_names(tmp_path / "names")


def test_the_command_prepares_and_shows_a_table(trireme, tmp_path):
    write_kaldi(tmp_path, utterances(20))
    words = ["prepare", "frames", "--from", "kaldi", "--feats", f"{tmp_path}/feats.scp", "--shards", 2, "--classes", 6]
    words += ["--group", "^(s.)-", "--validation-groups", 1]
    # OUT stands last, behind an option that takes several values
    shown = trireme(*words, "--alignments", f"{tmp_path}/ali.txt", f"{tmp_path}/out").stdout
    assert "train" in shown and "validation" in shown and "4/6" in shown and "written to" in shown
    assert read_manifest(tmp_path / "out/validation")["utterances"] == 4
    assert "nothing was done" in trireme(*words, "--alignments", f"{tmp_path}/ali.txt", f"{tmp_path}/out").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--from kaldi", "OUT"),
        ("--from wav OUT", "expected one of"),
        ("--from kaldi OUT", "needs --feats and --align"),
        ("--from kaldi --mels 3 --feats a --alignments b -- OUT", "does not take ['--mels']"),
        ("--from audio nowhere OUT", "'nowhere' is not a folder"),
        ("--from audio a=nowhere OUT", "'nowhere' is not a folder"),
        ("--from audio a b OUT", "expected NAME=DIR"),
        ("--from sphinx --mfc nowhere --labels b OUT", "'nowhere' is not a folder"),
        ("--from kaldi --feats nowhere.scp --alignments b --set x --validation 0.1 -- OUT", "--set writes one set"),
        ("--from kaldi --feats nowhere.scp --alignments b --validation 5 -- OUT", "below 1"),
        ("--from kaldi --feats nowhere.scp --alignments b -- OUT", "nowhere.scp"),
        ("--from kaldi --feats nowhere.scp --alignments b --stats-from c -- OUT", "'c' is not a data set"),
    ],
)
def test_wrong_command_lines_say_what_is_wrong(comm, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    frames_options.add_arguments(parser)
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        run(parser.parse_args(words.split()), comm)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--from kaldi OUT", "needs --feats and --align"),
        ("--from kaldi --feats nowhere.scp --alignments b -- OUT", "nowhere.scp"),
        ("--from kaldi --feats feats.scp --alignments ali.txt --shards 0 -- OUT", "--shards 0"),
    ],
)
def test_what_is_wrong_is_said_once_however_many_ranks(trireme, tmp_path, words, message):
    write_kaldi(tmp_path, utterances(4))
    failed = trireme("prepare", "frames", *words.split(), ranks=2, code=None, cwd=tmp_path)
    assert failed.returncode in (1, FAILED)
    assert failed.stderr.count(message) == 1 and "Traceback" not in failed.stderr
    assert not (tmp_path / "OUT").exists()


def test_every_example_of_the_help_is_a_command_line_that_parses():
    parser = argparse.ArgumentParser()
    frames_options.add_arguments(parser)
    commands = re.findall(r"trireme prepare frames (.*)", frames_options.EXAMPLES.replace("\\\n", " "))
    seen = set()
    for command in commands:
        args = parser.parse_args(shlex.split(command))
        assert frames_options.out_of(args).parts[0] == "data"
        frames_options.holdout_of(args)
        seen.add(args.origin[0])
    assert seen == {"audio", "kaldi", "sphinx"} and len(commands) == 5
    assert frames_options.EXAMPLES in parser.format_help()


def test_the_manifest_of_a_folder_that_cannot_be_written_is_an_error(trireme, tmp_path):
    write_kaldi(tmp_path, utterances(4))
    (tmp_path / "out").write_text("a file")
    words = ["--from", "kaldi", "--feats", f"{tmp_path}/feats.scp", "--alignments", f"{tmp_path}/ali.scp"]
    failed = trireme("prepare", "frames", *words, f"{tmp_path}/out", code=FAILED)
    assert os.path.isfile(tmp_path / "out") and f"{tmp_path}/out" in failed.stderr and "Traceback" not in failed.stderr

"""`trireme prepare frames` on one rank: what is written, what is refused, what is remembered."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepare_material import Given, same, stored, tree, utterances

from collectives.comm import Comm
from hpc.prepare.deltas import add_deltas, slope
from hpc.prepare.frames import prepare_frames
from hpc.prepare.holdout import Holdout, runs, shuffled
from hpc.shards import DataError, read_manifest

ALL = Holdout(fraction=0)


@pytest.fixture(scope="module")
def comm():
    return Comm()


# -- deltas ---------------------------------------------------------------------------------------------------------


@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(5, 40))
def test_the_slope_of_a_ramp_is_its_slope(rise, start, frames):
    ramp = (start + rise * np.arange(frames, dtype=np.float64))[:, None]
    np.testing.assert_allclose(slope(ramp)[2:-2], rise, atol=1e-12)
    np.testing.assert_allclose(slope(ramp)[[0, -1]], rise * 0.5, atol=1e-12)  # (1 + 2 * 2) / 10 with repeated edges


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 17])
def test_deltas_equal_the_formula_frame_by_frame(frames):
    x = np.random.default_rng(frames).normal(size=(frames, 13))

    def formula(x):
        def at(t):
            return x[min(max(t, 0), frames - 1)]

        return np.array([(at(t + 1) - at(t - 1) + 2 * (at(t + 2) - at(t - 2))) / 10 for t in range(frames)])

    expected = np.hstack([x, formula(x), formula(formula(x))])
    for orders in (0, 1, 2):
        got = add_deltas(x, orders)
        assert got.shape == (frames, 13 * (1 + orders)) and got.dtype == np.float32
        np.testing.assert_allclose(got, expected[:, : got.shape[1]], rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="deltas = 3"):
        add_deltas(x, 3)


# -- what is written ------------------------------------------------------------------------------------------------


def test_the_data_sets_hold_every_utterance_once_with_its_values(comm, tmp_path):
    made = utterances(20)
    prepare_frames(comm, Given(made), tmp_path, shards=3, quiet=True)
    train, validation = stored(tmp_path / "train"), stored(tmp_path / "validation")
    assert len(validation) == 2 and not set(train) & set(validation)
    assert same({k: (train | validation)[k] for k in made}, made)
    order = shuffled(list(made), 0)
    assert list(train) == [k for k in order if k in train] and list(train) != sorted(train)
    assert [f.name for f in sorted((tmp_path / "train").iterdir())] == [
        "dataset.json", *(f"{kind}-0000{i}-of-00003.h5" for kind in ("features", "labels") for i in range(3)),
    ]


def test_the_manifest_says_what_the_format_asks(comm, tmp_path):
    made = utterances(20, classes=4)
    prepare_frames(comm, Given(made, names=list("abcde")), tmp_path, deltas=1, quiet=True)
    train, validation = read_manifest(tmp_path / "train"), read_manifest(tmp_path / "validation")
    held = stored(tmp_path / "validation")
    features = np.concatenate([add_deltas(f, 1) for k, (f, _) in made.items() if k not in held]).astype(np.float64)
    labels = np.concatenate([v for k, (_, v) in made.items() if k not in held])
    field = train["fields"]["features"]
    assert (train["schema"], train["kind"], field["dtype"], field["width"]) == (2, "frames", "float32", 6)
    np.testing.assert_allclose(field["mean"], features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(field["std"], features.std(axis=0), rtol=1e-9)
    assert validation["fields"]["features"] == field  # the training set's, in both
    assert field["description"] == {"source": "given", "frames_per_second": 100.0, "deltas": 1}
    assert train["fields"]["labels"] == {
        "dtype": "int32", "classes": 5, "names": list("abcde"), "counts": np.bincount(labels, minlength=5).tolist(),
    }
    assert sum(validation["fields"]["labels"]["counts"]) == validation["frames"]
    assert train["utterances"] == 18 and train["frames"] == len(features)
    assert [list(file["rows"]) for file in train["shards"][0]["files"]] == [["features"], ["labels"]]


def test_a_constant_value_has_a_standard_deviation_to_divide_by(comm, tmp_path):
    made = {k: (np.hstack([f, np.full((len(f), 1), 1000.1, np.float32)]), v) for k, (f, v) in utterances().items()}
    prepare_frames(comm, Given(made), tmp_path, validation=ALL, quiet=True)
    field = read_manifest(tmp_path / "train")["fields"]["features"]
    normalised = (np.float32(1000.1) - np.float32(field["mean"][3])) / np.float32(field["std"][3])
    assert field["std"][3] >= 1e-5 * 1000 and abs(normalised) < 0.1


@pytest.mark.parametrize(("count", "shards", "expected"), [(3, 8, 3), (10, 4, 4), (5, 1, 1)])
def test_no_shard_is_empty(comm, tmp_path, count, shards, expected):
    prepare_frames(comm, Given(utterances(count)), tmp_path, shards=shards, validation=ALL, quiet=True)
    assert not (tmp_path / "validation").exists()
    sizes = [s["files"][0]["utterances"] for s in read_manifest(tmp_path / "train")["shards"]]
    assert len(sizes) == expected and sum(sizes) == count and max(sizes) - min(sizes) <= 1


# -- what is held out -----------------------------------------------------------------------------------------------


def test_groups_are_held_out_whole():
    keys = [f"s{i % 12}-u{i}" for i in range(100)]
    by_share, by_number = Holdout(fraction=0.25, pattern="^(s[0-9]+)-"), Holdout(groups=9, pattern="^([^-]+)")
    for rule, groups in ((by_share, 3), (by_number, 9)):
        held = rule.choose(keys, 0)
        speakers = {key.split("-")[0] for key in held}
        assert len(speakers) == groups and held == {key for key in keys if key.split("-")[0] in speakers}
        assert rule.choose(list(reversed(keys)), 0) == held != rule.choose(keys, 1)


def test_the_choice_hardly_changes_when_data_is_added():
    keys = [f"u{i}" for i in range(1000)]
    before, after = Holdout(fraction=0.1).choose(keys[:950], 0), Holdout(fraction=0.1).choose(keys, 0)
    assert len(before) == 95 and len(after) == 100 and len(before & after) > 85


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"fraction": 1.0}, "below 1"),
        ({}, "give one of"),
        ({"fraction": 0.1, "groups": 2}, "give one of"),
        ({"groups": 2}, "--group REGEX"), ({"fraction": 0.1, "pattern": "s."}, "captures nothing"),
        ({"fraction": 0.1, "pattern": "("}, "no regular expression"),
        ({"keys": ("a",), "pattern": "(.)"}, "contradict"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        Holdout(**rule)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Holdout(keys=("a1", "zz")), "'zz'"), (Holdout(keys=("a1", "a2", "b1")), "3 of 3"),
        (Holdout(groups=2, pattern="^(.)"), "none would be left"),
        (Holdout(fraction=0.1, pattern="^(a)"), "'b1'"),
    ],
)
def test_rules_that_do_not_fit_the_data_are_refused(rule, message):
    with pytest.raises(DataError, match=message):
        rule.choose(["a1", "a2", "b1"], 0)


@given(st.integers(1, 60), st.integers(1, 20))
def test_runs_cut_everything_in_order(count, pieces):
    keys = [str(i) for i in range(count)]
    cut = runs(keys, pieces)
    assert [key for run in cut for key in run] == keys and all(cut) and len(cut) == min(count, pieces)


# -- a set of its own, with the statistics of another ---------------------------------------------------------------


def test_an_official_test_set_takes_statistics_and_names(comm, tmp_path):
    prepare_frames(comm, Given(utterances(20), names=list("abcd")), tmp_path, quiet=True)
    test = {f"t{key}": value for key, value in utterances(4, classes=2, seed=9).items()}
    options = {"into": "test", "stats_from": tmp_path / "train", "quiet": True}
    prepare_frames(comm, Given(test), tmp_path, **options)
    train, got = read_manifest(tmp_path / "train")["fields"], read_manifest(tmp_path / "test")["fields"]
    assert got["features"] == train["features"] and got["labels"]["names"] == list("abcd")
    assert same({k: stored(tmp_path / "test")[k] for k in test}, test)
    with pytest.raises(DataError, match="deltas is 1, there 0"):
        prepare_frames(comm, Given(test), tmp_path / "x", deltas=1, **options)
    with pytest.raises(DataError, match="are not those of"):
        prepare_frames(comm, Given(test, names=list("abcx")), tmp_path / "x", **options)
    with pytest.raises(DataError, match="label 5"):
        prepare_frames(comm, Given({"u": (np.ones((1, 3), np.float32), np.array([5]))}), tmp_path / "x", **options)
    with pytest.raises(DataError, match="3 values a frame, these features have 2"):
        prepare_frames(comm, Given({"u": (np.ones((1, 2), np.float32), np.array([0]))}), tmp_path / "y", **options)
    with pytest.raises(ValueError, match="--set"):
        prepare_frames(comm, Given(test), tmp_path, into="a/b", quiet=True)


# -- what is refused ------------------------------------------------------------------------------------------------

GOOD = np.ones((4, 3), np.float32)
NAN = GOOD.copy()
NAN[2, 1] = np.nan
INFINITE = GOOD.copy()
INFINITE[3, 0] = -np.inf


@pytest.mark.parametrize(
    ("features", "labels", "names", "message"),
    [
        (NAN, [0] * 4, None, "'bad' holds NaN or infinity, first at frame 2 of 4"),
        (INFINITE, [0] * 4, None, "first at frame 3"),
        (GOOD[:0], [], None, "'bad' is empty"),
        (GOOD[:, :2], [0] * 4, None, r"'bad' has \(2,\) values a frame, expected \(3,\)"),
        (GOOD, [0, 1, 2], None, "'bad' has 4 feature frames and 3 labels"),
        (GOOD, [0, 0, -1, 0], None, "'bad' has label -1 at frame 2"),
        (GOOD, [0, 1, 2, 4], list("abcd"), "'bad' has label 4 at frame 3, expected 0 to 3"),
        (GOOD, [0, 1, 2, 10**9], None, "--classes"),
    ],
)
def test_what_cannot_be_trained_on_names_the_utterance(comm, tmp_path, features, labels, names, message):
    made = {**utterances(), "bad": (features, np.array(labels, np.int64))}
    with pytest.raises(DataError, match=message):
        prepare_frames(comm, Given(made, names=names), tmp_path, validation=ALL, shards=3, quiet=True)
    assert not list(tmp_path.rglob("dataset.json"))


def test_repeated_keys_and_no_utterances_are_refused(comm, tmp_path):
    with pytest.raises(DataError, match="'s1-u01' appears twice"):
        prepare_frames(comm, Given(utterances(), order=["s1-u01", "s0-u00", "s1-u01"]), tmp_path, quiet=True)
    with pytest.raises(DataError, match="no utterances"):
        prepare_frames(comm, Given({}), tmp_path, quiet=True)
    with pytest.raises(DataError, match="none would be left"):
        prepare_frames(comm, Given(utterances(1)), tmp_path, quiet=True)
    with pytest.raises(ValueError, match="--shards 0"):
        prepare_frames(comm, Given(utterances()), tmp_path, shards=0, quiet=True)
    assert not list(tmp_path.iterdir())


# -- what is remembered ---------------------------------------------------------------------------------------------


def test_an_interrupted_preparation_is_continued(comm, tmp_path):
    made = utterances(20)
    prepare_frames(comm, Given(made), tmp_path / "straight", quiet=True)

    class Stopping(Given):
        left = 13

        def load(self, key):
            self.left -= 1
            if not self.left:
                raise OSError("the disk is gone")
            return super().load(key)

    with pytest.raises(OSError, match="the disk is gone"):
        prepare_frames(comm, Stopping(made), tmp_path / "out", quiet=True)
    done = list((tmp_path / "out").rglob("done-*.json"))
    assert len(done) >= 3 and not list((tmp_path / "out").rglob("dataset.json"))
    shard = tmp_path / "out/train/features-00000-of-00008.h5"
    shard.write_bytes(shard.read_bytes()[:-1])  # a shard that was damaged meanwhile is written again
    with pytest.raises(DataError, match=r"unfinished preparation made with other options: deltas was 0, is 1"):
        prepare_frames(comm, Given(made), tmp_path / "out", deltas=1, quiet=True)
    report = prepare_frames(comm, Given(made), tmp_path / "out", quiet=True)
    assert report["state"] == "continued" and report["resumed"] == len(done) - 1
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


def test_a_finished_preparation_is_left_alone(comm, tmp_path):
    made = utterances(20)
    first = prepare_frames(comm, Given(made), tmp_path, quiet=True)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    again = prepare_frames(comm, Given(made), tmp_path, quiet=True)
    assert (first["state"], again["state"]) == ("new", "finished") and again["sets"] == first["sets"]
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(DataError, match=r"seed was 0, is 1.*--overwrite"):
        prepare_frames(comm, Given(made), tmp_path, seed=1, quiet=True)
    with pytest.raises(DataError, match="other data"):
        prepare_frames(comm, Given(utterances(21)), tmp_path, quiet=True)
    prepare_frames(comm, Given(made), tmp_path, shards=2, overwrite=True, quiet=True)
    assert len(list((tmp_path / "train").iterdir())) == 5  # nothing of the eight shards is left


def test_strange_files_are_never_touched(comm, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"thesis.tex"):
            prepare_frames(comm, Given(utterances()), tmp_path, overwrite=overwrite, quiet=True)
    assert (tmp_path / "train" / "thesis.tex").read_text() == "precious"


def test_json_of_the_manifest_is_readable_by_anyone(comm, tmp_path):
    prepare_frames(comm, Given(utterances()), tmp_path, quiet=True)
    text = (tmp_path / "train/dataset.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

"""`trireme folds`: every fold trained and measured once, kept, resumed, and joined."""

from __future__ import annotations

import json
import shutil
import statistics

import pytest
from test_sentences import RECIPE, write_sentences

from collectives.comm import Comm
from hpc.folds import find_folds, seconds_an_epoch
from hpc.prepare.sentences import prepare_sentences
from hpc.shards import DataError, sha256_of

FOLDS = 3


@pytest.fixture
def recipe(tmp_path):
    write_sentences(tmp_path / "all", 120)
    prepare_sentences(Comm(), tmp_path / "all", tmp_path / "data", folds=FOLDS, quiet=True)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=tmp_path).replace("epochs = 3", "epochs = 2"))
    return tmp_path / "recipe.toml"


def read(folder):
    return json.loads((folder / "run/folds.json").read_text())


def test_every_fold_is_trained_measured_and_joined(trireme, recipe, tmp_path):
    done = trireme("folds", recipe, tmp_path / "data", "task.encoder=cnn", ranks=2)
    result = read(tmp_path)
    assert [fold["fold"] for fold in result["folds"]] == ["fold-00", "fold-01", "fold-02"]
    for fold in result["folds"]:
        run = tmp_path / "run" / fold["fold"]
        assert fold["sha256"] == sha256_of(run / "model.safetensors") and fold["epochs"] == 2 and fold["epoch_s"] > 0
        measured = json.loads(trireme("evaluate", run, tmp_path / "data" / fold["fold"] / "test", "--json").stdout)
        assert fold["test"] == {k: measured[k] for k in ("loss", "error")} | {"accuracy": 1 - measured["error"]}
        assert {"error", "loss"} <= fold["validation"].keys()
    errors = [fold["test"]["error"] for fold in result["folds"]]
    assert result["mean"]["error"] == statistics.fmean(errors)
    assert result["deviation"]["error"] == pytest.approx(statistics.stdev(errors))
    assert all(word in done.stdout for word in ("fold-02", "accuracy", "mean", "deviation"))

    shutil.rmtree(tmp_path / "run/fold-01")  # as if it had never been trained
    (tmp_path / "run/fold-02/success").unlink()  # as if it had been killed before its end
    before = {name: (tmp_path / f"run/{name}/success").stat().st_mtime_ns for name in ("fold-00",)}
    trireme("folds", recipe, tmp_path / "data", "task.encoder=cnn")
    again = read(tmp_path)
    assert [fold["sha256"] for fold in again["folds"]] == [fold["sha256"] for fold in result["folds"]]
    assert again["mean"]["error"] == result["mean"]["error"]
    assert (tmp_path / "run/fold-00/success").stat().st_mtime_ns == before["fold-00"]


def test_some_folds_at_a_time_join_what_is_there(trireme, recipe, tmp_path):
    run = f"run={tmp_path / 'run'}"
    trireme("folds", "--only", "2", recipe, tmp_path / "data", run, "task.encoder=cnn", "schedule.epochs=1")
    assert [fold["fold"] for fold in read(tmp_path)["folds"]] == ["fold-02"]
    assert read(tmp_path)["deviation"]["error"] is None
    trireme("folds", "--only", "0,2", recipe, tmp_path / "data", run, "task.encoder=cnn", "schedule.epochs=1")
    assert [fold["fold"] for fold in read(tmp_path)["folds"]] == ["fold-00", "fold-02"]
    other = trireme("folds", "--only", "0", recipe, tmp_path / "data", run, "schedule.epochs=1", code=1)
    assert "holds a run of another recipe" in other.stderr and "Traceback" not in other.stderr


def test_folds_that_are_not_there_are_refused(trireme, recipe, tmp_path):
    with pytest.raises(DataError, match="holds no folds"):
        find_folds(tmp_path)
    with pytest.raises(ValueError, match=r"--only 1,7: '7' is no fold; .* has 0 to 2"):
        find_folds(tmp_path / "data", "1,7")
    (tmp_path / "data/fold-01/test/dataset.json").unlink()
    done = trireme("folds", recipe, tmp_path / "data", ranks=2, code=1)
    assert done.stderr.count("has no finished data set 'test'") == 1 and not (tmp_path / "run").exists()


def test_seconds_an_epoch_leave_out_validation_and_saving():
    def record(event, step, epoch=0.0, seconds=0.0, validate=0.0):
        own = {"validate": validate, "checkpoint": 1.0}
        return {"event": event, "step": step, "epoch": epoch, "seconds": seconds, "by_rank": [own]}

    records = [
        record("start", 0), record("train", 5, 0.5, 4.0), record("train", 10, 1.0, 14.0, 8.0),
        record("start", 10), record("train", 15, 1.5, 99.0), record("train", 20, 2.0, 6.0),
    ]
    assert seconds_an_epoch(records) == statistics.median([6.0, 10.0, 10.0])
    assert seconds_an_epoch(records[:1]) is None

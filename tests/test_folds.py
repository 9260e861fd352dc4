"""`trireme folds`: every fold trained and measured once, kept, resumed, and joined."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
from importlib import import_module

import pytest
import torch
from test_sentences import RECIPE, write_sentences

from collectives.comm import Comm
from hpc.__main__ import COMMANDS, build_parser
from hpc.files import sha256_of
from hpc.folds import find_folds, seconds_an_epoch
from hpc.prepare.sentences import prepare_sentences
from hpc.run import RunError
from hpc.runtime import STOP_SIGNALS
from hpc.shards import DataError


@pytest.fixture
def recipe(tmp_path):
    write_sentences(tmp_path / "all", 80)
    prepare_sentences(Comm(), tmp_path / "all", tmp_path / "data", folds=3, quiet=True)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=tmp_path).replace("epochs = 3", "epochs = 1"))
    return tmp_path / "recipe.toml"


@pytest.fixture
def here(capsys):
    """Runs a command in this process and returns what it printed; what it sets for the process is put back."""
    caught = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    threads = torch.get_num_threads()

    def run(*words):
        capsys.readouterr()
        arguments = build_parser(words[0]).parse_args(list(map(str, words)))
        assert import_module(COMMANDS[words[0]].module).run(arguments, Comm()) == 0
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)
    for number, handler in caught.items():
        signal.signal(number, handler)


def read(folder):
    return json.loads((folder / "run/folds.json").read_text())


def test_every_fold_is_trained_measured_and_joined(trireme, here, recipe, tmp_path):
    done = trireme("folds", recipe, tmp_path / "data", "task.encoder=cnn", ranks=2)
    result = read(tmp_path)
    assert "fold-01, 2 of 3\n" in done.stderr
    accuracy = result["folds"][1]["test"]["accuracy"]
    assert f"fold-01: test error {1 - accuracy:.2%}" in done.stderr
    assert [fold["fold"] for fold in result["folds"]] == ["fold-00", "fold-01", "fold-02"]
    for fold in result["folds"]:
        run = tmp_path / "run" / fold["fold"]
        assert fold["sha256"] == sha256_of(run / "model.safetensors") and fold["epochs"] == 1 and fold["epoch_s"] > 0
        assert fold["best_epoch"] == 1
        measured = json.loads(here("evaluate", run, tmp_path / "data" / fold["fold"] / "test", "--json"))
        assert fold["test"] == {k: measured[k] for k in ("loss", "error")} | {"accuracy": 1 - measured["error"]}
        assert {"error", "loss"} <= fold["validation"].keys()
    errors = [fold["test"]["error"] for fold in result["folds"]]
    assert result["mean"]["error"] == statistics.fmean(errors)
    assert result["deviation"]["error"] == pytest.approx(statistics.stdev(errors))
    assert all(word in done.stdout for word in ("fold-02", "accuracy", "mean", "deviation"))

    shutil.rmtree(tmp_path / "run/fold-01")  # as if it had never been trained
    (tmp_path / "run/fold-02/success").unlink()  # as if it had been killed before its end
    before = (tmp_path / "run/fold-00/success").stat().st_mtime_ns
    here("folds", recipe, tmp_path / "data", "task.encoder=cnn")
    again = read(tmp_path)
    assert [fold["sha256"] for fold in again["folds"]] == [fold["sha256"] for fold in result["folds"]]
    assert again["mean"]["error"] == result["mean"]["error"]
    assert (tmp_path / "run/fold-00/success").stat().st_mtime_ns == before


def test_some_folds_at_a_time_join_what_is_there(here, recipe, tmp_path):
    here("folds", "--only", "2", recipe, tmp_path / "data", "task.encoder=cnn")
    assert [fold["fold"] for fold in read(tmp_path)["folds"]] == ["fold-02"]
    assert read(tmp_path)["deviation"]["error"] is None
    here("folds", "--only", "0,2", recipe, tmp_path / "data", "task.encoder=cnn")
    assert [fold["fold"] for fold in read(tmp_path)["folds"]] == ["fold-00", "fold-02"]
    with pytest.raises(RunError, match="holds a run of another recipe"):
        here("folds", "--only", "0", recipe, tmp_path / "data")


def test_without_validation_no_epoch_is_the_best(here, recipe, tmp_path):
    prepare_sentences(Comm(), tmp_path / "all", tmp_path / "plain", folds=2, validation=0.0, quiet=True)
    said = here("folds", "--only", "1", recipe, tmp_path / "plain", "task.encoder=cnn")
    (fold,) = read(tmp_path)["folds"]
    assert fold["best_epoch"] is None and "validation" not in fold and fold["test"]["error"] >= 0
    row = next(line for line in said.splitlines() if "fold-01 " in line)
    assert "–" in row and "-0." not in row


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

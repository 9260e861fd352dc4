"""evaluate, predict, report, compare on a real run; tasks and strategies of other packages; help that explains."""

import json
import subprocess
import sys
import textwrap

import h5py
import kaldiio
import numpy as np
import pytest
import torch
from material import CLASSES, write_recipe
from torch.nn import functional

from hpc.shards import Dataset


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder)
    subprocess.run([sys.executable, "-m", "hpc", "train", recipe], check=True, capture_output=True)
    return folder


def metrics(trireme, folder, ranks):
    done = trireme("evaluate", folder / "run", folder / "validation", "--json", ranks=ranks)
    return json.loads(done.stdout)


def test_evaluate_gives_the_same_numbers_on_any_ranks_and_those_of_training(trireme, finished):
    one, three = metrics(trireme, finished, 1), metrics(trireme, finished, 3)
    assert one == three
    assert one["loss"] == json.loads((finished / "run/success").read_text())["best"]["loss"]
    table = trireme("evaluate", finished / "run", finished / "validation").stdout
    assert "frame_error" in table and "majority" in table


@pytest.mark.parametrize("ranks", [1, 2])
def test_predict_writes_scaled_log_likelihoods_for_kaldi(trireme, finished, tmp_path, ranks):
    common = ("predict", finished / "run", finished / "validation")
    trireme(*common, "--to", "ark", "--priors", "--out", tmp_path / "scaled", ranks=ranks)
    trireme(*common, "--to", "ark", "--out", tmp_path / "plain", ranks=ranks)
    (tmp_path / "h5").mkdir()
    for mine in ("predictions-mine.h5", "predictions.txt"):
        (tmp_path / "h5" / mine).write_text("precious")
    (tmp_path / "h5/predictions-00007.h5").write_text("of an earlier prediction by more ranks")
    trireme(*common, "--to", "ark", "--out", tmp_path / "h5")
    trireme(*common, "--to", "h5", "--out", tmp_path / "h5", ranks=ranks)
    left = {p.name for p in (tmp_path / "h5").iterdir()}
    assert {"predictions-mine.h5", "predictions.txt", "predictions.scp", "predictions-00000.ark"} <= left
    assert "predictions-00007.h5" not in left
    (tmp_path / "h5/predictions-mine.h5").unlink()
    data = Dataset(finished / "validation")
    keys = data.keys()
    scaled = kaldiio.load_scp(str(tmp_path / "scaled/predictions.scp"))
    plain = kaldiio.load_scp(str(tmp_path / "plain/predictions.scp"))
    assert set(scaled) == set(plain) == set(keys)
    counts = np.array(json.loads((finished / "run/data.json").read_text())["fields"]["labels"]["counts"])
    for i, key in enumerate(keys):
        assert plain[key].shape == (data.starts[i + 1] - data.starts[i], CLASSES)
        np.testing.assert_allclose(np.exp(plain[key]).sum(1), 1, rtol=1e-4)
        np.testing.assert_allclose(scaled[key], plain[key] - np.log(counts / counts.sum()), rtol=1e-4, atol=1e-5)
    found = {}
    for path in (tmp_path / "h5").glob("*.h5"):
        with h5py.File(path) as file:
            starts = file["predictions/starts"][:]
            for i, key in enumerate(file["keys"][:]):
                found[key.decode()] = file["predictions/values"][starts[i] : starts[i + 1]]
    assert set(found) == set(plain) and all(np.array_equal(found[k], plain[k]) for k in found)
    labels = np.empty(data.rows, np.int32)
    data.read("labels", 0, data.rows, labels)
    joined = torch.from_numpy(np.concatenate([plain[key] for key in keys]))
    loss = functional.nll_loss(joined, torch.from_numpy(labels).long())
    assert float(loss) == pytest.approx(metrics(trireme, finished, 1)["loss"], rel=1e-5)


def test_report_and_compare_of_a_real_run(trireme, finished, tmp_path):
    trireme("report", finished / "run")
    assert (finished / "run/report.png").stat().st_size > 10_000
    page = (finished / "run/report.html").read_text()
    assert "finished" in page.lower() and "frame" in page
    trireme("train", finished / "recipe.toml", f"run={tmp_path / 'other'}", "seed=8", ranks=2)
    told = trireme("compare", finished / "run", tmp_path / "other", cwd=tmp_path).stdout
    assert "seed" in told


def test_the_run_folder_is_the_whole_record(finished):
    names = {p.name for p in (finished / "run").iterdir()}
    assert names >= {"recipe.toml", "data.json", "metrics.jsonl", "checkpoints", "logs", "model.safetensors", "success"}
    events = [json.loads(line)["event"] for line in (finished / "run/metrics.jsonl").read_text().splitlines()]
    assert events[0] == "start" and events[-1] == "end" and {"train", "validate", "checkpoint"} <= set(events)
    best = {p.name for p in (finished / "run/checkpoints").iterdir()}
    assert len(best) <= 3, "two last ones and the best"


OUTSIDE = """
import torch
from models.frames import Frames
from collectives.allreduce import AllReduce

class Sign(Frames):
    '''Frames with a width of its own.'''
    def __init__(self, data, *, units: int = 7):
        super().__init__(data, context=0, layers=1, width=units)

class Timid(AllReduce):
    def __init__(self, comm, flat, rule, batch, *, courage: float = 0.5):
        super().__init__(comm, flat, rule, batch)
        self.courage = courage

    def _scale(self, grad):
        return self.courage * super()._scale(grad)
"""


def test_tasks_and_strategies_of_another_package(trireme, tmp_path):
    package = tmp_path / "site"
    info = package / "outside-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "outside.py").write_text(OUTSIDE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(textwrap.dedent("""\
        [trireme.tasks]
        sign = outside:Sign
        [trireme.strategies]
        timid = outside:Timid
    """))
    recipe = write_recipe(tmp_path)
    changes = ("task={name='sign', units=5}", "strategy={name='timid', courage=0.25}")
    env = {"PYTHONPATH": str(package)}
    digests = {
        k: trireme("train", recipe, f"run={tmp_path / f'run{k}'}", *changes, ranks=k, env=env).stdout.split()[-1]
        for k in (1, 2)
    }
    assert digests[1] == digests[2]
    wrong = trireme("train", recipe, "task={name='sign', unit=5}", env=env, code=1).stderr
    assert "did you mean 'units'" in wrong
    assert "not registered" in trireme("train", recipe, *changes, code=1).stderr


COMMANDS = [
    [], ["train"], ["prepare"], ["prepare", "frames"], ["evaluate"], ["predict"], ["report"], ["compare"], ["doctor"],
    ["bench"], ["bench", "allreduce"], ["trace"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda w: " ".join(w) or "trireme")
def test_every_command_explains_itself(trireme, words):
    text = trireme(*words, "--help").stdout
    assert "usage: trireme" in text
    if words != ["prepare"]:
        assert "examples" in text.lower() or "example" in text.lower()

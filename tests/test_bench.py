"""`trireme bench` on tiny sizes: every line is JSON of the documented shape, and its numbers agree with each other."""

import json
import subprocess
import sys

import numpy as np
import pytest

from hpc import bench
from hpc.bench_crew import Crew, mpiexec
from hpc.bench_data import PlainReading
from hpc.bench_train import Side, sides_of
from hpc.shards import Dataset

TINY = ["--layers", "1", "--width", "16", "--classes", "5", "--batch", "32", "--steps", "2", "--repeat", "2"]


def launched(*words, fails=False):
    """The records of `trireme bench ...` in a process of its own, and what it said."""
    command = [sys.executable, "-m", "hpc", "bench", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def of(records, what):
    found = [record for record in records if record["what"] == what]
    assert len(found) == 1, [record["what"] for record in records]
    return found[0]


def check_spread(record, prefix=""):
    low, high = record[f"{prefix}quartiles_s"]
    assert 0 < record[f"{prefix}min_s"] <= low <= record[f"{prefix}median_s"] <= high
    assert record[f"{prefix}repetitions"] > 0


@pytest.fixture(scope="module")
def train_records(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out.jsonl"
    out.write_text('{"kept": true}\n')
    records, _ = launched("train", *TINY, "--ranks", "1,2", "--precision", "bfloat16", "--out", out)
    kept, *written = [json.loads(line) for line in out.read_text().splitlines()]
    assert kept == {"kept": True} and written == records
    return records


def test_every_side_of_the_training_step_is_measured(train_records):
    assert train_records[0]["what"] == "machine" and train_records[0]["versions"]["torch"]
    assert all(record["bench"] == "train" for record in train_records)
    steps = [record for record in train_records if record["what"] == "step"]
    sides = [(s["impl"], s["ranks"], s.get("splits")) for s in steps]
    assert sides == [
        ("trireme", 1, 1), ("torch loop", 1, None), ("trireme", 1, 2), ("trireme", 2, 2), ("torch loop", 2, None),
    ]
    for step in steps:
        check_spread(step)
        assert step["repetitions"] == 4 and step["batch"] == 32 and step["precision"] == "bfloat16"
        assert step["cpu_s"] > 0
        assert step["parameters"] == 440 * 16 + 16 + 16 * 5 + 5
        assert step["frames_per_s"] == pytest.approx(32 / step["median_s"], rel=1e-3)
        if step["impl"] == "trireme":
            assert min(step[f"{phase}_s"] for phase in ("forward", "backward", "exchange")) > 0 and step["read_s"] >= 0


def test_quotients_of_the_training_step(train_records):
    against = of(train_records, "step against torch loop")
    assert against["pairs"] == 2
    assert min(against[key] for key in ("ratio", "ratio_of_pairs", "cpu_ratio", "cpu_ratio_of_pairs")) > 0
    scaled = of(train_records, "2 ranks against 1")
    assert scaled["splits"] == 2 and min(scaled[key] for key in ("speedup", "limit_speedup")) > 0
    assert not [r for r in train_records if r["what"] == "1 ranks against 1"]


def test_data(tmp_path):
    bench.make_data(tmp_path / "set", 30_000, classes=7, shards=3)
    words = ("--split-frames", 6000, "--batch", 500, "--repeat", 3, "--steps", 2)
    records, _ = launched("data", "--data", tmp_path / "set", *words)
    assert [r["what"] for r in records] == ["machine", "load split", "shuffle and stack", "waiting", "waiting"]
    load = of(records, "load split")
    assert load["rows"] == 6000 and load["bytes"] == 6000 * (40 * 4 + 4) and load["data_rows"] >= 30_000
    for prefix, speed in (("", "gbps"), ("limit_", "limit_gbps")):
        check_spread(load, prefix)
        assert load[speed] == pytest.approx(load["bytes"] / load[f"{prefix}median_s"] / 1e9, rel=1e-3)
    assert load["ratio"] == pytest.approx(load["gbps"] / load["limit_gbps"], rel=1e-3)
    assert min(load[f"cpu_ratio{kind}"] for kind in ("", "_of_pairs", "_of_minima")) > 0
    stack = of(records, "shuffle and stack")
    check_spread(stack)
    assert stack["bytes"] == 500 * 11 * 40 * 4 and stack["shuffle_s_per_batch"] > 0
    for waiting in records[-2:]:
        assert 0 < waiting["share"] < 1 and waiting["repetitions"] == 2
        assert waiting["read_s"] >= waiting["longest_read_s"] > 0


def test_generated_data_is_a_data_set(tmp_path):
    bench.make_data(tmp_path, 5000, width=6, classes=4, shards=2)
    dataset = Dataset(tmp_path)
    for shard in range(2):
        dataset.verify(shard)
    assert 5000 <= dataset.rows == dataset.manifest["frames"] < 5600
    lengths = np.diff(dataset.starts)
    assert lengths.min() >= 200 and lengths.max() <= 600
    labels = np.empty(dataset.rows, np.int32)
    dataset.read("labels", 0, dataset.rows, labels)
    assert set(labels) == {0, 1, 2, 3}
    dataset.close()


def test_plain_reading_reads_the_same_rows_across_shards(tmp_path):
    bench.make_data(tmp_path, 4000, width=5, classes=9, shards=3)
    dataset = Dataset(tmp_path)
    low, high = int(dataset.shard_rows[1]) - 70, int(dataset.shard_rows[2]) + 31
    blocks = PlainReading(dataset)(low, high)
    for field, shape in (("features", (high - low, 5)), ("labels", (high - low,))):
        expected = np.empty(shape, dataset.field(field)["dtype"])
        dataset.read(field, low, high, expected)
        found = np.concatenate([block for block in blocks if block.ndim == len(shape)])
        np.testing.assert_array_equal(found, expected)
    dataset.close()


def test_sides_share_the_splits_of_the_largest_number_of_ranks():
    assert sides_of([1]) == [Side(1, 1), Side(1, 0)]
    assert [s for s in sides_of([2, 4]) if s.splits][1:] == [Side(1, 4), Side(2, 4), Side(4, 4)]


def test_quotients():
    found = bench.quotient([2.0, 4.0, 60.0], [1.0, 1.0, 6.0])
    assert found == {"ratio": 4.0, "ratio_of_pairs": 4.0, "ratio_of_minima": 2.0}


@pytest.mark.parametrize("words, said", [
    (["train", "--ranks", "2,3"], "divide the largest"),
    (["train", "--ranks", "1,2", "--batch", "33"], "multiple of 2 ranks"),
    (["data", "--gb", "0"], "not above 0"),
    (["data", "--data", "nowhere"], "not a data set"),
])
def test_mistakes_are_explained(words, said):
    records, errors = launched(*words, fails=True)
    assert said in errors and not [r for r in records if r["what"] != "machine"]


def test_workers_that_end_by_themselves_are_reported(tmp_path):
    spec = {"recipe": {"run": str(tmp_path / "run"), "data": {"train": str(tmp_path)}, "task": {"name": "frames"}}}
    with bench.scratch() as folder, pytest.raises(OSError, match="'broken' ended with exit code"):
        Crew("broken", 1, "hpc.bench_worker", spec, folder=folder)


def test_help_shows_examples_and_a_launcher_is_found():
    assert mpiexec()
    for words in (["--help"], ["data", "--help"], ["train", "--help"]):
        command = [sys.executable, "-m", "hpc", "bench", *words]
        assert "examples:" in subprocess.run(command, capture_output=True, text=True, check=True).stdout

"""Whole trainings over several hosts: the same model as on one, whatever the algorithm and however ranks are spread."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from material import write_recipe

from hpc.files import sha256_of

QUICK = ["schedule.epochs=1", "schedule.min_epochs=1"]
LAYOUTS = {4: ([2, 2], [2, 1, 1]), 12: ([1, 1, 1],)}
ALGORITHMS = ("owners", "everyone")


@pytest.fixture
def on_hosts(hosts, plain_environment):
    """Trains on pretend hosts: on_hosts(ranks by host, recipe, overrides) -> what it said."""

    def run(ranks, recipe, *overrides):
        words = [sys.executable, "-m", "mpi4py", "-m", "hpc", "train", str(recipe), *overrides]
        with hosts(len(ranks)) as world:
            command, variables = world.mpiexec(ranks, words)
            done = subprocess.run(
                command, env=plain_environment | variables, capture_output=True, text=True, timeout=120
            )
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


@pytest.mark.parametrize("splits", LAYOUTS)
def test_the_model_is_the_same_on_any_hosts(tmp_path, trireme, on_hosts, splits):
    recipe = write_recipe(tmp_path, splits=splits)
    trireme("train", recipe, f"run={tmp_path / 'one'}", *QUICK)
    alone = sha256_of(tmp_path / "one/model.safetensors")
    for layout in LAYOUTS[splits]:
        for algorithm in ALGORITHMS:
            run = tmp_path / f"{layout}-{algorithm}"
            said = on_hosts(layout, recipe, f"run={run}", f"strategy.algorithm={algorithm}",
                            "strategy.bucket_mib=0.004", *QUICK)
            assert sha256_of(run / "model.safetensors") == alone, (layout, algorithm)
            assert f"exchange: {algorithm}" in said


def test_1_bit_sgd_learns_the_same_on_any_hosts(tmp_path, trireme, on_hosts):
    recipe = write_recipe(tmp_path, splits=4)
    chosen = 'strategy={name="onebit", double_buffering=true, cold_start=300}'
    trireme("train", recipe, f"run={tmp_path / 'one'}", chosen, *QUICK)
    for layout in ([1, 1], [2, 1, 1]):
        run = tmp_path / str(layout)
        said = on_hosts(layout, recipe, f"run={run}", chosen, *QUICK)
        assert sha256_of(run / "model.safetensors") == sha256_of(tmp_path / "one/model.safetensors"), layout
        assert "times fewer than float32" in said


def test_what_is_settled_is_measured_once_and_kept_in_the_run_folder(tmp_path, on_hosts):
    recipe = write_recipe(tmp_path, splits=4)
    said = on_hosts([1, 1], recipe, *QUICK)
    kept = json.loads((tmp_path / "run/exchange.json").read_text())
    assert kept["where"]["islands"] == [1, 1] and set(kept["seconds"]) == {"owners 1 MiB", "everyone 1 MiB"}
    assert "exchange: " in said and "measured" in said
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    start = next(r for r in records if r["event"] == "start")
    assert start["hosts"] == ["vh0", "vh1"]

"""Whole training runs on a GPU, through the command: every task learns there what it learns on a CPU."""

from __future__ import annotations

import json

import material
import pytest
import test_lm
import test_sentences
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA GPU here", allow_module_level=True)


def frames(folder, *changes):
    return material.write_recipe(folder), changes


def sentences(folder, *changes):
    return test_sentences.write_recipe(folder), changes


def words(folder, *changes):
    test_lm.write_text(folder)
    recipe = folder / "recipe.toml"
    recipe.write_text(test_lm.RECIPE.format(data=folder, kind="sru"))
    return recipe, changes


ONEBIT = 'strategy={name="onebit", cold_start=600, double_buffering=true}'
LSTM = 'task={name="frames", network="lstm", layers=2, width=16, context=1, '
RNN = 'task={name="frames", network="sru", bidirectional=true, layers=2, width=16}'


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("prepare", "changes"), [
    (frames, ()), (frames, (RNN, "data.batch=8", "optim.learning_rate=0.1")), (frames, (RNN.replace("sru", "lstm"),
     "data.batch=8", "optim.learning_rate=0.1")), (words, ()), (sentences, ()), (sentences, ("task.encoder=cnn",)),
    (frames, (ONEBIT,)), (frames, (ONEBIT, 'optim={name="adagrad", learning_rate=0.02, momentum=0.5}')),
    (frames, ('strategy={name="bmuf", block_steps=4, local_state="averaged"}',)),
    (frames, ('strategy={name="elastic", block_steps=4}',)),
    (frames, ('strategy={name="master_slave", master_learning_rate=1.0}',)),
    (frames, (LSTM + 'bptt="chunks", chunk="5-12+5", bidirectional=true}', "data.batch=16", "optim.learning_rate=0.1")),
    (frames, (LSTM + 'bptt="truncated", chunk="8", delay=2}', "data.batch=64", "optim.learning_rate=0.1")),
    (frames, (LSTM + 'bptt="truncated", chunk="8+4", bidirectional=true}', "data.batch=64", "optim.learning_rate=0.1")),
], ids=["dnn", "sru", "lstm", "words", "sentences", "cnn", "1-bit", "1-bit, AdaGrad", "bmuf", "elastic", "slaves",
        "chunks", "truncated", "latency-controlled"])
def test_a_run_on_a_gpu_ends_near_that_on_the_cpu(trireme, tmp_path, prepare, changes, precision):
    recipe, changes = prepare(tmp_path, *changes)
    losses = {}
    for device in ("cpu", "cuda"):
        run = tmp_path / f"run-{device}"
        trireme("train", recipe, f"run={run}", f"device={device}", f"precision={precision}", *changes, ranks=2)
        losses[device] = json.loads((run / "success").read_text())["best"]
    (metric,) = losses["cpu"]
    assert losses["cuda"][metric] == pytest.approx(losses["cpu"][metric], rel=0.15, abs=0.05)

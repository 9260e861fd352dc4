"""The language model: its laws as a task, and through the command, at any number of ranks, killed and resumed."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import kill, train, train_on, wait_for_step

from collectives.comm import Comm
from hpc.build import make_task, registry
from hpc.config import load, options
from hpc.pieces import read_stream
from hpc.prepare.text import prepare_text
from hpc.records import read_records
from hpc.shards import Dataset
from models.lm import LanguageModel

KINDS = ["sru", "sru-later", "lstm", "gru", "qrnn"]
LANES = 4


def write_text(folder, words=4000, seed=0):
    """Two data sets of lines in which the next word follows from the last one, most of the time."""
    rng = np.random.default_rng(seed)
    text, word = [], 0
    for _ in range(words):
        word = (5 * word + 1 + 3 * int(rng.integers(8) == 0)) % 23
        text.append(f"w{word}" + ("\n" if word == 7 else " "))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "t.txt").write_text("".join(text) + "\n")
    prepare_text(Comm(), {"train": [folder / "t.txt"]}, folder, held={"validation": 0.1}, shards=3, quiet=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def data(folder):
    return Dataset(folder / "train", ("words",))


def make(data, length=70, **options):
    task = LanguageModel(data.manifest["fields"], **({"layers": 2, "width": 24, "steps": 10} | options))
    model = task.model()
    task.initialise(model, torch.Generator().manual_seed(0))
    piece = read_stream(data, [(lane * 150, lane * 150 + length) for lane in range(LANES)])
    task.check(piece)
    return task, model, piece


def cut(task, piece, steps):
    share = steps * LANES
    return [task.collate(piece, at, min(at + share, len(piece))) for at in range(0, len(piece), share)]


# -- a task's laws ----------------------------------------------------------------------------------------------------


def test_every_lane_reads_the_text_and_is_asked_for_the_next_word(data):
    task, _, piece = make(data)
    text = np.empty(data.rows, np.int32)
    data.read("words", 0, data.rows, text)
    batches = cut(task, piece, 33)
    assert [tuple(b.inputs.shape) for b in batches] == [(33, LANES), (33, LANES), (4, LANES)]
    for lane in range(LANES):
        inputs, targets = (torch.cat([b[i][:, lane] for b in batches]).numpy() for i in (0, 1))
        assert (inputs == text[lane * 150 : lane * 150 + 70]).all()
        assert (targets == text[lane * 150 + 1 : lane * 150 + 71]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sums_add_up_however_the_stream_is_cut(data, kind):
    task, model, piece = make(data, kind=kind, embedding=16, init_range=1.0)
    (whole,) = cut(task, piece, 70)
    with torch.no_grad():
        total, count, _ = task.loss(model, whole, None)
        for steps in (1, 7, 33, 35):
            carry, parts, words, sums = None, [], 0, 0.0
            for batch in cut(task, piece, steps):
                metrics, _ = task.metrics(model, batch, carry)
                part, n, carry = task.loss(model, batch, carry)
                parts.append(part)
                words += n
                sums += metrics["loss"][0]
            torch.testing.assert_close(sum(parts), total, rtol=1e-5, atol=1e-5)
            assert words == count == 70 * LANES and sums == pytest.approx(float(total), rel=1e-5)
        forgetful = sum(task.loss(model, batch, None)[0] for batch in cut(task, piece, 7))
    assert abs(float(forgetful - total)) > 1e-3 * float(total), "without the carry, something must be missing"


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_can_be_memorised_and_gradients_end_at_its_edge(data, kind):
    task, model, piece = make(data, kind=kind, width=64, embedding=32)
    first, second, *_ = cut(task, piece, 10)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(120):
        optimizer.zero_grad()
        _, _, carry = task.loss(model, first, None)
        total, count, after = task.loss(model, second, carry)
        (total / count).backward()
        optimizer.step()
    assert not any(part.requires_grad for part in (*carry, *after))
    assert float(total.detach()) / count < 0.1


def test_the_loss_is_the_targets_negative_log_probability(data):
    task, model, piece = make(data)
    batch = cut(task, piece, 35)[0]
    with torch.no_grad():
        logits, _ = model(batch.inputs)
        expected = torch.log_softmax(logits, 2).flatten(0, 1).gather(1, batch.targets.flatten()[:, None])
        sums, _ = task.metrics(model, batch, None)
    assert sums["loss"] == (pytest.approx(-float(expected.sum()), rel=1e-6), 35.0 * LANES)


def test_a_model_that_knows_nothing_is_as_perplexed_as_a_guess(data):
    task, model, piece = make(data)
    for parameter in model.parameters():
        parameter.data.zero_()
    total, count, _ = task.loss(model, cut(task, piece, 70)[0], None)
    words = data.field("words")["classes"]
    assert task.derived({"loss": float(total.detach()) / count})["perplexity"] == pytest.approx(words, rel=1e-4)
    assert math.isfinite(task.derived({"loss": 1e9})["perplexity"])


def test_a_number_that_is_no_word_is_named_with_its_place(data):
    task, _, piece = make(data)
    piece.fields["words"][piece.items[5] + 1] = 1000
    with pytest.raises(ValueError, match=r"'t.txt:\d+' holds word number 1000, the vocabulary has 0 to \d+"):
        task.check(piece)


# -- the model --------------------------------------------------------------------------------------------------------


def test_tied_embeddings_are_one_parameter_with_both_gradients(data):
    task, model, piece = make(data)
    words = data.field("words")["classes"]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert [shape for shape in shapes.values() if shape[0] == words] == [(words, 24), (words,)]
    task.loss(model, cut(task, piece, 70)[0], None)[0].backward()
    tied = model.embedding.grad.clone()
    apart, other, _ = make(data, tied=False)
    other.load_state_dict(model.state_dict() | {"output": model.embedding.detach()}, strict=True)
    apart.loss(other, cut(task, piece, 70)[0], None)[0].backward()
    assert min(float(other.embedding.grad.abs().sum()), float(other.output.grad.abs().sum())) > 0
    torch.testing.assert_close(tied, other.embedding.grad + other.output.grad)


def test_embeddings_of_another_width_are_brought_to_it(data):
    _, model, _ = make(data, embedding=10)
    assert tuple(model.project.weight.shape) == (10, 24) and model.output is None
    _, model, _ = make(data, embedding=10, tied=False)
    assert model.project is None and model.output.shape[1] == 24


def test_the_papers_sizes_are_reached():
    for layers, width in ((3, 1170), (6, 910)):  # table 3: 24 million parameters, a vocabulary of 10,000
        task = LanguageModel({"words": {"classes": 10000}}, layers=layers, width=width)
        assert sum(p.numel() for p in task.model().parameters()) == pytest.approx(24e6, rel=0.01)


@pytest.mark.parametrize("option", ["dropout_embedding", "dropout_output", "dropout", "variational"])
def test_every_dropout_drops_in_training_alone_and_by_the_global_seed(data, option):
    task, model, piece = make(data, **{option: 0.5})
    batch = cut(task, piece, 10)[0]

    def loss(seed):
        torch.manual_seed(seed)
        return float(task.loss(model, batch, None)[0].detach())

    assert loss(1) == loss(1) != loss(2)
    plain, bare, _ = make(data)
    bare.load_state_dict(model.state_dict())
    model.eval()
    assert loss(1) == loss(2) == float(plain.loss(bare, batch, None)[0].detach())


def test_initial_weights_have_their_spread_and_their_seed(data):
    task, model, _ = make(data, width=300, highway_bias=-3.0, forget_bias=2.0)
    assert float(model.embedding.detach().std()) == pytest.approx(1 / math.sqrt(300), rel=0.03)
    cell = model.recurrent.layers[1][0]
    assert cell.bias.tolist() == [2.0] * 300 + [-3.0] * 300
    _, again, _ = make(data, width=300, highway_bias=-3.0, forget_bias=2.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    task.initialise(again, torch.Generator().manual_seed(1))
    assert not torch.equal(model.embedding, again.embedding)
    _, narrow, _ = make(data, init_range=0.01, tied=False)
    assert all(0.009 < float(w.detach().abs().max()) <= 0.01 for w in (narrow.embedding, narrow.output))


@pytest.mark.parametrize("option", [{"activation": "relu"}, {"highway": "always"}, {"highway_bias": -1.0}])
def test_srus_own_options_are_refused_elsewhere(data, option):
    make(data, kind="sru", **option)
    with pytest.raises(ValueError, match=r"are SRU's, task\.kind is 'lstm'"):
        make(data, kind="lstm", **option)


def test_the_recipe_is_one():
    recipe = load(Path(__file__).parents[1] / "jobs/recipes/kjv_lm.toml", [], registry())
    task = LanguageModel({"words": {"classes": 10000}}, **options(recipe.task))
    assert recipe.data.batch == 32 * task.steps == 1120
    assert recipe.data.batch % (task.steps * recipe.splits) == 0, "lanes for every split"


# -- through the command ----------------------------------------------------------------------------------------------

RECIPE = """
run = "{data}/run"
seed = 3
splits = 4
[data]
train = "{data}/train"
validation = "{data}/validation"
batch = 56
split_frames = 100
[task]
name = "lm"
kind = "{kind}"
layers = 2
width = 24
embedding = 16
steps = 7
dropout_embedding = 0.1
dropout_output = 0.1
dropout = 0.1
variational = 0.1
[optim]
name = "adam"
learning_rate = 0.01
[strategy]
name = "allreduce"
clip_norm = 0.5
[schedule]
name = "newbob"
epochs = 3
min_epochs = 99
[checkpoint]
every = 560
[log]
every = 5
tensorboard = false
"""


def recipe_of(folder, kind="sru"):
    path = folder / f"{kind}.toml"
    path.write_text(RECIPE.format(data=folder, kind=kind))
    return path


def test_data_of_another_task_are_refused(folder):
    recipe = load(recipe_of(folder), [], registry())
    with pytest.raises(ValueError, match=r"needs field \['words'\].* has \['features', 'labels'\]"):
        make_task(recipe, {"features": {}, "labels": {}})
    with pytest.raises(ValueError, match=r"reads running text.*\['labels'\] of their own.*prepare text"):
        make_task(recipe, {"words": {"classes": 9}, "labels": {"classes": 2, "rows": "sequence"}})


def test_the_same_bytes_for_every_number_of_ranks(trireme, folder, tmp_path):
    recipe = recipe_of(folder)
    digests = train_on(trireme, recipe, (1, 2, 4), tmp_path)
    assert len(set(digests.values())) == 1, digests
    logs = [read_records(tmp_path / f"run{k}") for k in digests]
    losses = [[(r["step"], r["loss"]) for r in log if "loss" in r] for log in logs]
    assert all(log == losses[0] for log in losses) and len(losses[0]) > 10
    judged = [r for r in logs[0] if r["event"] == "validate"]
    assert judged[-1]["loss"] < 0.6 * math.log(25) and judged[-1]["perplexity"] == math.exp(judged[-1]["loss"])
    said = trireme("evaluate", tmp_path / "run4", folder / "validation").stdout
    assert "perplexity" in said


def test_killed_anywhere_and_resumed_with_other_ranks(trireme, start, folder, tmp_path):
    recipe = recipe_of(folder, "lstm")  # of two states a layer
    more = ("schedule.epochs=6",)
    reference = train(trireme, recipe, 1, tmp_path / "whole", *more)
    run = tmp_path / "killed"
    process = start("train", recipe, f"run={run}", *more, ranks=2)
    wait_for_step(run, random.randrange(5, 250), process)
    kill(process)
    assert train(trireme, recipe, 4, run, *more) == reference

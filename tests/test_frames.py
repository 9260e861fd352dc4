"""The laws of every task: empty edges, padding-free sums, gradients, and one batch can be memorised."""

import math

import pytest
import torch
from material import CLASSES, WIDTH, write_frames

from hpc.pieces import read_piece, read_sequences
from hpc.shards import Dataset
from models.frames import Frames


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Dataset(write_frames(tmp_path_factory.mktemp("frames") / "train", utterances=12, shards=2))


def initialised(task, seed):
    model = task.model()
    task.initialise(model, torch.Generator().manual_seed(seed))
    return model


def make(data, **options):
    task = Frames(data.manifest["fields"], **({"context": 2, "layers": 2, "width": 32} | options))
    return task, initialised(task, 0), read_piece(data, [(0, data.rows)], task.margin)


def test_one_batch_can_be_memorised(data):
    task, model, piece = make(data, width=128, activation="relu", init="he")
    batch = task.collate(piece, 0, 64)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        total, count, carry = task.loss(model, batch, None)
        (total / count).backward()
        optimizer.step()
    assert carry is None and task.metrics(model, batch, None)[0]["frame_error"] == (0.0, 64.0)


def test_sums_add_up_however_the_items_are_cut(data):
    task, model, piece = make(data)
    whole, count, _ = task.loss(model, task.collate(piece, 0, len(piece)), None)
    parts = [task.loss(model, task.collate(piece, a, min(a + 37, len(piece))), None) for a in range(0, len(piece), 37)]
    assert sum(c for _, c, _ in parts) == count == len(piece)
    torch.testing.assert_close(sum(t for t, _, _ in parts), whole)
    metrics, _ = task.metrics(model, task.collate(piece, 0, len(piece)), None)
    assert metrics["loss"][0] == pytest.approx(float(whole), rel=1e-5)


def test_a_model_that_knows_nothing_pays_the_entropy_of_a_guess(data):
    task, model, piece = make(data)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    total, count, _ = task.loss(model, task.collate(piece, 0, len(piece)), None)
    assert float(total) / count == pytest.approx(math.log(CLASSES), rel=1e-5)


def test_predictions_are_log_posteriors_over_normalised_features(data):
    task, model, piece = make(data)
    predicted = task.predict(model, task.collate(piece, 0, 20))
    assert predicted.shape == (20, CLASSES)
    torch.testing.assert_close(predicted.exp().sum(1), torch.ones(20))
    about = data.field("features")
    seen = []
    model.hidden.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.tensor(about["mean"]).expand(3, 5, WIDTH) + torch.tensor(about["std"]))
    torch.testing.assert_close(seen[0], torch.ones(3, 5 * WIDTH), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["glorot", "he", "uniform", "normal"])
def test_initialisations_have_their_spread_and_their_seed(data, init):
    task, model, _ = make(data, width=400, init=init, init_range=0.02)
    weight = model.hidden[2].weight
    wanted = {"glorot": math.sqrt(2 / 800), "he": math.sqrt(2 / 400), "uniform": 0.02 / math.sqrt(3), "normal": 0.02}
    assert float(weight.std()) == pytest.approx(wanted[init], rel=0.02)
    assert float(model.hidden[2].bias.abs().sum()) == 0
    again = initialised(task, 0)
    assert torch.equal(again.hidden[2].weight, weight)
    assert not torch.equal(initialised(task, 1).hidden[2].weight, weight)


def test_the_papers_sizes_are_reached(data):
    about = {
        "features": {"mean": [0.0] * 40, "std": [1.0] * 40}, "labels": {"classes": 9304},
    }
    model = Frames(about, context=5, layers=7, width=2048).model()
    assert sum(p.numel() for p in model.parameters()) == 440 * 2048 + 6 * 2048**2 + 7 * 2048 + 2048 * 9304 + 9304


def test_no_context_and_no_layers_is_a_linear_classifier(data):
    task, model, piece = make(data, context=0, layers=0)
    assert task.collate(piece, 0, 9).inputs.shape == (9, 1, WIDTH)
    assert [p.shape for p in model.parameters()] == [(CLASSES, WIDTH), (CLASSES,)]


def test_features_of_another_width_are_refused(data):
    task, _, piece = make(data)
    piece.fields["features"] = piece.fields["features"][:, :-1]
    with pytest.raises(ValueError, match=f"5 values a frame, the model takes {WIDTH}"):
        task.check(piece)


NETWORKS = ["sru", "sru-later", "lstm", "gru", "qrnn"]


def recurrent(data, network, **options):
    task = Frames(data.manifest["fields"], network=network, **({"context": 1, "layers": 2, "width": 8} | options))
    return task, initialised(task, 0).eval(), read_sequences(data, [(0, data.rows)])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_padding_and_batch_mates_change_nothing(data, network, bidirectional):
    task, model, piece = recurrent(data, network, bidirectional=bidirectional)
    together = task.predict(model, task.collate(piece, 0, len(piece)))
    alone = torch.cat([task.predict(model, task.collate(piece, i, i + 1)) for i in range(len(piece))])
    assert together.shape == (data.rows, CLASSES)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    sums, _ = task.metrics(model, task.collate(piece, 0, len(piece)), None)
    parts = [task.metrics(model, task.collate(piece, i, i + 1), None)[0] for i in range(len(piece))]
    assert sums["loss"] == pytest.approx([sum(p["loss"][k] for p in parts) for k in range(2)], rel=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_recurrent_layers_memorise_a_batch(data, network):
    task, model, piece = recurrent(data, network, layers=1, width=48)
    batch = task.collate(piece, 0, 3)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        task.loss(model, batch, None)[0].backward()
        optimizer.step()
    assert task.metrics(model, batch, None)[0]["frame_error"][0] == 0


def test_every_initialisation_reaches_every_parameter(data):
    for network in ("dnn", *NETWORKS):
        for init in ("glorot", "he", "uniform", "normal"):
            task = Frames(data.manifest["fields"], network=network, context=1, layers=2, width=8, init=init)
            one, same, other = (initialised(task, seed) for seed in (0, 0, 1))
            for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
                assert torch.equal(a, b), name
                assert a.ndim == 1 or not torch.equal(a, c), name


@pytest.mark.parametrize(("options", "said"), [
    ({"network": "sru", "activation": "sigmoid"}, "choose one of tanh, relu, identity"),
    ({"network": "lstm", "activation": "tanh"}, "leave it out"),
    ({"bidirectional": True}, "^task.bidirectional: .* set task.network to a recurrent one"),
    ({"network": "gru", "layers": 0}, "needs at least one"),
])
def test_options_that_a_network_does_not_have_are_errors(data, options, said):
    with pytest.raises(ValueError, match=said):
        Frames(data.manifest["fields"], **options)

"""Matrices of low rank: the nearest to whole ones, in a layer, in a network as drawn, and in one that was trained."""

from __future__ import annotations

import pytest
import torch

from models.frames import Frames
from models.layers.factored import Factored, factors, largest_rank, linear, pays

FIELDS = {"features": {"mean": [0.1] * 6, "std": [1.5] * 6}, "labels": {"classes": 11}}


def task_of(factored, **options):
    return Frames(FIELDS, factored=factored, **({"context": 2, "layers": 3, "width": 32} | options))


def initialised(task, seed=0):
    model = task.model()
    task.initialise(model, torch.Generator().manual_seed(seed))
    return model


def whole(inputs=20, outputs=30, seed=1):
    layer = torch.nn.Linear(inputs, outputs)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=random)
    return layer


def product(layer):
    return layer.up.weight @ layer.down.weight


def truncated(weight, rank):
    u, values, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ v[:rank], values


def taken(layer, rank):
    made = Factored(layer.in_features, layer.out_features, rank)
    made.take_(layer)
    return made


@pytest.mark.parametrize("sizes", [(20, 30), (30, 20), (16, 16)])
def test_of_full_rank_it_is_the_whole_layer(sizes):
    layer, inputs = whole(*sizes), torch.randn(50, sizes[0], generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(taken(layer, min(sizes))(inputs), layer(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 19])
def test_of_low_rank_it_is_the_nearest_and_both_factors_are_of_one_size(rank):
    layer = whole()
    found, (wanted, values) = taken(layer, rank), truncated(layer.weight, rank)
    torch.testing.assert_close(product(found).double(), wanted, rtol=1e-5, atol=1e-5)
    lost = float((layer.weight - product(found)).detach().double().square().sum())
    assert lost == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)
    assert torch.equal(found.up.bias, layer.bias) and found.down.bias is None
    for gram in (found.down.weight @ found.down.weight.T, found.up.weight.T @ found.up.weight):
        torch.testing.assert_close(gram.double(), torch.diag(values[:rank]), rtol=1e-5, atol=1e-5)


def test_a_matrix_is_factored_only_where_that_makes_it_smaller():
    for inputs in range(1, 40):
        for outputs in (1, 2, 7, 39):
            largest = largest_rank(inputs, outputs)
            assert not largest or pays(inputs, outputs, largest)
            assert not pays(inputs, outputs, largest + 1)
    for rank, kind in ((0, torch.nn.Linear), (1, Factored), (11, Factored), (12, torch.nn.Linear)):
        assert type(linear(20, 30, rank)) is kind


def test_the_parameters_of_a_network_of_the_papers_size():
    about = {"features": {"mean": [0.0] * 40, "std": [1.0] * 40}, "labels": {"classes": 9304}}

    def count(rank):
        with torch.device("meta"):
            model = Frames(about, context=5, layers=7, width=2048, factored=rank).model()
        return sum(p.numel() for p in model.parameters())

    biases, hidden, output = 7 * 2048 + 9304, 2048 + 2048, 2048 + 9304
    assert count(256) == 256 * (440 + 2048 + 6 * hidden + output) + biases
    assert count(400) == 440 * 2048 + 400 * (6 * hidden + output) + biases  # the input's stays whole
    assert count(1200) == 440 * 2048 + 6 * 2048**2 + 1200 * output + biases


@pytest.mark.parametrize("init", ["glorot", "he", "uniform", "normal"])
def test_what_is_drawn_is_near_to_what_a_whole_network_draws(init):
    full, task = initialised(task_of(0, init=init)), task_of(5, init=init)
    model = initialised(task)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Factored)}
    assert set(layers) == {"hidden.0", "hidden.2", "hidden.4", "output"}
    for name, layer in layers.items():
        wanted, _ = truncated(full.get_submodule(name).weight, 5)
        torch.testing.assert_close(product(layer).double(), wanted, rtol=1e-4, atol=1e-6)
        assert not layer.up.bias.any()
    for a, b in zip(model.parameters(), initialised(task).parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(product(model.output), product(initialised(task, 1).output))


def test_a_trained_network_is_restructured():
    full, task = initialised(task_of(0)), task_of(4)
    with torch.no_grad():
        for layer in (*full.hidden, full.output):
            if isinstance(layer, torch.nn.Linear):
                layer.weight.copy_(truncated(layer.weight, 4)[0])  # then a rank of 4 loses nothing
                layer.bias.normal_(generator=torch.Generator().manual_seed(3))
    model, held = task.model(), full.state_dict()
    kept = {name: tensor.clone() for name, tensor in held.items()}
    model.load_state_dict(task.adapted(model, held))
    assert held.keys() == kept.keys() and all(torch.equal(held[name], kept[name]) for name in kept)
    windows = torch.randn(40, 5, 6, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(model(windows), full(windows), rtol=1e-4, atol=1e-5)


def test_what_needs_no_restructuring_stays_as_it_is():
    task = task_of(8)
    model = initialised(task)
    held = dict(model.state_dict())
    same = task.adapted(model, held)
    assert same.keys() == held.keys() and all(map(torch.equal, same.values(), held.values()))
    partly = task_of(9)  # more than pays for the output's matrix
    assert type(partly.model().output) is torch.nn.Linear
    full = initialised(task_of(0)).state_dict()
    adapted = partly.adapted(partly.model(), full)
    assert torch.equal(adapted["output.weight"], full["output.weight"]) and "hidden.2.up.bias" in adapted
    assert task_of(0).adapted(initialised(task_of(0)), full).keys() == full.keys()


def test_gradients_reach_both_factors():
    model = initialised(task_of(4, activation="relu"))
    model(torch.randn(8, 5, 6)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(("options", "said"), [
    ({"factored": 4, "network": "sru"}, "is for task.network = 'dnn', this is 'sru'"),
    ({"factored": 16}, "choose at most 15"),
    ({"factored": 1, "layers": 0, "classes": 2, "context": 0, "width": 1, "values": 1}, "leave it out"),
])
def test_ranks_that_make_no_sense_are_errors(options, said):
    fields = {
        "features": {"mean": [0.0] * options.pop("values", 6), "std": [1.0] * 6},
        "labels": {"classes": options.pop("classes", 11)},
    }
    with pytest.raises(ValueError, match=said):
        Frames(fields, **({"context": 2, "layers": 3, "width": 32} | options))


def test_factors_of_narrow_types_keep_the_type():
    down, up = factors(whole().weight.to(torch.bfloat16), 3)
    assert (down.dtype, up.dtype) == (torch.bfloat16, torch.bfloat16) and (down.shape, up.shape) == ((3, 20), (30, 3))

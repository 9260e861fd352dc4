"""Recurrent layers: one interface, the paper's equations, and what holds for every kind of cell."""

from __future__ import annotations

import pytest
import torch

from models.layers.recurrent import Recurrent

KINDS = ("sru", "sru-later", "lstm", "gru", "qrnn")
STEPS, BATCH, INPUTS, WIDTH = 9, 4, 6, 5
LENGTHS = torch.tensor([4, 9, 0, 7])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def made(kind, layers=2, inputs=INPUTS, **options):
    model = Recurrent(kind, inputs, WIDTH, layers, **options)
    model.initialise(torch.Generator().manual_seed(5))
    return model


def inputs(steps=STEPS, width=INPUTS):
    return torch.randn(steps, BATCH, width, generator=torch.Generator().manual_seed(6))


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_sru_is_equations_3_to_7():
    model, x = made("sru", layers=1, inputs=WIDTH), inputs(width=WIDTH).double()
    cell = model.layers[0][0]
    weight, weight_f, weight_r = cell.weight.detach().double().split(WIDTH)
    cell.bias.data.copy_(torch.linspace(-1, 1, 2 * WIDTH))
    bias_f, bias_r = cell.bias.detach().double().split(WIDTH)
    c = torch.zeros(BATCH, WIDTH, dtype=torch.float64)
    h, state = model(x.float())
    for t in range(STEPS):
        f = torch.sigmoid(x[t] @ weight_f.T + bias_f)
        r = torch.sigmoid(x[t] @ weight_r.T + bias_r)
        c = f * c + (1 - f) * (x[t] @ weight.T)
        close(h[t].double(), r * torch.tanh(c) + (1 - r) * x[t])
    close(state[0].double(), c)


def test_the_highway_is_projected_where_widths_differ_or_everywhere():
    assert [cells[0].parts for cells in made("sru", layers=3).layers] == [4, 3, 3]
    assert [cells[0].parts for cells in made("sru", layers=3, highway="always").layers] == [4, 4, 4]
    model, x = made("sru", layers=1), inputs()
    with torch.no_grad():
        model.layers[0][0].bias[WIDTH:] = -100.0  # the reset gate lets the highway through alone
    close(model(x)[0], x @ model.layers[0][0].weight[3 * WIDTH :].T)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_batch_mates_never_change_a_result(kind, bidirectional):
    model, x = made(kind, bidirectional=bidirectional), inputs()
    h, state = model(x, LENGTHS)
    assert h.shape == (STEPS, BATCH, model.outputs)
    other = x.clone()
    other[torch.arange(STEPS)[:, None] >= LENGTHS] = 77.0
    again, state_again = model(other, LENGTHS)
    assert torch.equal(h, again) and all(map(torch.equal, state, state_again))
    for b, length in enumerate(LENGTHS.tolist()):
        assert not h[length:, b].any()
        if not length:
            assert all(not part[b].any() for part in state)
            continue
        alone, ends = model(x[:length, b : b + 1])
        close(h[:length, b], alone[:, 0])
        for part, end in zip(state, ends, strict=True):
            close(part[b], end[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_in_two_parts_is_the_whole(kind):
    model, x = made(kind), inputs()
    whole, ends = model(x)
    first, state = model(x[:4])
    second, after = model(x[4:], state=state)
    close(torch.cat([first, second]), whole)
    for found, wanted in zip(after, ends, strict=True):
        close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_direction_is_the_first_of_the_reversed_sequence(kind):
    model, x = made(kind, layers=1, bidirectional=True), inputs()
    model.layers[0][1].load_state_dict(model.layers[0][0].state_dict())
    h, state = model(x, LENGTHS)
    turned = x.clone()
    for b, length in enumerate(LENGTHS.tolist()):
        turned[:length, b] = x[:length, b].flip(0)
    reversed_h, reversed_state = model(turned, LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        close(h[:length, b, WIDTH:], reversed_h[:length, b, :WIDTH].flip(0))
    half = len(state) // 2
    for found, wanted in zip(state[half:], reversed_state[:half], strict=True):
        close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_initialising_is_the_generators_alone(kind):
    one, two = made(kind, bidirectional=True), made(kind, bidirectional=True)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    one(inputs(), LENGTHS)[0].square().sum().backward()
    for name, parameter in one.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_state_is_the_output_of_both_ends(kind):
    model, x = made(kind, bidirectional=True), inputs()
    h, state = model(x, LENGTHS)
    last = model.last(state)
    assert last.shape == (BATCH, 2 * WIDTH)
    if kind in ("lstm", "gru"):  # whose outputs are their states
        close(last[1], torch.cat([h[8, 1, :WIDTH], h[0, 1, WIDTH:]]))
        close(last[0], torch.cat([h[3, 0, :WIDTH], h[0, 0, WIDTH:]]))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_for_training_alone_and_comes_from_the_global_generator(kind):
    plain, x = made(kind), inputs()
    for options in ({"dropout": 0.5}, {"variational": 0.5}):
        model = made(kind, **options)
        model.eval()
        assert torch.equal(model(x)[0], plain(x)[0])
        model.train()
        torch.manual_seed(1)
        one = model(x)[0]
        torch.manual_seed(1)
        assert torch.equal(model(x)[0], one) and not torch.equal(one, plain(x)[0])


def test_variational_masks_are_the_same_for_all_steps_and_standard_ones_are_not():
    x = torch.ones(STEPS, BATCH, INPUTS)
    model = made("sru", layers=1, variational=0.5)
    with torch.no_grad():
        model.layers[0][0].bias.fill_(100.0)  # f = 1: the state stays 0; r = 1
        model.layers[0][0].bias[:WIDTH] = -100.0  # f = 0: the state is W x
    h = model(x)[0]
    assert torch.equal(h, h[:1].expand_as(h)) and not torch.equal(h[:, 0], h[:, 1])
    model = made("sru", layers=1, dropout=0.5)
    with torch.no_grad():
        model.layers[0][0].bias.fill_(100.0)
        model.layers[0][0].bias[:WIDTH] = -100.0
    dropped = model(x)[0] == 0
    assert 0.3 < dropped.float().mean() < 0.7 and not torch.equal(dropped[0], dropped[1])


def test_an_option_that_is_not_for_a_cell_is_an_error():
    with pytest.raises(TypeError, match="activation"):
        made("lstm", activation="relu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_of_the_gate_that_keeps_the_state_is_set(kind):
    """With a large bias the state is kept: what it was before the first step is still in it after the last."""
    stack = Recurrent(kind, 6, 6, 1, forget_bias=40.0)
    for name, parameter in stack.named_parameters():
        if "weight_hh" in name:  # only the gate is looked at
            torch.nn.init.zeros_(parameter)
    widths = stack.layers[0][0].states
    x, held = torch.randn(9, 2, 6), 1 if kind == "lstm" else 0
    after = [stack(x, None, tuple(torch.full((2, w), value) for w in widths))[1][held] for value in (0.0, 1.0)]
    if kind == "qrnn":  # its state also holds the input before the first
        after[1] = stack(x, None, (torch.ones(2, widths[0]), torch.zeros(2, widths[1])))[1][held]
    torch.testing.assert_close(after[1] - after[0], torch.ones(2, 6))
    forgetful = Recurrent(kind, 6, 6, 1, forget_bias=-40.0)
    ends = [forgetful(x, None, tuple(torch.full((2, w), value) for w in widths))[1][held] for value in (0.0, 1.0)]
    assert (ends[1] - ends[0]).abs().max() < 0.5

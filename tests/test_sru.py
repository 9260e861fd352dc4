"""The recurrence of SRU against its reference, and what it promises about lengths, directions and gradients."""

from __future__ import annotations

from itertools import product

import cuda_on_cpu
import pytest
import torch

from kernels import native, sru
from kernels.sru import ACTIVATIONS, recurrence, reference

KINDS = list(product(ACTIVATIONS, (3, 4), (False, True), (False, True), (False, True)))  # g, K, v, mask, reverse


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def made(steps, batch, d, parts=3, *, peephole=False, masked=False, dtype=torch.float32, seed=3):
    random = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=random).to(dtype).requires_grad_()

    return {
        "u": leaf(steps, batch, parts * d), "x": leaf(steps, batch, d) if parts == 3 else None, "bias": leaf(2 * d),
        "c0": leaf(batch, d), "v": leaf(2 * d) if peephole else None,
        "mask": (torch.rand(steps, batch, d, generator=random) > 0.3).to(dtype) / 0.7 if masked else None,
    }


def run(given, lengths=None, **options):
    options |= {"v": given["v"], "mask_TBD": given["mask"], "lengths": lengths}
    return recurrence(given["u"], given["x"], given["bias"], given["c0"], **options)


def leaves(given):
    return [given[name] for name in ("u", "x", "bias", "c0", "v") if given[name] is not None]


def with_gradients(outputs, given, weights):
    return [*outputs, *torch.autograd.grad(outputs, leaves(given), weights)]


def exact(given, lengths, activation, reverse, scale, weights):
    """The reference in float64, differentiated by torch."""
    there = {name: None if t is None else t.detach().double() for name, t in given.items()}
    for tensor in leaves(there):
        tensor.requires_grad_()
    inputs = [there[name] for name in ("u", "x", "bias", "c0", "v")]
    h, c = reference(*inputs, lengths, there["mask"], activation, reverse, scale)
    return with_gradients([h, c[0] if reverse else c[-1]], there, [w.double() for w in weights])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_near_to_the_reference_in_float64_forward_and_backward(kind):
    activation, parts, peephole, masked, reverse = kind
    for steps, batch, d in ((7, 3, 19), (1, 1, 1), (4, 2, 64)):
        given = made(steps, batch, d, parts, peephole=peephole, masked=masked)
        lengths = torch.tensor([steps, steps // 2, 0][:batch])
        outputs = run(given, lengths, activation=activation, reverse=reverse, scale=1.3)
        weights = [torch.randn_like(output) for output in outputs]
        near = exact(given, lengths, activation, reverse, 1.3, weights)
        for found, wanted in zip(with_gradients(outputs, given, weights), near, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=3e-6)


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    """The CUDA source, built for the CPU."""
    if cuda_on_cpu.missing():
        pytest.skip(cuda_on_cpu.missing())
    return cuda_on_cpu.build("sru.cu", tmp_path_factory.mktemp("sru"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_the_cuda_source_gives_the_bits_of_the_cpu_side(kind, cuda, monkeypatch):
    if native.library() is None:
        pytest.skip("the CPU library was not built")
    activation, parts, peephole, masked, reverse = kind
    given = made(5, 3, 19, parts, peephole=peephole, masked=masked)
    options = {"lengths": torch.tensor([5, 2, 0]), "activation": activation, "reverse": reverse, "scale": 1.3}
    outputs = run(given, **options)
    weights = [torch.randn_like(output) for output in outputs]
    wanted = with_gradients(outputs, given, weights)
    for descending, threads in ((False, 32), (True, 64)):
        monkeypatch.setattr(sru, "_run", lambda side, u, packed, d=descending, n=threads: cuda.launch(
            f"trireme_sru_{side}", -(-3 * 19 // n), n, (packed[0],), d))
        found = with_gradients(run(given, **options), given, weights)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_differences(reverse):
    given = made(5, 2, 3, peephole=True, masked=True, dtype=torch.float64)
    lengths = torch.tensor([5, 2])

    def act(u, x, bias, c0, v):
        return recurrence(u, x, bias, c0, v=v, lengths=lengths, mask_TBD=given["mask"], reverse=reverse)

    assert torch.autograd.gradcheck(act, leaves(given))


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_and_batch_mates_never_change_a_result(reverse):
    given = made(9, 4, 33)
    lengths = torch.tensor([4, 9, 0, 6])
    outputs = run(given, lengths, reverse=reverse)
    weights = [torch.randn_like(output) for output in outputs]
    together = with_gradients(outputs, given, weights)
    for b, length in enumerate(lengths.tolist()):
        alone = {"bias": given["bias"], "v": None, "mask": None}
        alone |= {name: given[name][:length, b : b + 1].detach().requires_grad_() for name in ("u", "x")}
        alone["c0"] = given["c0"][b : b + 1].detach().requires_grad_()
        if not length:
            assert torch.equal(outputs[1][b], given["c0"][b])
            continue
        own = run(alone, reverse=reverse)
        mine = with_gradients(own, alone, [weights[0][:length, b : b + 1], weights[1][b : b + 1]])
        assert torch.equal(together[0][:length, b], mine[0][:, 0])
        assert torch.equal(together[1][b], mine[1][0])
        for number in (2, 3):  # of u and x
            assert torch.equal(together[number][:length, b], mine[number][:, 0])
        assert torch.equal(together[5][b], mine[5][0])
    beyond = torch.arange(9)[:, None] >= lengths
    for number in (0, 2, 3):
        assert not together[number][beyond].any()
    with torch.no_grad():
        given["u"][beyond], given["x"][beyond] = float("nan"), float("inf")
    again = run(given, lengths, reverse=reverse)
    for found, wanted in zip(with_gradients(again, given, weights), together, strict=True):
        assert torch.equal(found, wanted)


def test_a_sequence_in_two_parts_is_the_whole():
    given = made(10, 3, 20)
    whole, last = run(given)
    first, state = run(given | {"u": given["u"][:4], "x": given["x"][:4]})
    second, end = run(given | {"u": given["u"][4:], "x": given["x"][4:], "c0": state})
    assert torch.equal(torch.cat([first, second]), whole) and torch.equal(end, last)


def test_nothing_to_do_is_no_trouble():
    for steps, batch, d in ((0, 3, 5), (4, 0, 5)):
        given = made(steps, batch, d)
        h, last = run(given)
        assert h.shape == (steps, batch, d) and torch.equal(last, given["c0"])
        (h.sum() + last.sum()).backward()
        assert torch.equal(given["c0"].grad, torch.ones_like(given["c0"]))


def test_every_argument_counts():
    given = made(6, 2, 5, peephole=True, masked=True)
    before = run(given)[0]
    for name, tensor in given.items():
        with torch.no_grad():
            assert not torch.equal(run(given | {name: tensor * 1.5})[0], before), name
    for options in ({"activation": "relu"}, {"reverse": True}, {"scale": 2.0}):
        assert not torch.equal(run(given, **options)[0], before), options
    assert not torch.equal(run(given, torch.tensor([6, 5]))[0], before)


def test_extreme_gates_and_tensors_that_are_not_contiguous():
    given = made(6, 4, 8)
    with torch.no_grad():
        given["u"][:, 0] *= 1000.0
    outputs = run(given)
    assert all(torch.isfinite(output).all() for output in outputs)
    turned = {name: given[name].detach().mT.contiguous().mT for name in ("u", "x")}
    assert not turned["u"].is_contiguous()
    assert torch.equal(run(given | turned)[0], outputs[0])


def test_without_the_library_the_reference_serves(monkeypatch):
    given = made(5, 3, 7, 4, peephole=True)
    lengths = torch.tensor([5, 3, 1])
    outputs = run(given, lengths)
    weights = [torch.randn_like(output) for output in outputs]
    with_library = with_gradients(outputs, given, weights)
    monkeypatch.setattr(sru.native, "library", lambda: None)
    for found, wanted in zip(with_gradients(run(given, lengths), given, weights), with_library, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=3e-6)


def test_compiled_graphs_hold_it_whole_and_give_the_same():
    given = made(5, 3, 8, peephole=True)
    lengths = torch.tensor([5, 3, 1])

    def act(u, x, bias, c0, v):
        return recurrence(2 * u, x, bias, c0, v=v, lengths=lengths)

    outputs = act(*leaves(given))
    weights = [torch.randn_like(output) for output in outputs]
    wanted = with_gradients(outputs, given, weights)
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager")
    for found, expected in zip(with_gradients(compiled(*leaves(given)), given, weights), wanted, strict=True):
        assert torch.equal(found, expected)


def test_under_autocast_state_and_gates_are_float32():
    given = made(5, 3, 8)
    weight = torch.randn(24, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        u = torch.nn.functional.linear(given["x"], weight)
        assert u.dtype == torch.bfloat16
        h, last = run(given | {"u": u})
    assert h.dtype == last.dtype == torch.float32
    assert torch.equal(h, run(given | {"u": u.float()})[0])
    h.sum().backward()
    assert weight.grad.abs().sum() > 0


def test_what_does_not_fit_is_refused():
    given = made(5, 3, 7)
    with pytest.raises(ValueError, match="do not fit 7 units"):
        run(given | {"x": None})
    with pytest.raises(ValueError, match="do not fit 7 units"):
        run(given | {"x": given["x"][:, :, :3]})


def test_the_library_is_there_where_it_was_built():
    if native.library() is None:
        pytest.skip("the CPU library was not built")
    assert native.library().trireme_sru_forward

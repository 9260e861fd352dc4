"""The recurrence of SRU against its reference, and what it promises about lengths, directions and gradients."""

from __future__ import annotations

from itertools import product as combined
from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest
import torch

from kernels import native, sru
from kernels.product import by_rows, product
from kernels.sru import ACTIVATIONS, layer, recurrence, reference

KINDS = list(combined(ACTIVATIONS, (3, 4), (False, True), (False, True), (False, True)))  # g, K, v, mask, reverse


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


def stored_as(dtype, given):
    """The same with u and x of another type."""
    return given | {k: t.detach().to(dtype).requires_grad_() for k, t in given.items() if k in "ux" and t is not None}


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


def within_one_step(found, wanted):
    """Whether bfloat16 numbers are the right ones, but for what is nearly halfway between two."""
    wanted = wanted.to(torch.bfloat16)
    steps = (found.view(torch.int16).int() - wanted.view(torch.int16).int()).abs()
    tiny = (found.float() - wanted.float()).abs() < 1e-6  # of either sign
    assert ((steps <= 1) | tiny).all() and (found == wanted).float().mean() > 0.95


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_in_bfloat16_only_what_is_stored_is_rounded(kind):
    activation, parts, peephole, masked, reverse = kind
    for steps, batch, d in ((7, 3, 19), (4, 2, 64)):
        given = stored_as(torch.bfloat16, made(steps, batch, d, parts, peephole=peephole, masked=masked))
        lengths = torch.tensor([steps, steps // 2, 0][:batch])
        outputs = run(given, lengths, activation=activation, reverse=reverse, scale=1.3)
        assert [output.dtype for output in outputs] == [torch.bfloat16, torch.float32]
        weights = [torch.randn_like(output) for output in outputs]
        near = exact(given, lengths, activation, reverse, 1.3, weights)
        for found, wanted in zip(with_gradients(outputs, given, weights), near, strict=True):
            if found.dtype == torch.bfloat16:
                within_one_step(found, wanted)
            else:
                torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=3e-6)


def test_bfloat16_is_rounded_as_torch_does():
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-40, 3e38, float("inf"), float("nan")])])
    values = torch.cat([values, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])])  # halfway between two
    u = torch.zeros(1, 1, 3 * len(values), dtype=torch.bfloat16)
    u[..., 2 * len(values) :] = 100.0  # r = 1: h is the state, and f = 1 keeps that
    u[..., len(values) : 2 * len(values)] = 100.0
    x = torch.zeros(1, 1, len(values), dtype=torch.bfloat16)
    h, last = recurrence(u, x, torch.zeros(2 * len(values)), values[None], activation="identity")
    assert torch.equal(last[0].nan_to_num(7.0), values.nan_to_num(7.0))
    assert torch.equal(h[0, 0].nan_to_num(7.0), values.to(torch.bfloat16).nan_to_num(7.0))
    assert torch.equal(h.isnan()[0, 0], values.isnan())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_same_bits_with_any_number_of_threads(stored, monkeypatch):
    monkeypatch.setattr(sru, "ENOUGH", 1)
    for batch, d in ((1, 7), (1, 200), (2, 33), (3, 65), (4, 16), (9, 40), (32, 64)):
        given = stored_as(stored, made(5, batch, d, peephole=True, masked=True))
        lengths = torch.arange(batch) % 6
        wanted = None
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            outputs = run(given, lengths)
            weights = [torch.ones_like(output) for output in outputs]
            found = with_gradients(outputs, given, weights)
            wanted = wanted or found
            assert all(map(torch.equal, found, wanted)), (batch, d, threads)


def test_threads_are_torchs_own():
    maps = Path("/proc/self/maps")
    if native.library() is None or not maps.exists():
        pytest.skip("the CPU library was not built, or nothing says what is loaded")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    assert len(loaded) <= 1, loaded


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    """The CUDA source, built for the CPU."""
    if cuda_on_cpu.missing():
        pytest.skip(cuda_on_cpu.missing())
    return cuda_on_cpu.build("sru.cu", tmp_path_factory.mktemp("sru"))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_the_cuda_source_gives_the_bits_of_the_cpu_side(kind, stored, cuda, monkeypatch):
    if native.library() is None:
        pytest.skip("the CPU library was not built")
    activation, parts, peephole, masked, reverse = kind
    given = stored_as(stored, made(5, 3, 19, parts, peephole=peephole, masked=masked))
    options = {"lengths": torch.tensor([5, 2, 0]), "activation": activation, "reverse": reverse, "scale": 1.3}
    outputs = run(given, **options)
    weights = [torch.randn_like(output) for output in outputs]
    wanted = with_gradients(outputs, given, weights)
    for descending, threads in ((False, 32), (True, 64)):
        monkeypatch.setattr(sru, "_run", lambda side, u, units, packed, d=descending, n=threads: cuda.launch(
            f"trireme_sru_{side}{sru.SUFFIX[u.dtype]}", -(-units // n), n, (np.frombuffer(packed, sru.PACKED)[0],), d))
        found = with_gradients(run(given, **options), given, weights)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_differences(reverse):
    given = made(5, 2, 3, peephole=True, masked=True, dtype=torch.float64)
    lengths = torch.tensor([5, 2])

    def act(u, x, bias, c0, v):
        return recurrence(u, x, bias, c0, v=v, lengths=lengths, mask_TBD=given["mask"], reverse=reverse)

    assert torch.autograd.gradcheck(act, leaves(given))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_and_batch_mates_never_change_a_result(reverse, stored):
    given = stored_as(stored, made(9, 4, 33))
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


@pytest.mark.parametrize("steps, batch, d", [(5, 3, 8), (32, 64, 256)])  # products by one library, and by the other
def test_compiled_graphs_hold_a_layer_whole(steps, batch, d):
    given, weight = made(steps, batch, d), torch.randn(3 * d, d, requires_grad=True)
    leaves = [given["x"], weight, given["bias"], given["c0"]]

    def act(x, weight, bias, c0):
        return layer(2 * x, weight, bias, c0)[0]

    out = act(*leaves)
    wanted = torch.autograd.grad(out, leaves, torch.ones_like(out))
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(compiled, out)
    assert all(map(torch.equal, torch.autograd.grad(compiled, leaves, torch.ones_like(out)), wanted))


def test_the_operators_are_what_torch_expects_of_them():
    for stored in (torch.float32, torch.bfloat16):
        given = stored_as(stored, made(5, 3, 8, peephole=True))
        inputs = [None if t is None else t.detach() for t in (given[name] for name in ("u", "x", "bias", "c0", "v"))]
        for lengths in (None, torch.tensor([5, 3, 1])):
            options = ("tanh", False, 1.0)
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(torch.ops.trireme.sru_forward, (*inputs, lengths, None, *options), test_utils=checks)
            h, c = torch.ops.trireme.sru_forward(*inputs, lengths, None, *options)
            torch.library.opcheck(
                torch.ops.trireme.sru_backward, (*inputs, lengths, None, c, h, c[-1], *options), test_utils=checks
            )


def test_autocast_leaves_products_alone_that_it_does_not_ask_for():
    torch.manual_seed(1)
    for dtype, kind in ((torch.float64, torch.bfloat16), (torch.float32, torch.float16)):
        x, weight = torch.randn(4, 3, 8, dtype=dtype), torch.randn(24, 8, dtype=dtype, requires_grad=True)
        bias, c0 = torch.randn(16, dtype=dtype), torch.zeros(3, 8, dtype=dtype)
        h, _ = layer(x, weight, bias, c0)
        (wanted,) = torch.autograd.grad(h.sum(), weight)
        with torch.autocast("cpu", kind):
            found, _ = layer(x, weight, bias, c0)
            assert torch.equal(found, h) and found.dtype == dtype
            assert torch.equal(torch.autograd.grad(found.sum(), weight)[0], wanted)


def test_second_derivatives_are_refused():
    given = made(4, 2, 3)
    (grad,) = torch.autograd.grad(run(given)[0].square().sum(), given["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradients_of_a_whole_layer():
    torch.manual_seed(1)
    for inputs, parts, activation in ((4, 3, "tanh"), (4, 4, "identity"), (5, 4, "relu")):
        x, weight = torch.randn(3, 2, inputs).double(), torch.randn(parts * 4, inputs).double()
        bias, c0, v = torch.randn(8).double(), torch.randn(2, 4).double(), torch.randn(8).double()
        given = x * (torch.rand(2, inputs) > 0.3)
        leaves = [t.requires_grad_() for t in (x, weight, bias, c0, v, given)]

        def act(x, weight, bias, c0, v, given, activation=activation):
            lengths = torch.tensor([3, 2])
            return layer(x, weight, bias, c0, given_TBI=given, v=v, lengths=lengths, activation=activation)

        assert torch.autograd.gradcheck(act, leaves)


def test_under_autocast_state_and_gates_are_float32():
    torch.manual_seed(1)
    given = made(5, 3, 8)
    weight = torch.randn(24, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        u = torch.nn.functional.linear(given["x"], weight)
        h, last = run(given | {"u": u})
        whole, end = layer(given["x"], weight, given["bias"], given["c0"])
    assert u.dtype == h.dtype == whole.dtype == torch.bfloat16 and last.dtype == end.dtype == torch.float32
    rounded = given["x"].to(torch.bfloat16).float()
    wanted, wanted_last = run(given | {"u": u.float(), "x": rounded})
    assert torch.equal(h, wanted.to(torch.bfloat16)) and torch.equal(last, wanted_last)
    assert torch.equal(whole, h) and torch.equal(end, last)
    whole.float().square().sum().backward()
    assert weight.grad.dtype == given["x"].grad.dtype == torch.float32
    found = (weight.grad, given["x"].grad)
    parts = torch.nn.functional.linear(given["x"], weight)
    near = torch.autograd.grad(run(given | {"u": parts})[0].square().sum(), [weight, given["x"]])
    for a, b in zip(found, near, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("width, inputs, apart", [(12, 12, False), (12, 12, True), (12, 7, False), (12, 7, True)])
def test_a_layer_is_its_product_and_its_recurrence(width, inputs, apart):
    torch.manual_seed(1)
    weight = torch.randn((3 if width == inputs else 4) * width, inputs, requires_grad=True)
    x = torch.randn(6, 2, inputs, requires_grad=True)
    other = made(6, 2, width)
    given = (x * (torch.rand_like(x) > 0.3)) if apart else None
    u = torch.nn.functional.linear(x if given is None else given, weight)
    highway = x if width == inputs else None
    leaves = [x, weight, other["bias"], other["c0"]]
    lengths = torch.tensor([6, 4])
    wanted = recurrence(u, highway, other["bias"], other["c0"], lengths=lengths)
    found = layer(x, weight, other["bias"], other["c0"], given_TBI=given, lengths=lengths)
    weights = [torch.randn_like(output) for output in wanted]
    wanted = [*wanted, *torch.autograd.grad(wanted, leaves, weights, retain_graph=True)]
    found = [*found, *torch.autograd.grad(found, leaves, weights)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-6)


def test_products_by_either_library():
    torch.manual_seed(1)
    for rows, inner, columns in ((3, 5, 7), (300, 200, 400), (900, 128, 800), (1500, 40, 1500), (2100, 64, 130)):
        a, b, plus = torch.randn(rows, inner), torch.randn(columns, inner), torch.randn(rows, columns)
        for left, right in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
            for more in (None, plus):
                wanted = left.double() @ right.double().t() + (0 if more is None else more.double())
                kept = None if more is None else more.clone()
                torch.testing.assert_close(product(left, right, more).double(), wanted, rtol=1e-5, atol=1e-4)
                assert more is None or torch.equal(more, kept)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_transposed_matrix_is_turned_exactly(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, columns in ((1, 1), (7, 9), (8, 8), (16, 24), (129, 37), (300, 1), (1, 300), (1000, 515)):
            matrix = torch.randn(rows, columns)
            turned = by_rows(matrix.t())
            assert torch.equal(turned, matrix.t())
            assert native.library() is None or turned.is_contiguous()
        assert by_rows(matrix) is matrix
        apart = torch.randn(40, 60)[:, ::2]  # neither one nor the other
        assert by_rows(apart) is apart
    finally:
        torch.set_num_threads(before)


def test_a_transposed_matrix_is_turned_whatever_the_defaults_are():
    matrix = torch.randn(60, 70)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(by_rows(matrix.t()), matrix.t())
    finally:
        torch.set_default_dtype(torch.float32)
    checks = ("test_schema", "test_faketensor")
    for plus in (None, torch.randn(60, 60)):
        torch.library.opcheck(torch.ops.trireme.product, (matrix, matrix, plus), test_utils=checks)


def test_what_would_be_read_beyond_its_end_is_refused():
    given = made(5, 3, 7, peephole=True, masked=True)
    for name, wrong in (
        ("bias", given["bias"][:-1]), ("c0", given["c0"][:1]), ("v", given["v"][:-1]), ("mask", given["mask"][:1]),
    ):
        with pytest.raises(ValueError, match="does not fit u"):
            run(given | {name: wrong})
        with pytest.raises(ValueError, match="does not fit u"):
            layer(
                given["x"], torch.zeros(21, 7),
                **{argument: (given | {name: wrong})[key] for argument, key in (
                    ("bias", "bias"), ("c0_BD", "c0"), ("v", "v"), ("mask_TBD", "mask")
                )},
            )
    with pytest.raises(ValueError, match=r"lengths \(1,\) does not fit"):
        run(given, torch.tensor([5]))
    with pytest.raises(ValueError, match="activation 'gelu' is unknown; choose from identity, tanh, relu"):
        run(given, activation="gelu")
    wide = torch.tensor([5, 9, 3, 9, 1, 9], dtype=torch.int32)[::2]  # of another type, and not side by side
    assert torch.equal(run(given, wide)[0], run(given, torch.tensor([5, 3, 1]))[0])


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

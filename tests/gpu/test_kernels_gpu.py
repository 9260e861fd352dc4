"""Kernels on a GPU: the same bits as on the CPU."""

from __future__ import annotations

import pytest
import test_onebit_kernel as onebit
import test_sru
import torch
from test_kernels import CONSTANTS, SIZES, after, made

from kernels.onebit import Columns, accumulate_, quantize_, reference_accumulate_, reference_quantize_
from kernels.update import SLOTS, reference, update_

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA GPU here", allow_module_level=True)


@pytest.mark.parametrize("rule", SLOTS)
def test_the_same_bits_as_the_reference(rule):
    for size in SIZES:
        weights, grad, slots = made(rule, size)
        there = (weights.cuda(), grad.cuda(), [slot.cuda() for slot in slots])
        both = zip(after(update_, rule, there), after(reference, rule, (weights, grad, slots)), strict=True)
        assert all(torch.equal(found.cpu(), wanted) for found, wanted in both), size


def test_it_waits_for_what_was_queued_before_and_is_waited_for():
    weights, grad, slots = (torch.zeros(1 << 24, device="cuda") for _ in range(3))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            grad.add_(1.0)
        update_("momentum", weights, grad, [slots], CONSTANTS._replace(scale=1.0, l2=0.0, keep=1.0, rate=1.0))
        doubled = weights * 2
    stream.synchronize()
    assert float(doubled.max()) == float(doubled.min()) == -40.0


def test_a_gradient_that_is_not_finite_is_told():
    weights, grad = torch.zeros(1000, device="cuda"), torch.ones(1000, device="cuda")
    assert update_("sgd", weights, grad, [], CONSTANTS)
    grad[777] = float("nan")
    assert not update_("sgd", weights, grad, [], CONSTANTS)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", test_sru.KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_sru_gives_the_bits_of_the_cpu_side(kind, stored):
    activation, parts, peephole, masked, reverse = kind
    given = test_sru.stored_as(stored, test_sru.made(9, 5, 67, parts, peephole=peephole, masked=masked))
    there = {name: None if t is None else t.detach().cuda().requires_grad_() for name, t in given.items()}
    lengths = torch.tensor([9, 4, 0, 1, 8])
    options = {"activation": activation, "reverse": reverse, "scale": 1.3}
    outputs, others = test_sru.run(given, lengths, **options), test_sru.run(there, lengths.cuda(), **options)
    weights = [torch.randn_like(output) for output in outputs]
    wanted = test_sru.with_gradients(outputs, given, weights)
    found = test_sru.with_gradients(others, there, [weight.cuda() for weight in weights])
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if a.dim() > 1:
            assert torch.equal(a.cpu(), b), number
        else:  # of bias and v: sums over sequences, by torch
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


# As the tests of the CPU have it, and long columns beside many short ones: several warps share the words of a column.
COLUMNS = [onebit.COLUMNS, Columns.of([(7, (1, 1 << 18)), (1 << 19, (3000, 130))]), Columns([])]


@pytest.mark.parametrize("columns", COLUMNS, ids=lambda columns: str(columns.count))
def test_one_bit_gives_the_bits_of_the_reference(columns):
    values, residual = onebit.made(columns)
    rows, there = torch.empty((3, columns.packed), dtype=torch.int32), []
    for row in rows:
        left, packed = residual.clone().cuda(), torch.full((columns.packed,), -1, dtype=torch.int32, device="cuda")
        assert quantize_(values.cuda(), left, columns, packed)
        assert reference_quantize_(values, residual, columns, row)
        assert torch.equal(packed.cpu(), row) and torch.equal(onebit.bits(left.cpu()), onebit.bits(residual))
        there.append(packed)
    assert quantize_(values.cuda(), None, columns, there[0])
    assert reference_quantize_(values, None, columns, rows[0])
    assert torch.equal(there[0].cpu(), rows[0])
    there[1][0] = rows[1][0] = 0  # a dry row
    for fresh in (False, True):
        out = values.clone().cuda()
        accumulate_(out, torch.stack(there), columns, fresh=fresh)
        wanted = values.clone()
        reference_accumulate_(wanted, rows, columns, fresh=fresh)
        assert torch.equal(onebit.bits(out.cpu()), onebit.bits(wanted)), fresh


def test_one_bit_tells_what_is_not_finite():
    values, residual = (t.cuda() for t in onebit.made())
    packed = torch.empty(onebit.COLUMNS.packed, dtype=torch.int32, device="cuda")
    for start in onebit.COLUMNS.starts:
        for value in onebit.SPECIAL:
            values[start], kept = value, values[start].clone()
            assert not quantize_(values, residual.clone(), onebit.COLUMNS, packed), (start, value)
            values[start] = kept
    assert quantize_(values, residual, onebit.COLUMNS, packed)


def test_one_bit_is_queued_behind_what_came_before():
    columns, stream = Columns.of([(0, (4096, 4096))]), torch.cuda.Stream()
    values, out = (torch.zeros(1 << 24, device="cuda") for _ in range(2))
    packed = torch.empty((1, columns.packed), dtype=torch.int32, device="cuda")
    with torch.cuda.stream(stream):
        for _ in range(20):
            values.add_(1.0)
        assert quantize_(values, None, columns, packed[0])
        accumulate_(out, packed, columns)
        doubled = out * 2
    stream.synchronize()
    assert float(doubled.max()) == float(doubled.min()) == 40.0

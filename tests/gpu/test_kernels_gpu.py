"""Kernels on a GPU: the same bits as on the CPU."""

from __future__ import annotations

import pytest
import torch
from test_kernels import CONSTANTS, SIZES, after, made

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

"""Kernels against their references: every rule of `kernels.update`, and what an update promises."""

from __future__ import annotations

import pytest
import torch

from kernels import native, update
from kernels.update import SLOTS, Constants, reference, update_

CONSTANTS = Constants(
    scale=1 / 96, l2=1e-3, keep=0.999, rate=0.1, momentum=0.9, fresh=0.1, beta2=0.995, fresh2=0.005, correction2=1.7,
    epsilon=1e-4,
)
SIZES = (0, 1, 7, 64, 1000, 100_001)
# The constants that each rule reads, beside those of all.
OWN = {
    "sgd": (), "momentum": ("momentum",), "nesterov": ("momentum",), "adagrad": ("epsilon",),
    "adagrad_momentum": ("momentum", "epsilon"), "momentum_adagrad": ("momentum", "epsilon"),
    "adam": ("momentum", "fresh", "beta2", "fresh2", "correction2", "epsilon"),
    "adamax": ("momentum", "fresh", "beta2", "epsilon"),
}
SQUARED = ("adagrad", "adagrad_momentum", "momentum_adagrad", "adam")  # whose state is of squares


def made(rule, size, dtype=torch.float32, seed=1):
    """Weights, gradient and state."""
    random = torch.Generator().manual_seed(seed)
    weights, grad = (torch.randn(size, generator=random).to(dtype) for _ in range(2))
    return weights, grad * 30, [torch.rand(size, generator=random).to(dtype) for _ in range(SLOTS[rule])]


def after(act, rule, tensors, constants=CONSTANTS):
    """Weights and state after one update; the gradient must stay as it is."""
    weights, grad, slots = tensors
    kept, held = weights.clone(), [slot.clone() for slot in slots]
    given = grad.clone()
    assert act(rule, kept, given, held, constants)
    assert torch.equal(given, grad)
    return [kept, *held]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("rule", SLOTS)
def test_near_to_the_reference_in_float64(rule):
    for size in SIZES:
        tensors = made(rule, size)
        exact = after(reference, rule, (tensors[0].double(), tensors[1].double(), [s.double() for s in tensors[2]]))
        for found, wanted in zip(after(update_, rule, tensors), exact, strict=True):
            assert wanted.dtype == torch.float64
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", SLOTS)
def test_the_same_bits_as_the_reference_in_float32(rule):
    if native.library() is None:
        pytest.skip("the CPU library was not built: the reference serves")
    for size in SIZES:
        tensors = made(rule, size)
        both = zip(after(update_, rule, tensors), after(reference, rule, tensors), strict=True)
        assert all(torch.equal(found, wanted) for found, wanted in both), size


@pytest.mark.parametrize("rule", SLOTS)
def test_cut_anywhere_it_is_the_same(rule):
    weights, grad, slots = made(rule, 5000)
    whole = after(update_, rule, (weights, grad, slots))
    for low, high in ((0, 1), (1, 64), (64, 1003), (1003, 1003), (1003, 5000)):  # slices that no vector fits
        assert update_(rule, weights[low:high], grad[low:high], [s[low:high] for s in slots], CONSTANTS)
    assert all(torch.equal(a, b) for a, b in zip(whole, [weights, *slots], strict=True))


@pytest.mark.parametrize("rule", SLOTS)
def test_every_constant_and_tensor_counts(rule):
    tensors = made(rule, 100)
    before = after(update_, rule, tensors)
    for name in ("scale", "l2", "keep", "rate", *OWN[rule]):
        changed = CONSTANTS._replace(**{name: getattr(CONSTANTS, name) * 0.5})
        assert not torch.equal(after(update_, rule, tensors, changed)[0], before[0]), name
    for name in set(Constants._fields) - {"scale", "l2", "keep", "rate", *OWN[rule]}:
        changed = CONSTANTS._replace(**{name: 77.0})
        assert torch.equal(after(update_, rule, tensors, changed)[0], before[0]), name
    weights, grad, slots = tensors
    for number in range(len(slots)):
        other = [slot + (k == number) for k, slot in enumerate(slots)]
        assert not torch.equal(after(update_, rule, (weights, grad, other))[0], before[0]), number


@pytest.mark.parametrize("act", [update_, reference])
def test_a_gradient_that_is_not_finite_is_told(act):
    for rule in SLOTS:
        for value in (float("inf"), float("-inf"), float("nan")):
            for at in (0, 3, 999):
                weights, grad, slots = made(rule, 1000)
                assert act(rule, weights.clone(), grad, [s.clone() for s in slots], CONSTANTS)
                grad[at] = value
                assert not act(rule, weights, grad, slots, CONSTANTS), (rule, value, at)


@pytest.mark.parametrize("act", [update_, reference])
def test_state_that_is_not_finite_is_told(act):
    for rule in SLOTS:
        for at in (0, 3, 999):
            weights, grad, slots = made(rule, 1000)
            grad[at] = 1e25  # which is finite, and its square is not
            assert act(rule, weights, grad, slots, CONSTANTS) == (rule not in SQUARED), (rule, at)


def test_what_does_not_fit_is_refused():
    weights, grad, slots = made("adam", 100)
    with pytest.raises(AssertionError):
        update_("adam", weights, grad, slots[:1], CONSTANTS)
    with pytest.raises(AssertionError):
        update_("adam", weights, grad[::2], slots, CONSTANTS)
    with pytest.raises(AssertionError):
        update_("adam", weights, torch.randn(200)[::2], slots, CONSTANTS)


def test_without_the_library_the_reference_serves(monkeypatch):
    monkeypatch.setattr(update.native, "library", lambda: None)
    tensors = made("adam", 100)
    assert all(map(torch.equal, after(update_, "adam", tensors), after(reference, "adam", tensors)))

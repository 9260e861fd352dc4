"""Update rules: the same as torch's optimizers, and the same whole or cut into slices."""

import pytest
import torch

from collectives.strategy import Rate
from hpc import optim

REFERENCES = {
    "sgd": (optim.SGD(learning_rate=0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "sgd, l2": (optim.SGD(learning_rate=0.1, l2=0.02), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.02)),
    "momentum": (optim.Momentum(learning_rate=0.1), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "nesterov": (optim.Nesterov(learning_rate=0.1), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True)),
    "adagrad": (optim.AdaGrad(learning_rate=0.1, epsilon=1e-6), lambda p: torch.optim.Adagrad(p, 0.1, eps=1e-6)),
    "adam": (optim.Adam(learning_rate=0.1), lambda p: torch.optim.Adam(p, 0.1)),
    "adam, decoupled": (
        optim.Adam(learning_rate=0.1, weight_decay=0.03), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.03),
    ),
    "adamax": (optim.Adamax(learning_rate=0.1), lambda p: torch.optim.Adamax(p, 0.1)),
}


def run(rule, slices, steps=6, size=500):
    random = torch.Generator().manual_seed(4)
    weights = torch.randn(size, generator=random)
    slots = {name: torch.zeros(size) for name in rule.slots}
    for step in range(steps):
        grad = torch.randn(size, generator=random)
        for part in slices:
            held = {name: slot[part] for name, slot in slots.items()}
            rule(weights[part], grad[part].clone(), held, Rate(0.1, step), step)
    return weights


@pytest.mark.parametrize("name", REFERENCES)
def test_equal_to_torchs_optimizer(name):
    rule, make = REFERENCES[name]
    random = torch.Generator().manual_seed(4)
    parameter = torch.nn.Parameter(torch.randn(500, generator=random))
    optimizer = make([parameter])
    for _ in range(6):
        parameter.grad = torch.randn(500, generator=random)
        optimizer.step()
    torch.testing.assert_close(run(rule, [slice(None)]), parameter.detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_bitwise_equal_whole_or_in_slices(name):
    rule = REFERENCES[name][0]
    whole = run(rule, [slice(None)])
    cut = run(rule, [slice(0, 64), slice(64, 64), slice(64, 320), slice(320, None)])
    assert torch.equal(whole, cut)


def test_the_first_epoch_may_have_its_own_momentum():
    rule = optim.Momentum(learning_rate=1.0, momentum=0.9, momentum_first_epoch=0.5)
    weights, slots = torch.zeros(1), {"momentum": torch.ones(1)}
    rule(weights, torch.zeros(1), slots, Rate(1.0, 0), 0)
    assert float(weights) == -0.5
    rule(weights, torch.zeros(1), slots, Rate(1.0, 1), 1)
    assert float(weights) == pytest.approx(-0.5 - 0.45)

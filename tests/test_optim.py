"""Update rules: the same as torch's optimizers, and the same whole or cut into slices."""

import pytest
import torch

from collectives.strategy import Rate
from hpc import optim


class Smoothed(torch.optim.Adagrad):
    """torch's AdaGrad of the gradient that momentum smoothed: paper 002, section 5.3."""

    def __init__(self, parameters, momentum, rate):
        super().__init__(parameters, rate, eps=1e-6)
        self.momentum, self.smoothed = momentum, torch.zeros_like(parameters[0])

    def step(self):
        (parameter,) = self.param_groups[0]["params"]
        self.smoothed = parameter.grad = self.momentum * self.smoothed + parameter.grad
        super().step()


class Normalised(torch.optim.SGD):
    """torch's momentum of the gradient that AdaGrad normalised."""

    def __init__(self, parameters, rate, momentum):
        super().__init__(parameters, rate, momentum=momentum)
        self.squares = torch.zeros_like(parameters[0])

    def step(self):
        (parameter,) = self.param_groups[0]["params"]
        self.squares = self.squares + parameter.grad**2
        parameter.grad = parameter.grad / (self.squares.sqrt() + 1e-6)
        super().step()


REFERENCES = {
    "sgd": (optim.SGD(learning_rate=0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "sgd, l2": (optim.SGD(learning_rate=0.1, l2=0.02), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.02)),
    "momentum": (optim.Momentum(learning_rate=0.1), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "nesterov": (optim.Nesterov(learning_rate=0.1), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True)),
    "adagrad": (optim.AdaGrad(learning_rate=0.1, epsilon=1e-6), lambda p: torch.optim.Adagrad(p, 0.1, eps=1e-6)),
    "momentum before AdaGrad": (
        optim.AdaGrad(learning_rate=0.1, momentum=0.8, placement="after"), lambda p: Smoothed(p, 0.8, 0.1),
    ),
    "AdaGrad before momentum": (
        optim.AdaGrad(learning_rate=0.1, momentum=0.8), lambda p: Normalised(p, 0.1, momentum=0.8),
    ),
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


@pytest.mark.parametrize(("placement", "wanted"), [
    ("before", [-0.5, -0.5 - (0.5 + 1 / 2**0.5)]),  # two gradients of 2: 2 / sqrt(4), then 2 / sqrt(8)
    ("after", [-0.5, -0.5 - 3 / 13**0.5]),  # smoothed 2 and 3: 2 / sqrt(4), then 3 / sqrt(4 + 9)
])
def test_where_adagrad_stands_makes_the_difference_the_paper_makes(placement, wanted):
    rule = optim.AdaGrad(learning_rate=1.0, momentum=0.5, placement=placement, epsilon=1e-12)
    weights, slots = torch.full((1,), 0.5), {name: torch.zeros(1) for name in rule.slots}
    assert set(slots) == {"squares", "momentum"}
    for step, value in enumerate(wanted):
        rule(weights, torch.full((1,), 2.0), slots, Rate(1.0, 0), step)
        assert float(weights) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("placement", ["before", "after"])
def test_adagrads_momentum_too_may_be_another_in_the_first_epoch(placement):
    late = optim.AdaGrad(learning_rate=1.0, momentum=0.9, momentum_first_epoch=0.0, placement=placement)
    for epoch, momentum in ((0, 0.0), (1, 0.9)):
        same = optim.AdaGrad(learning_rate=1.0, momentum=momentum, momentum_first_epoch=0.9, placement=placement)
        found = []
        for rule, at in ((late, epoch), (same, 1)):
            weights, slots = torch.zeros(1), {name: torch.ones(1) for name in rule.slots}
            rule(weights, torch.ones(1), slots, Rate(1.0, at), 0)
            found.append(float(weights))
        assert found[0] == found[1]


def test_adagrad_without_momentum_keeps_nothing_for_it():
    assert optim.AdaGrad(learning_rate=0.1).slots == ("squares",)
    assert optim.AdaGrad(learning_rate=0.1, momentum=0.0, momentum_first_epoch=0.5).slots == ("squares", "momentum")
    with pytest.raises(ValueError, match=r"set optim\.momentum \(0\.9, say\), or leave placement out"):
        optim.AdaGrad(learning_rate=0.1, placement="after")

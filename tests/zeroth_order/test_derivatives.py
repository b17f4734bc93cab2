"""Losses with derivatives by the inputs: each is the loss of a copy that holds the perturbed weights."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from lgkernels.optim import ZerothOrder
from tests.support.problems import randn
from tests.zeroth_order.test_passes import EPS, moved, seen_by

X = randn(5, 3, 8)


class Net(nn.Module):
    """Every function that has a form of its own, and a skip, so that a derivative passes beside it too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.out = nn.Linear(8, 8), nn.Linear(8, 1, bias=False)
        self.one, self.two = nn.Conv1d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.norm, self.table = nn.LayerNorm(8), nn.Embedding(3, 8)

    def forward(self, x):
        h = x + torch.tanh(self.linear(x))
        h = h + torch.sigmoid(self.one(h)) + torch.tanh(self.two(h.unsqueeze(-1)).squeeze(-1))
        return self.out(torch.tanh(self.norm(h) * self.table(torch.arange(3)))).squeeze(-1).sum(-1)


def by_autograd(model, x):
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        return torch.autograd.grad(model(x).sum(), x)[0]


def by_dual_numbers(model, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


WAYS = {
    "autograd": by_autograd,
    "grad": lambda model, x: torch.func.grad(lambda t: model(t).sum())(x),
    "vmap": lambda model, x: torch.func.vmap(model)(x),
    "vmap of grad": lambda model, x: torch.func.vmap(torch.func.grad(model))(x),
    "vmap of jacrev of grad": lambda model, x: torch.func.vmap(torch.func.jacrev(torch.func.grad(model)))(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
    "dual numbers": by_dual_numbers,
}


@pytest.mark.parametrize("way", WAYS)
def test_by_the_inputs(way):
    model = Net()
    seen, z = seen_by(model, lambda m: [WAYS[way](m, X)])
    expected = [WAYS[way](moved(model, z, side), X) for side in (EPS, -EPS)]
    torch.testing.assert_close(torch.stack([got for (got,) in seen]), torch.stack(expected), rtol=1e-4, atol=2e-6)
    assert (expected[0] - expected[1]).abs().max() > 2e-4


@pytest.mark.parametrize("way", ["autograd", "grad"])
def test_of_half_weights_that_could_not_hold_the_perturbation(way):
    """A layer with rows of 1 and -1, whose derivative is what the noise adds to them; a table of ones, on average."""
    linear, table = nn.Linear(64, 2, bias=False).bfloat16(), nn.Embedding(1, 4000).bfloat16()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 64)), table.weight.fill_(1.0)
    seen, z = seen_by(linear, lambda m: [WAYS[way](m, torch.ones(1, 64).bfloat16())])
    for side, (got,) in zip((EPS, -EPS), seen):
        torch.testing.assert_close(got.float()[0], side * z["weight"].float().sum(0), rtol=1e-2, atol=2e-7)
    token = torch.zeros(1, dtype=torch.int64)
    seen, z = seen_by(table, lambda m: [WAYS[way](lambda t: m(token) * t, torch.ones(1, 4000).bfloat16())])
    for side, (got,) in zip((EPS, -EPS), seen):
        assert ((got.float() - 1.0) * z["weight"].float()).mean().item() == pytest.approx(side, rel=0.3)


def test_forward_gradients_of_them():
    """By autograd, and of batches by vmap; what the other transforms would lose is refused."""
    optimizer = ZerothOrder(Net(), lr=1.0, estimator="forward-gradient")
    with pytest.raises(RuntimeError, match="closure must differentiate by torch.autograd.grad for estimator='forward"):
        optimizer.step(lambda: WAYS["grad"](optimizer.model, X).square().mean())
    optimizer.step(lambda: WAYS["vmap"](optimizer.model, X).square().mean())
    slopes = []
    for estimator in ("forward-gradient", "two-sided"):
        optimizer = ZerothOrder(Net().double(), lr=1.0, eps=1e-4, estimator=estimator, law="sign")
        optimizer.step(lambda: by_autograd(optimizer.model, X.double()).square().mean())
        slopes += optimizer.log[0].scalars
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-4)

"""Evaluations at perturbed weights: what half digits or autocast cannot hold still counts, and buffers move once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgkernels.optim import ZerothOrder
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_bit_equal
from tests.zeroth_order.test_optimizer import noise_of

EPS = 4e-4


def seen_by(model, run, **options):
    """What `run` returned at W + eps Z and at W - eps Z, and Z."""
    optimizer, seen = ZerothOrder(model, lr=1e-9, eps=EPS, law="sign", **options), []
    z = noise_of(optimizer, 0)

    def loss():
        seen.append(run(model))
        return sum(y.float().square().mean() for y in seen[-1])

    optimizer.step(loss)
    return seen, z


def moved(model, z, side):
    """A float32 copy at W + side * Z."""
    other = copy.deepcopy(model).float()
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name in z:
                p.add_(z[name].float(), alpha=side)
    return other


def assert_rounded_once(got, expected, name):
    """As float32 rounded to got's dtype, but for what sums in another order move over a border."""
    assert got.dtype in (torch.bfloat16, torch.float16), name
    eps = torch.finfo(got.dtype).eps
    wrong = (got.float() - expected).abs() > 0.51 * eps * expected.abs() + 1e-3 * eps
    assert wrong.float().mean() < 0.01, name


class Layers(nn.Module):
    """Weights of 1, about which half digits are 8e-3 or 1e-3 apart."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.one, self.two, self.three = nn.Conv1d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 1)
        self.back = nn.ConvTranspose1d(4, 4, 2)
        self.bare, self.heads = nn.Parameter(torch.ones(16, 16)), nn.Parameter(torch.ones(4, 16, 16))
        for p in self.parameters():
            nn.init.ones_(p)

    def forward(self, x):
        cube = x.view(1, 4, 4, 4, 4)
        return {
            "linear": self.linear(x.view(16, 16)),
            "conv1d": self.one(x.view(1, 4, 64)),
            "conv1d without a batch": self.one(x.view(4, 64)),
            "conv2d": self.two(x.view(1, 4, 8, 8)),
            "conv3d": self.three(cube),
            "transposed": self.back(x.view(1, 4, 64)),
            "matmul": x.view(16, 16) @ self.bare,
            "bmm": torch.bmm(x.view(4, 4, 16), self.heads),
            "einsum": torch.einsum("ij,jk->ik", x.view(16, 16), self.bare),
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ["half weights", "autocast"])
def test_perturbations_below_half_digits_count(kind, dtype):
    """In half layers, and in float32 layers under autocast."""
    x, names = randn(256).to(dtype), list(Layers()(randn(256)))
    model = Layers().to(dtype) if kind == "half weights" else Layers()

    def run(model):
        with torch.autocast("cpu", dtype, enabled=kind == "autocast"):
            return list(model(x).values())

    seen, z = seen_by(model, run)
    for side, results in zip((EPS, -EPS), seen):
        expected = moved(model, z, side)(x.float()).values()
        for name, got, wanted in zip(names, results, expected):
            assert_rounded_once(got, wanted, name)
    assert not any(torch.equal(a, b) for a, b in zip(*seen))


def test_a_bias_alone_that_is_tuned():
    model = nn.Linear(8, 8).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.copy_(torch.eye(8)), model.bias.fill_(1.0)
    x = torch.full((1, 8), 1e-3 - 1.0, dtype=torch.bfloat16)  # what the bias adds is seen beside it
    seen, z = seen_by(model, lambda m: [m(x)], include="bias")
    torch.testing.assert_close((seen[0][0] - seen[1][0]).float()[0], 2 * EPS * z["bias"].float(), rtol=0.2, atol=1e-5)


def test_dtypes_that_torch_refuses_are_refused():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Conv1d(4, 4, 1)]).to(torch.bfloat16)
    for x, layer in ((randn(2, 4), model[0]), (randn(2, 4, 3), model[1])):
        with pytest.raises(RuntimeError, match="dtype|type"):
            ZerothOrder(layer, lr=0.1).step(lambda: layer(x).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_half_embeddings_hold_a_perturbation_on_the_average(dtype):
    """Of a table of ones: eps is less than half of a unit in the last place, or about it."""
    model = nn.Embedding(50, 400).to(dtype)
    with torch.no_grad():
        model.weight.uniform_(1.0, 2.0)
    tokens = torch.arange(50).view(2, 25)
    seen, z = seen_by(model, lambda m: [m(tokens)])
    unit, signs = torch.finfo(dtype).eps, z["weight"].float().view(2, 25, 400)
    for side, (got,) in zip((EPS, -EPS), seen):
        step = got.float() - model.weight.float().view(2, 25, 400)
        assert got.dtype == dtype and step.abs().max() <= unit
        assert (step * signs).mean().item() == pytest.approx(side, rel=0.1)
        assert step.mean().abs() < 0.1 * EPS
    again, _ = seen_by(model, lambda m: [m(tokens)])
    assert_bit_equal("the draw", again[0][0], seen[0][0])


def test_unbiased_rounding_is_exact_where_it_can_be():
    from lgkernels.optim.zeroth_order_passes import _unbiased

    exact = torch.tensor([[0.0, -0.0, 1.0, -2.5, 6e-8, 65504.0, float("inf"), float("nan")]])
    states = torch.tensor([[1, 2, 3]])
    for dtype in (torch.bfloat16, torch.float16):
        assert_bit_equal("exact", _unbiased(exact, dtype, states, "auto")[:, :4], exact.to(dtype)[:, :4])
        assert_bit_equal("special", _unbiased(exact, dtype, states, "auto")[:, 6:], exact.to(dtype)[:, 6:])
    tiny = torch.full((1, 4000), 1.5e-8)  # a quarter of float16's smallest number
    assert _unbiased(tiny, torch.float16, states, "auto").float().mean().item() == pytest.approx(1.5e-8, rel=0.15)
    assert _unbiased(-tiny, torch.float16, states, "auto").float().mean().item() == pytest.approx(-1.5e-8, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_half_batch_norm(dtype):
    model, x = nn.BatchNorm1d(16).to(dtype).eval(), (1.0 + 1e-2 * randn(64, 16)).to(dtype)
    seen, _ = seen_by(model, lambda m: [m(x - 1.0)])
    assert seen[0][0].dtype == dtype and not torch.equal(seen[0][0], seen[1][0])


# -- buffers ----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A buffer that is written to, one that is replaced, one that stands still."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(6)
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("still", torch.ones(3))
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append((self.norm.running_mean.clone(), self.replaced.item()))
            self.replaced = self.replaced + 1
        return self.linear(self.norm(x)) * self.still


@pytest.mark.parametrize("estimator", ["two-sided", "one-sided", "forward-gradient"])
def test_buffers_move_as_in_one_forward(estimator):
    x, target = randn(16, 6), targets(16, 3)
    model, plain = Counting(), Counting()
    plain.load_state_dict(model.state_dict())
    optimizer = ZerothOrder(model, lr=1e-4, members=2, estimator=estimator, law="sign")
    for step in range(3):
        before = {name: value.clone() for name, value in model.named_buffers()}
        model.seen.clear()
        optimizer.step(lambda: F.cross_entropy(model(x + step), target))
        assert all(torch.equal(mean, model.seen[0][0]) and n == step for mean, n in model.seen) or step == 0
        plain(x + step)
        for name, value in plain.named_buffers():
            torch.testing.assert_close(dict(model.named_buffers())[name], value, msg=name)
        assert model.norm.num_batches_tracked == step + 1 and not torch.equal(before["replaced"], model.replaced)


def test_every_evaluation_finds_the_same_buffers():
    x, target, model = randn(16, 6), targets(16, 3), Counting()
    optimizer = ZerothOrder(model, lr=1e-4, members=2, law="sign")
    optimizer.step(lambda: F.cross_entropy(model(x), target))
    assert len(model.seen) == 4
    assert all(torch.equal(mean, model.seen[0][0]) and number == 0 for mean, number in model.seen)


def test_buffers_that_begin_to_move_later():
    """A batch norm in evaluation mode costs no copy; when it trains, it moves once a step from the first step on."""
    x, target, model = randn(16, 6), targets(16, 3), Counting().eval()
    optimizer = ZerothOrder(model, lr=1e-4, members=2, law="sign")
    optimizer.step(lambda: F.cross_entropy(model(x), target))
    assert optimizer._moving == set() and model.norm.num_batches_tracked == 0
    model.train()
    for step in range(2):
        optimizer.step(lambda: F.cross_entropy(model(x), target))
        assert model.norm.num_batches_tracked == step + 1 and model.replaced == step + 1


def test_each_part_of_a_batch_moves_buffers():
    x, target, model = randn(16, 6), targets(16, 3), Counting()
    optimizer = ZerothOrder(model, lr=1e-4)
    for part in (slice(0, 8), slice(8, 16)):
        optimizer.accumulate(lambda: F.cross_entropy(model(x[part]), target[part]))
    optimizer.step()
    assert model.norm.num_batches_tracked == 2

"""The optimizer: estimates, what it may tune, and weights from its log."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgkernels.optim import ZerothOrder, ZerothOrderLog, replay
from lgkernels.random import RandomFeedback
from lgkernels.recipes import measure
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_bit_equal


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks, thousands of times: a second thread would be waited for, and nothing else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


X, TARGET = randn(32, 6), targets(32, 3)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def cross_entropy(model):
    return lambda: F.cross_entropy(model(X), TARGET)


def noise_of(optimizer, step, member=0):
    """{name: Z} by the documented formula."""
    from lgkernels.optim.zeroth_order_log import UNIT_SCALE, stream_of

    log, found = optimizer.log, {}
    for name, p in zip(log.parameters, optimizer.param_groups[0]["params"]):
        feedback = RandomFeedback(log.seed, stream_of(name), log.law, UNIT_SCALE[log.law])
        feedback.set_state(log.seed, stream_of(name), step * log.members + member)
        found[name] = feedback.materialize(p.shape or 1).view(p.shape).to(p.dtype)
    return found


def derivative(model, noise):
    """Along the noise, by back-propagation."""
    loss = F.cross_entropy(model(X.to(next(model.parameters()).dtype)), TARGET)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, [named[name] for name in noise])
    return sum((g * z).sum() for g, z in zip(grads, noise.values())).item()


def estimated(model, **options):
    """`(g, the derivative)` of one step of lr 1, from the log."""
    optimizer = ZerothOrder(model, lr=1.0, **options)
    true = derivative(model, noise_of(optimizer, 0))
    optimizer.step(lambda: F.cross_entropy(model(X.to(next(model.parameters()).dtype)), TARGET))
    return -optimizer.log[0].scalars[0], true


@pytest.mark.parametrize("law", ["normal", "sign", "uniform8"])
def test_a_two_sided_estimate_is_the_derivative_to_second_order(law):
    """Twice the eps, four times the error, in float64 through every layer's perturbed form."""
    errors = []
    for eps in (0.002, 0.004):
        g, true = estimated(network().double(), eps=eps, law=law)
        errors.append(g - true)
    assert abs(errors[0]) < 0.02 * abs(true) and errors[1] / errors[0] == pytest.approx(4, rel=0.05)


def test_a_one_sided_estimate_is_the_derivative_to_first_order():
    errors = []
    for eps in (1e-4, 2e-4):
        g, true = estimated(network().double(), eps=eps, estimator="one-sided")
        errors.append(g - true)
    assert abs(errors[0]) < 0.01 * abs(true) and errors[1] / errors[0] == pytest.approx(2, rel=0.05)


def test_a_forward_gradient_is_the_derivative():
    g, true = estimated(network(), estimator="forward-gradient")
    assert g == pytest.approx(true, rel=1e-4)


def test_members_are_averaged():
    model = network()
    optimizer = ZerothOrder(model, lr=0.5, members=3, law="sign", estimator="forward-gradient")
    true = [derivative(model, noise_of(optimizer, 0, m)) for m in range(3)]
    start = copy.deepcopy(model)
    optimizer.step(cross_entropy(model))
    assert optimizer.log[0].scalars == pytest.approx([-0.5 / 3 * g for g in true], rel=1e-4)
    for (name, p), old in zip(model.named_parameters(), start.parameters()):
        moved = sum(c * noise_of(optimizer, 0, m)[name] for m, c in enumerate(optimizer.log[0].scalars))
        torch.testing.assert_close(p - old, moved, rtol=1e-4, atol=1e-6)


# -- the log ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["sign", "normal"])
def test_two_thousand_steps_from_the_log(law):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    start = copy.deepcopy(model)
    optimizer = ZerothOrder(model, lr=0.02, law=law, weight_decay=0.01)
    for _ in range(2000):
        optimizer.step(cross_entropy(model))
    data = optimizer.log.to_bytes()
    assert len(data) < 12 * 2000 + 300
    assert cross_entropy(model)() < 0.9 * cross_entropy(start)()
    replay(start, ZerothOrderLog.from_bytes(data))
    for (name, p), other in zip(model.named_parameters(), start.parameters()):
        assert_bit_equal(name, other, p)


def test_a_log_is_replayed_by_another_backend(impl):
    """Bit for bit: as on another device."""
    model = network()
    start = copy.deepcopy(model)
    optimizer = ZerothOrder(model, lr=0.05, law="uniform8", members=2, weight_decay=0.1)
    for _ in range(3):
        optimizer.step(cross_entropy(model))
    replay(start, optimizer.log, impl=impl)
    for (name, p), other in zip(model.named_parameters(), start.parameters()):
        assert_bit_equal(name, other, p)


def test_a_run_goes_on_from_its_state():
    whole, first = network(), network()
    one, two = (ZerothOrder(m, lr=0.05, members=2) for m in (whole, first))
    for _ in range(4):
        one.step(cross_entropy(whole))
    for _ in range(2):
        two.step(cross_entropy(first))
    resumed = copy.deepcopy(first)
    three = ZerothOrder(resumed, lr=0.3, members=2)
    three.load_state_dict(two.state_dict())
    for _ in range(2):
        three.step(cross_entropy(resumed))
    for p, q in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(p, q)
    assert list(three.log) == list(one.log)
    with pytest.raises(ValueError, match="state_dict must have this members: 1, got 2"):
        ZerothOrder(network(), lr=0.3).load_state_dict(two.state_dict())


def test_bytes_of_something_else():
    with pytest.raises(ValueError, match="data must be bytes of ZerothOrderLog.to_bytes, got"):
        ZerothOrderLog.from_bytes(b"{}\n")
    with pytest.raises(ValueError, match="model must have the log's parameters, got none of the name '0.weight'"):
        replay(nn.Linear(2, 2), ZerothOrder(network(), lr=1.0).log)


# -- any model, any loss ----------------------------------------------------------------------------------------------


def test_accuracy_as_the_loss():
    """It has no derivative; the network learns what its accuracy says."""
    model, x = network(), randn(256, 6)
    target = x[:, :3].argmax(1)

    def errors():
        return (model(x).argmax(1) != target).float().mean()

    before = errors().item()
    optimizer = ZerothOrder(model, lr=0.5, eps=0.1, members=8, law="sign")
    for _ in range(150):
        optimizer.step(errors)
    assert errors().item() < 0.6 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_half_weights(dtype):
    model = network().to(dtype).requires_grad_(False)
    x, before = X.to(dtype), copy.deepcopy(model)

    def loss():
        return F.cross_entropy(model(x).float(), TARGET)

    optimizer = ZerothOrder(model, lr=0.02, eps=0.02, members=4)
    first = loss().item()
    for _ in range(100):
        optimizer.step(loss)
    assert loss().item() < 0.95 * first
    assert all(p.grad is None and not p.requires_grad and p.dtype == dtype for p in model.parameters())
    replay(before, optimizer.log)
    for p, q in zip(model.parameters(), before.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_that_could_not_hold_the_perturbation(dtype):
    """A normalisation's weights of 1, a convolution's, a factor: as in float32, rounded once."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"norm": nn.LayerNorm(64), "conv": nn.Conv1d(4, 4, 1, bias=False)}).to(dtype)
    model.factor = nn.Parameter(torch.ones(64, dtype=dtype))
    x, seen = randn(2, 4, 64).to(dtype), []

    def loss():
        seen.append((model["norm"](x), model["conv"](x), model.factor * x))
        return sum(y.float().square().mean() for y in seen[-1])

    optimizer = ZerothOrder(model, lr=1e-6, eps=4e-4, law="sign")
    before, z = copy.deepcopy(model).float(), noise_of(optimizer, 0)
    optimizer.step(loss)
    with torch.no_grad():
        for name, p in before.named_parameters():
            p.add_(z[name].float(), alpha=4e-4)
    wide = before["norm"](x.float()), before["conv"](x.float()), before.factor * x.float()
    for name, got, expected in zip(("norm", "conv", "factor"), seen[0], wide):
        assert got.dtype == dtype and (got - expected.to(dtype)).abs().max() <= torch.finfo(dtype).eps * 4, name
        assert (got == expected.to(dtype)).float().mean() > 0.99, name
    assert not torch.equal(seen[0][0], seen[1][0])


class Everything(nn.Module):
    """Weights used by others than their layer: tied, attention's, a recurrent net's, a bare parameter, views."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.ones(()))
        self.bare = nn.Parameter(torch.eye(8))

    def forward(self, tokens):
        h = self.embedding(tokens)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = self.norm(h + self.convolution(h.transpose(1, 2)).transpose(1, 2)) @ self.bare.T
        h, _ = self.recurrent(h)
        assert self.bare.shape == (8, 8) and self.bare.dim() == 2
        return F.linear(self.gain * h, self.embedding.weight)


@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
def test_weights_that_others_use_are_perturbed_there(estimator):
    """The loss at the perturbed weights is that of a copy which holds them; the weights themselves never change."""
    torch.manual_seed(0)
    model, tokens = Everything().double().eval(), torch.arange(20).view(2, 10) % 11
    other = copy.deepcopy(model)
    optimizer = ZerothOrder(model, lr=1e-30, eps=0.05, estimator=estimator, law="sign")
    z, seen = noise_of(optimizer, 0), []

    def loss():
        seen.append(F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))
        return seen[-1]

    optimizer.step(loss)
    expected = []
    for side in (0.05, -0.05) if estimator == "two-sided" else (0.0, 0.05):
        changed = copy.deepcopy(other)
        with torch.no_grad():
            for name, p in changed.named_parameters():
                p.add_(z[name], alpha=side)
            expected.append(F.cross_entropy(changed(tokens).flatten(0, 1), tokens.flatten()))
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=1e-9, atol=0)
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-25)


def test_a_step_holds_what_inference_holds():
    """And 5 % at most: the weights are 40 times as large as the activations here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))
    x = randn(32, 2048)
    optimizer = ZerothOrder(model, lr=1e-6, law="sign")

    @torch.no_grad()
    def loss():
        return model(x).square().mean()

    inference = measure.peak_memory(loss, x.device)
    optimizer.step(loss)
    assert 0 < measure.peak_memory(lambda: optimizer.step(loss), x.device) <= 1.05 * inference


def test_a_closure_that_fails_leaves_the_weights():
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = ZerothOrder(model, lr=0.1)

    def broken():
        model(X)
        raise KeyError("stop")

    with pytest.raises(KeyError):
        optimizer.step(broken)
    for name, value in model.state_dict().items():
        assert_bit_equal(name, value, before[name])
    optimizer.step(cross_entropy(model))
    assert len(optimizer.log) == 1


def test_both_sides_see_the_same_dropout():
    model, seen = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)), []
    model[0].register_forward_hook(lambda module, inputs, out: seen.append(out))
    optimizer = ZerothOrder(model, lr=0.1, members=2)
    optimizer.step(cross_entropy(model))
    assert len(seen) == 4 and all(torch.equal(out, seen[0]) for out in seen)
    optimizer.step(cross_entropy(model))
    assert not torch.equal(seen[4], seen[0])


@pytest.mark.unpoisoned
def test_a_compiled_model_is_perturbed_too():
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X)
    plain = copy.deepcopy(model)
    ZerothOrder(compiled, lr=0.1, law="sign").step(lambda: F.cross_entropy(compiled(X), TARGET))
    ZerothOrder(plain, lr=0.1, law="sign").step(cross_entropy(plain))
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q)


# -- parts, ranks, choices --------------------------------------------------------------------------------------------


def test_parts_of_a_batch_are_averaged():
    one, two = network(), network()
    whole, parts = ZerothOrder(one, lr=0.1, members=2), ZerothOrder(two, lr=0.1, members=2)
    whole.step(cross_entropy(one))
    for half in (slice(0, 16), slice(16, 32)):
        parts.accumulate(lambda: F.cross_entropy(two(X[half]), TARGET[half]))
    assert parts.step() is None
    assert parts.log[0].scalars == pytest.approx(whole.log[0].scalars, rel=1e-2)
    with pytest.raises(TypeError, match="closure must be callable where nothing is accumulated.* GradScaler's step"):
        parts.step()


@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
def test_ranks_do_not_feel_the_scale_of_a_loss(estimator):
    one, two = network(), network()
    for model, scale in ((one, 1.0), (two, 1000.0)):
        optimizer = ZerothOrder(model, lr=0.01, members=4, ranked=True, estimator=estimator, law="sign")
        for _ in range(3):
            optimizer.step(lambda: scale * F.cross_entropy(model(X), TARGET).exp())
    for p, q in zip(one.parameters(), two.parameters()):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="ranked must be False with one loss a step"):
        ZerothOrder(network(), lr=0.1, ranked=True, estimator="forward-gradient")


def test_ranks_are_centred():
    from lgkernels.optim.zeroth_order import _ranks

    losses = torch.tensor([[3.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    assert _ranks(losses).tolist() == [[0.5, -0.5], [0.0, 0.0]]


def test_what_is_included_alone_is_tuned():
    model = network()
    before = copy.deepcopy(model.state_dict())
    ZerothOrder(model, lr=0.1, include=["3", "0.bias"]).step(cross_entropy(model))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.bias", "3.weight", "3.bias"}
    model[0].requires_grad_(False)
    assert ZerothOrder(model, lr=0.1).log.parameters == ("2.weight", "2.bias", "3.weight", "3.bias")
    with pytest.raises(ValueError, match="include must name modules of the model, got 'head'"):
        ZerothOrder(model, lr=0.1, include="head")


def test_a_loss_that_is_not_finite_changes_nothing():
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = ZerothOrder(model, lr=0.1)
    loss = optimizer.step(lambda: F.cross_entropy(model(X), TARGET) * math.nan)
    assert loss.isnan() and not len(optimizer.log)
    for name, value in model.state_dict().items():
        assert_bit_equal(name, value, before[name])


@pytest.mark.parametrize("value", ["0.5", torch.ones(2), None, True])
def test_a_loss_is_a_number(value):
    model = network()
    optimizer = ZerothOrder(model, lr=0.1)
    with pytest.raises(TypeError, match="closure must return the loss, a number or a tensor of one, got"):
        optimizer.step(lambda: (model(X), value)[1])


def test_a_closure_may_not_write_to_weights():
    model = network()
    optimizer = ZerothOrder(model, lr=0.1)
    with pytest.raises(RuntimeError, match="closure must not write to a parameter that is tuned, got a call of mul_"):
        optimizer.step(lambda: (model[0].weight.mul_(2), model(X).sum())[1])


def test_a_schedule_moves_the_learning_rate():
    model = network()
    optimizer = ZerothOrder(model, lr=0.5, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(2):
        optimizer.step(cross_entropy(model))
        schedule.step()
    assert [record.keep for record in optimizer.log] == [0.75, 0.875]

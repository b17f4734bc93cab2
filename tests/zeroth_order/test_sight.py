"""Parameters that a step does not use stay as they are; those that are out of sight are refused."""

import copy

import pytest
import torch
from torch import nn

from lgkernels.optim import ZerothOrder, ZerothOrderLog, replay
from tests.support.problems import randn
from tests.support.tolerances import assert_bit_equal

X = randn(8, 6)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.out = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 1)

    def forward(self, x, *which):
        return self.out(sum(torch.tanh(self.experts[i](x)) for i in which)).square().mean()


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("estimator", ["two-sided", "one-sided", "forward-gradient"])
def test_experts_that_no_token_reaches_do_not_move(estimator):
    """Nor decay; the log says so, and rebuilds the weights to the bit."""
    model = Experts()
    start = copy.deepcopy(model)
    optimizer = ZerothOrder(model, lr=0.1, law="sign", members=2, weight_decay=0.1, estimator=estimator)
    chosen = [(0,), (0, 2), (1,), (0, 1, 2), (2,), (2,)]
    for step, which in enumerate(chosen):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        if not step:
            with pytest.warns(
                UserWarning, match="closure should use all .* got 'experts.1.weight' and 3 more, which the"
            ):
                optimizer.step(lambda: model(X, *which))
        else:
            for i in which:  # parts that differ in what they use
                optimizer.accumulate(lambda: model(X, i))
            optimizer.step()
        used = {f"experts.{i}.{kind}" for i in which for kind in ("weight", "bias")} | {"out.weight", "out.bias"}
        assert changed(model, before) == used
        assert {name for name in optimizer.log.parameters if optimizer.log.moves(name, step)} == used
    log = ZerothOrderLog.from_bytes(optimizer.log.to_bytes())
    replay(start, log)
    for (name, p), other in zip(model.named_parameters(), start.named_parameters()):
        assert_bit_equal(name, other[1], p)
    assert log.to_bytes() == optimizer.log.to_bytes()


def test_the_ranges_of_a_run_that_goes_on():
    model = Experts()
    optimizer = ZerothOrder(model, lr=0.1, include="experts")
    with pytest.warns(UserWarning):
        optimizer.step(lambda: model(X, 0))
    twin = copy.deepcopy(model)
    other = ZerothOrder(twin, lr=0.1, include="experts")
    other.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        other.step(lambda: twin(X, 0)), optimizer.step(lambda: model(X, 0))
    assert other.log.to_bytes() == optimizer.log.to_bytes() and b'"experts.1.weight": [[0, 3]]' in other.log.to_bytes()
    assert other.log.moves("experts.1.weight", 3) and not other.log.moves("experts.1.weight", 2)


def test_an_evaluation_that_fails_uses_nothing():
    model = Experts()
    optimizer = ZerothOrder(model, lr=0.1)
    with pytest.raises(KeyError):
        optimizer.step(lambda: (model(X, 1), {}["none"]))
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning):
        optimizer.step(lambda: model(X, 0))
    assert not {name for name in changed(model, before) if name.startswith("experts.1")}


@pytest.mark.parametrize("estimator", ["two-sided", "forward-gradient"])
def test_where_nothing_is_used(estimator):
    model = Experts()
    optimizer = ZerothOrder(model, lr=0.1, include="experts.1", estimator=estimator)
    for _ in range(2):
        with pytest.raises(
            ValueError, match="include must pick parameters that the closure uses .* 'experts.1.weight'"
        ):
            optimizer.step(lambda: model(X, 0))
    optimizer.step(lambda: model(X, 1))
    assert len(optimizer.log) == 1


def test_parameters_inside_of_torchscript_are_named():
    model = nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 1)))
    with pytest.raises(ValueError, match="include must pick parameters .* '1.weight' and 1 more, .* TorchScript"):
        ZerothOrder(model, lr=0.1).step(lambda: model(X).sum())


def test_several_processes_use_the_same(monkeypatch):
    """They would differ in what they move."""
    model = Experts()
    optimizer = ZerothOrder(model, lr=0.1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="each step uses where several processes run, got 'experts.1.weight' and 3"):
        optimizer.step(lambda: model(X, 0))
    optimizer.step(lambda: model(X, 0, 1, 2))


def replaced_weight(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def replaced_module(model):
    model[0] = nn.Linear(6, 6)


def assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def untied(model):
    model[2].weight = nn.Parameter(torch.zeros(6, 6))


@pytest.mark.parametrize("replace", [replaced_weight, replaced_module, assigned, untied], ids=lambda f: f.__name__)
def test_what_is_replaced_later_is_named(replace):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2].weight = model[1].weight
    optimizer = ZerothOrder(model, lr=0.1)
    optimizer.step(lambda: model(X).square().mean())
    replace(model)
    with pytest.raises(
        RuntimeError, match=r"hold the parameters that ZerothOrder was made with, got '[01].weight' repl"
    ):
        optimizer.step(lambda: model(X).square().mean())


def test_a_parametrization_takes_the_parameter_along():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
    optimizer = ZerothOrder(model, lr=0.1)
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    before = copy.deepcopy(model.state_dict())
    optimizer.step(lambda: model(X).square().mean())
    assert changed(model, before) == set(before)

"""`train --rule zeroth-order`: the step of the command's trainer, and a run that goes on where it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgkernels.optim import ZerothOrder
from lgkernels.recipes import checkpoint, rules
from lgkernels.recipes.options import UsageError
from tests.support.problems import randn, targets


def trainer(model, **options):
    record = rules.get("zeroth-order")
    task = rules.Task(record, record.options(**options), network=model, seed=3)
    return record.trainer(record.build(task), lambda p: torch.optim.SGD(p, 0.05), task, grad_scaler=None)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_a_step_is_the_optimizers():
    model, x, target = network(), randn(16, 6), targets(16, 3)
    plain = copy.deepcopy(model)
    ours = trainer(model, directions=2, perturbation=0.01, perturbation_law="normal")
    own = ZerothOrder(nn.Sequential(plain), 0.05, eps=0.01, members=2, seed=3)
    for _ in range(3):
        loss = ours.step(x, target)
        expected = own.step(lambda: F.cross_entropy(plain(x), target))
        assert loss.shape == (1,) and loss.item() == expected.item()
    assert ours.output.shape == (16, 3)
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.equal(p, q)


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    x, target = randn(16, 6), targets(16, 3)
    whole, first = trainer(network()), trainer(network())
    for _ in range(4):
        whole.step(x, target)
    for _ in range(2):
        first.step(x, target)
    checkpoint.save(tmp_path / "state", first.state_dict())
    second = trainer(network())
    second.load_state_dict(checkpoint.load(tmp_path / "state"))
    for _ in range(2):
        second.step(x, target)
    for p, q in zip(whole.blocks[0].parameters(), second.blocks[0].parameters()):
        assert torch.equal(p, q)


def test_options_are_checked():
    with pytest.raises(UsageError, match="--estimator must be one of: two-sided, one-sided, forward-gradient, got 'x'"):
        rules.get("zeroth-order").options(estimator="x")
    with pytest.raises(UsageError, match="--directions must be positive, got 0"):
        rules.get("zeroth-order").options(directions=0)

"""Copies and pickles of the optimizer hold a model of their own, and go on as the original does."""

import copy
import io

import pytest
import torch
from torch import nn

from lgkernels.optim import ZerothOrder


def loss_of(model):
    return lambda: model(torch.ones(2, 3)).square().mean()


def pickled(value):
    kept = io.BytesIO()
    torch.save(value, kept)
    kept.seek(0)
    return torch.load(kept, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
def test_they_go_on(again):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = ZerothOrder(model, lr=0.1, law="sign", members=2)
    optimizer.step(loss_of(model))
    optimizer.accumulate(loss_of(model))
    twin = again(optimizer)
    other = twin.model
    assert other is not model
    for _ in range(3):
        assert torch.equal(optimizer.step(loss_of(model)), twin.step(loss_of(other)))
    assert list(optimizer.log) == list(twin.log) and len(twin.log) == 4
    for mine, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert mine is not theirs and torch.equal(mine, theirs)


def test_with_the_model():
    """One copy of both is a pair again."""
    model = nn.Linear(3, 2)
    twin, optimizer = copy.deepcopy((model, ZerothOrder(model, lr=0.1)))
    before = twin.weight.detach().clone()
    optimizer.step(loss_of(twin))
    assert optimizer.model is twin and not torch.equal(twin.weight, before)

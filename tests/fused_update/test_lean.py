"""The torch backend against torch's own optimizers with the gradient written out: no more operations and bytes."""

import pytest
import torch

from lgkernels.ops.fused_update import torch as lean
from tests.fused_update.common import STEPS, states
from tests.support.counting import Count, Counter, assert_lean, count
from tests.support.problems import randn

pytestmark = pytest.mark.unpoisoned  # which writes
M, N, K = 16, 192, 256


@pytest.mark.parametrize("name", ["sgd", "decay", "momentum", "nesterov"])
def test_sgd(name):
    """The gradient and torch's fused step: one pass over it, the weight and the momentum, which are written."""
    rule = STEPS[name]
    weight, grad, x = randn(N, K), randn(M, N), randn(M, K, seed=1)
    buffer = randn(N, K, seed=1) if states(name) else None
    matrices, small = 3 if buffer is None else 5, 4 * (M * N + M * K)
    ours = count(lean.update_, weight, buffer, None, None, grad, x, rule)
    # a foreach step of the same: weight decay, momentum, gradient, weight
    decay, momentum, nesterov = bool(rule.weight_decay), buffer is not None, rule.nesterov
    foreach = Count(
        1 + decay + 2 * momentum + nesterov + 1, small + 4 * N * K * (1 + 3 * decay + 5 * momentum + 3 * nesterov + 3)
    )
    assert_lean("torch's foreach step", ours, foreach, factor=1.0)
    if not decay and not nesterov:
        assert_lean("torch's fused step", ours, Count(2, small + 4 * N * K * (1 + matrices)))


def test_adamw():
    parameter = torch.nn.Parameter(randn(N, K))
    optimizer = torch.optim.AdamW([parameter], foreach=False)
    grad, x = randn(M, N), randn(M, K, seed=1)
    parameter.grad = torch.zeros(N, K)
    optimizer.step()
    with Counter() as theirs:
        parameter.grad = grad.t() @ x
        optimizer.step()
    own = randn(N, K), randn(N, K, seed=1), randn(N, K, seed=2).abs()
    assert_lean("torch's single-tensor step", count(lean.update_, *own, None, grad, x, STEPS["adamw"]), theirs.count)

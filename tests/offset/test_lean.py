"""The torch backend against what the bench sets beside it, an addition and torch's SGD(foreach=True): no more than 1.15
of the operations and bytes."""

import pytest
import torch

from bench.offset import SHAPES
from lgkernels.ops.offset import torch as lean
from lgkernels.ops.offset.options import StepOptions
from tests.support.counting import Counter, assert_lean, count
from tests.support.problems import randn

STEPS = [dict(momentum=0.9), dict(momentum=0.0), dict(momentum=0.9, weight_decay=0.01)]


def tensors():
    return [[randn(*shape, seed=k) for shape in SHAPES["small"]] for k in range(4)]


@pytest.mark.parametrize("options", STEPS, ids=str)
def test_step(options):
    params, grads, buffers, offsets = tensors()
    contestant = torch.optim.SGD([torch.nn.Parameter(p) for p in params], lr=0.1, foreach=True, **options)
    for p, grad, buffer in zip(contestant.param_groups[0]["params"], grads, buffers):
        p.grad = grad.clone()
        contestant.state[p]["momentum_buffer"] = buffer.clone()
    with Counter() as theirs:
        torch._foreach_add_([p.grad for p in contestant.param_groups[0]["params"]], offsets)
        contestant.step()
    buffers = buffers if options["momentum"] else []
    numbers = StepOptions(0.1, options["momentum"], options.get("weight_decay", 0.0), 1.0, 1.0)
    assert_lean("step", count(lean.step_, params, grads, buffers, offsets, numbers), theirs.count)
    assert theirs.operations < 10, theirs.names

"""OffsetOptimizer: offsets with any torch optimizer."""

import copy

import pytest
import torch
from torch import nn

import lgkernels.nn as lnn
from lgkernels.optim import OffsetOptimizer
from lgkernels.training import BlockwiseTrainer
from tests.offset.test_optimizer import Net, batch, local_step, sgd
from tests.support.tolerances import assert_relative

D = torch.float64


@pytest.mark.parametrize(
    "coefficients", [dict(local_scale=0.7, offset_scale=0.4), dict(local_coef=0.0), dict(bp_coef=2.0, local_coef=0.5)]
)
def test_the_wrapper_is_offset_sgd(coefficients):
    ours, other = Net(), Net()
    optimizer = sgd(ours, **coefficients)
    wrapper = OffsetOptimizer(torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9), **coefficients)
    for i in range(4):
        for net, o in ((ours, optimizer), (other, wrapper)):
            if i % 2 == 0:
                o.refresh(net.bp, net.local, batch(10 + i))
            local_step(net, o, batch(i))
    for p, q in zip(ours.parameters(), other.parameters()):
        assert_relative("parameter", p, q, 1e-12)


def test_the_wrapper_takes_groups_that_are_added_later():
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    wrapper = OffsetOptimizer(torch.optim.SGD([p], lr=0.5), local_scale=2.0)
    wrapper.optimizer.add_param_group({"params": [q]})
    q.grad = torch.ones(2)
    wrapper.step()
    assert q.tolist() == [0.0, 0.0] and p.tolist() == [1.0, 1.0]


def test_the_wrapper_is_an_optimizer():
    """Schedules, groups of later, a closure that the optimizer calls more than once, copies."""
    w, q = (nn.Parameter(torch.full((2,), 3.0, dtype=D)) for _ in range(2))
    wrapper = OffsetOptimizer(torch.optim.SGD([w], lr=1.0), offset_scale=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(wrapper, 1, gamma=0.1)
    wrapper.add_param_group({"params": [q], "offset_scale": 0.0})
    wrapper.refresh(lambda x: (w * x).sum() + (q * x).sum(), None, torch.ones(1, dtype=D))
    twin = copy.deepcopy(wrapper)
    for optimizer in (wrapper, twin):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.zeros_like(w)
        optimizer.step()
    schedule.step()
    assert w.tolist() == [2.5, 2.5] and q.tolist() == [3.0, 3.0] and wrapper.param_groups[0]["lr"] == 0.1
    assert twin.param_groups[0]["params"][0].tolist() == w.tolist() and len(twin.offsets()) == 2

    calls, wrapper = [], OffsetOptimizer(torch.optim.LBFGS([w], max_iter=50, tolerance_grad=1e-12))
    wrapper.refresh(lambda x: (w * x).sum(), None, torch.full((1,), -4.0, dtype=D))

    def closure():
        calls.append(1)
        wrapper.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    wrapper.step(closure)
    assert len(calls) > 1
    assert_relative("minimum of w^2 - 4 w", w, torch.full((2,), 2.0, dtype=D), 1e-6)


@pytest.mark.parametrize(
    "state, error, message",
    [
        (None, TypeError, r"state must be a dict, that of state_dict\(\), got NoneType"),
        ({"offsets": [None]}, ValueError, "state must hold 'optimizer', got a dict without"),
    ],
)
def test_what_is_no_state(state, error, message):
    with pytest.raises(error, match=message):
        OffsetOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], 0.1)).load_state_dict(state)


def test_the_wrapper_passes_on_what_only_the_optimizer_has():
    """The modes of a schedule-free optimizer, in a loop and in a trainer; nothing that the optimizer lacks."""
    schedulefree = pytest.importorskip("schedulefree")

    def blocks():
        torch.manual_seed(1)
        return [lnn.LocalClassifier(nn.Linear(6, 8), 8, 3), lnn.ClassifierBlock(nn.Linear(8, 3))]

    x, y = torch.randn(32, 6), torch.arange(32) % 3
    outputs = []
    for wrap in (lambda o: o, OffsetOptimizer):
        trainer = BlockwiseTrainer(blocks(), lambda p, w=wrap: w(schedulefree.AdamWScheduleFree(p, lr=0.05)))
        for _ in range(5):
            trainer.step(x, y)
        outputs.append((trainer.predict(x), trainer.eval().predict(x), trainer.train().predict(x)))
    for bare, wrapped in zip(*outputs):
        assert torch.equal(bare, wrapped)
    assert not torch.equal(*outputs[1][:2])

    class Warm(torch.optim.SGD):
        _step_supports_amp_scaling = True  # a promise that the wrapper's step does not keep

        def warm_up(self, factor):
            self.param_groups[0]["lr"] *= factor
            return self

    wrapper = OffsetOptimizer(Warm([nn.Parameter(torch.ones(1))], lr=0.5))
    assert wrapper.warm_up(0.5) is wrapper.optimizer and wrapper.param_groups[0]["lr"] == 0.25
    assert not hasattr(wrapper, "train") and not hasattr(wrapper, "_step_supports_amp_scaling")
    assert copy.deepcopy(wrapper).optimizer is not wrapper.optimizer

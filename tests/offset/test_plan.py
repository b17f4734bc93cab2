"""What `OffsetSGD` keeps of a step for the next one, and when it may."""

import sys

import pytest
import torch
from torch import nn

from lgkernels.core import native
from lgkernels.optim import OffsetSGD, offset
from tests.support.tolerances import assert_relative


def planned(count=3):
    """An optimizer that has taken two steps, its parameters, and twins under torch's."""
    params = [nn.Parameter(torch.arange(4.0) + i) for i in range(count)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours, rival = OffsetSGD(params, 0.5, 0.9), torch.optim.SGD(twins, 0.5, 0.9)
    for _ in range(2):
        fresh_step(ours, rival, params, twins)
    return ours, rival, params, twins


def fresh_step(ours, rival, params, twins):
    for i, (p, q) in enumerate(zip(params, twins)):
        p.grad, q.grad = (torch.full((4,), 1 + i / 8) for _ in range(2))
    ours.step()
    rival.step()
    for p, q in zip(params, twins):
        assert_relative("parameter", p, q, 1e-6)


@pytest.mark.skipif(native.native() is None, reason="the native module is not there")
def test_gradients_that_move_are_new_addresses_in_the_same_table(monkeypatch):
    monkeypatch.delenv("LGKERNELS_IMPL", raising=False)
    case, tables = planned(), []
    (plan,) = case[0]._plans.values()
    for _ in range(3):
        fresh_step(*case)
        tables.append(case[0]._plans[0].launches[0].table[:, 1].tolist())
        assert case[0]._plans[0] is plan
    assert tables[0] != tables[1]
    for change in ("one has no gradient", "a state of its own", "another dtype"):
        ours, rival, params, twins = case
        if change == "one has no gradient":
            for some, optimizer in ((params, ours), (twins, rival)):
                for p in some[1:]:
                    p.grad = torch.ones(4)
                some[0].grad = None
                optimizer.step()
        elif change == "a state of its own":
            for p, optimizer in ((params[1], ours), (twins[1], rival)):
                optimizer.state[p] = {"momentum_buffer": torch.full((4,), 7.0)}
        else:
            for p in (params[2], twins[2]):
                p.data = p.data.double()
                p.grad = None
            for p, optimizer in ((params[2], ours), (twins[2], rival)):
                optimizer.state[p]["momentum_buffer"] = torch.zeros(4, dtype=torch.float64)
                for q in params if optimizer is ours else twins:
                    q.grad = torch.ones_like(q)
                optimizer.step()
            assert_relative("parameter", params[2], twins[2], 1e-6)
            break
        fresh_step(*case)
        assert case[0]._plans[0] is not plan
        plan = case[0]._plans[0]


@pytest.mark.skipif(native.native() is None, reason="the native module is not there")
def test_no_python_runs_for_a_parameter_where_nothing_is_new(monkeypatch):
    """By counting the Python calls of a step, of 5 parameters and of 50."""
    monkeypatch.delenv("LGKERNELS_IMPL", raising=False)
    counts = []
    for count in (5, 50):
        optimizer, calls = planned(count)[0], []
        optimizer.step()
        sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == "call" else None)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
        counts.append(len(calls))
    assert counts[0] == counts[1] < 60


def test_a_first_step_inside_a_capture_says_what_to_do(monkeypatch):
    """A graph would make the momentum buffers zero at each replay. Nothing stays that a later step would use."""
    monkeypatch.setattr(offset, "capturing", lambda device: True)
    p = nn.Parameter(torch.ones(4))
    optimizer = OffsetSGD([p], 0.5, 0.9)
    p.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="must not be captured in a CUDA graph.*: take a step before the capture"):
        optimizer.step()
    assert torch.equal(p, torch.ones(4)) and "momentum_buffer" not in optimizer.state[p]
    monkeypatch.undo()
    optimizer.step()
    monkeypatch.setattr(offset, "capturing", lambda device: True)
    optimizer.step()

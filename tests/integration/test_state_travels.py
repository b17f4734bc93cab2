"""Random state is in no state_dict: what torch's own tools do to a model's memory leaves it right, or it raises."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lgkernels.nn as lnn
from lgkernels.core import carried
from lgkernels.random import RandomFeedback

SEED = 2**40 + 12345  # float32 does not hold it


def net(device=None):
    layer = dict(device=device)
    return nn.Sequential(nn.Conv2d(2, 4, 3, **layer), nn.Flatten(), nn.Linear(16, 8, **layer), nn.Linear(8, 2, **layer))


def dirty():
    """What the allocator hands out next is not zero."""
    del [torch.full((3,), 0x7777777777777777, dtype=torch.int64) for _ in range(500)][:]


def run(model):
    model(torch.ones(1, 2, 4, 4)).sum().backward()


RULES = {"fa": {}, "frsf": {}, "brsf": {}, "formula": dict(rule="signed_init", signs="formula")}


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("rule", RULES)
def test_to_empty_and_load_state_dict(rule, where):
    options = {"rule": rule, **RULES[rule]}
    trained = lnn.convert(net(), **options, seed=SEED, verbose=False)
    model = lnn.convert(net(where), **options, seed=SEED, verbose=False)
    dirty()
    model.to_empty(device="cpu")
    model.load_state_dict(trained.state_dict())
    run(model)
    for i in (0, 2):
        assert model[i].feedback.state.tolist() == trained[i].feedback.state.tolist()
        assert torch.equal(model[i].feedback_weight(), trained[i].feedback_weight())


def test_the_step_survives_to_empty():
    layer = lnn.SignSymmetricLinear(3, 2, rule="brsf")
    layer.feedback.advance()
    dirty()
    assert layer.to_empty(device="cpu").feedback.state.tolist() == [0, 0, 1]


def test_frozen_signs():
    """Carried where they are; lost with a meta device they raise, until load_feedback_state brings them."""
    options = dict(rule="signed_init", signs="weight", verbose=False)
    trained = lnn.convert(net(), **options)
    signs = trained[0].frozen_signs.clone()
    state, saved = copy.deepcopy(trained.state_dict()), lnn.feedback_state(trained)
    dirty()
    trained.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(trained[0].frozen_signs, signs)
    model = lnn.convert(net("meta"), **options).to_empty(device="cpu")
    model.load_state_dict(state)
    with pytest.raises(ValueError, match="frozen_signs must be on cpu like weight, got meta"):
        run(model)
    lnn.load_feedback_state(model, saved)
    run(model)
    assert torch.equal(model[0].feedback_weight(), trained[0].feedback_weight())


@pytest.mark.parametrize("given", [{}, {"feedback": torch.eye(3, 4)}], ids=["formula", "matrix"])
def test_direct_feedback(given):
    place = lnn.DirectFeedback(seed=SEED, stream=9, **given)
    want, state = place.matrix(3, (4,)).clone(), copy.deepcopy(place.state_dict())
    dirty()
    place.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(place.matrix(3, (4,)), want)


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_statistics_of_the_input(where):
    with torch.device(where):
        unit = lnn.InfoProUnit(nn.Conv2d(3, 4, 3), 4, 5, 3, mean=(0.1, 0.2, 0.3), std=0.25)
    assert unit.mean.device.type == where
    dirty()
    unit.to_empty(device="cpu")
    assert torch.equal(unit.mean, torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) and unit.std.item() == 0.25


@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}], ids=["swa", "ema"])
@pytest.mark.parametrize("updates", [1, 2, 5])
def test_an_average_of_the_buffers_leaves_the_seed(average, updates):
    model = lnn.convert(net(), "fa", seed=SEED, verbose=False)
    place = nn.Sequential(lnn.DirectFeedback(seed=SEED))
    for _ in range(5):
        model[0].feedback.set_state(SEED, model[0].feedback.stream, 0)  # its version is that of the averages below
    averaged, places = (AveragedModel(m, use_buffers=True, **average) for m in (model, place))
    for _ in range(updates):
        averaged.update_parameters(model)
        places.update_parameters(place)
    run(averaged.module)
    for i in (0, 2):
        assert torch.equal(averaged.module[i].feedback_weight(), model[i].feedback_weight())
    assert lnn.feedback_state(averaged.module) == lnn.feedback_state(model)
    assert torch.equal(places.module[0].matrix(3, (4,)), place[0].matrix(3, (4,)))


def test_a_state_of_another_seed_raises():
    feedback = RandomFeedback(5, 6)
    feedback.state[0] = 7
    with pytest.raises(
        ValueError, match=r"must have its seed 5 and stream 6, got \[7, 6\]: give it others by set_state"
    ):
        feedback.materialize((2, 3))
    feedback.set_state(7, 6, 0)
    assert torch.equal(feedback.materialize((2, 3)), RandomFeedback(7, 6).materialize((2, 3)))


def test_a_feedbacks_own_steps_need_no_look(monkeypatch):
    """A look waits for the device: one at the first use, none after `advance`, one after anybody else has written."""
    looks = []
    monkeypatch.setattr(carried, "_verify", lambda feedback, state: looks.append(state.tolist()))
    feedback = RandomFeedback(7)
    for _ in range(3):
        feedback.materialize((2, 2))
        feedback.advance()
    assert looks == [[7, 0, 0]]
    feedback.state.add_(0)
    feedback.advance()
    feedback.materialize((2, 2))
    assert looks == [[7, 0, 0], [7, 0, 4]]

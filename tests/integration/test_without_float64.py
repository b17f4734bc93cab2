"""Devices without float64: no public function, layer or optimizer makes a tensor of float64 there."""

import contextlib

import pytest
import torch

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.optim import BatchManhattan, OffsetOptimizer, OffsetSGD, ZerothOrder
from lgkernels.optim.fused_factors import squared_norm
from lgkernels.random import RandomFeedback, random_matrix
from tests.support.calls import all_calls, flat, is_float
from tests.support.metal import Metal, OnMetal

CALLS = all_calls()


@pytest.fixture
def metal():
    with Metal() as mode:
        yield mode


def moved(value):
    if isinstance(value, (tuple, list)):
        return type(value)(map(moved, value))
    if isinstance(value, dict):
        return {key: moved(v) for key, v in value.items()}
    if isinstance(value, torch.nn.Module):
        for module in value.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        made = Metal.put(tensor)
                        trained = isinstance(tensor, torch.nn.Parameter)
                        table[name] = torch.nn.Parameter(made, tensor.requires_grad) if trained else made
        return value
    return Metal.put(value)


def back(value):
    return value.values_ if isinstance(value, OnMetal) else value


def test_the_device_has_no_float64(metal):
    x = Metal.put(torch.ones(3))
    assert x.device.type == "mps" and (x * 2).device.type == "mps" and torch.zeros(2, device=x.device).shape == (2,)
    for wrong in (x.double, lambda: torch.zeros(2, device=x.device, dtype=torch.float64)):
        with pytest.raises(TypeError, match="Cannot convert a MPS Tensor to torch.float64"):
            wrong()
    assert x.cpu().double().dtype == torch.float64


FUNCTIONS = [  # the others ask for more of a device than the stand-in has: addresses, generators, complex numbers
    name
    for name in CALLS
    if getattr(LF, name).__module__.rpartition(".")[2] in ("adapter", "contrastive", "local_loss")
    and name != "overlay_label"
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, metal):
    given = {key: moved(value) for key, value in CALLS[name].arguments.items()}
    if "device" in given:
        given["device"] = None
    leaves = [value.requires_grad_() for value in given.values() if is_float(value)]
    results = flat(getattr(LF, name)(**given))
    for result in results:
        if isinstance(result, torch.Tensor) and result.requires_grad:
            result.sum().backward(retain_graph=True)
    assert not leaves or any(t.device.type == "mps" for t in results if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("law, low", [("normal", None), ("uniform", 0.25), ("uniform8", 0.25), ("uniform", None)])
def test_random_values(law, low, metal):
    state = torch.tensor([1, 2, 3])
    expected = random_matrix(state, 5, 7, law, 1.5, low)
    assert torch.equal(random_matrix(Metal.put(state), 5, 7, law, 1.5, low).values_, expected)
    feedback = moved(RandomFeedback(1, 2, law, 1.5, low))
    assert feedback.materialize((4, 3)).device.type == "mps"


def test_the_angle_of_the_weights(metal):
    weights = {"in-h/kernel": torch.randn(2, 3), "h-out/kernel": torch.randn(3, 2), "out-h/kernel": torch.randn(2, 3)}
    expected = LF.weight_angle(weights)
    found = LF.weight_angle({name: Metal.put(weight) for name, weight in weights.items()})
    assert found.device.type == "mps"
    torch.testing.assert_close(found.values_, expected)


@pytest.mark.parametrize("with_sum", [False, True])
def test_the_norm_of_factors(with_sum, metal):
    grad, x, dense = torch.randn(2, 30), torch.randn(2, 40), torch.randn(30, 40) if with_sum else None
    expected = grad.t() @ x + (0 if dense is None else dense)
    found = squared_norm(Metal.put(grad), Metal.put(x), None if dense is None else Metal.put(dense))
    torch.testing.assert_close(found.values_, expected.square().sum())


RULES = [
    ("usf", {}),
    ("fa", {}),
    ("frsf", {}),
    ("brsf", {}),
    ("signed_init", dict(signs="formula")),
    ("frsf", dict(law="normal")),
]


@pytest.mark.parametrize("rule, options", RULES)
def test_layers_and_their_instruments(rule, options, metal):
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.device("cpu"))
        model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.Flatten(), torch.nn.Linear(12, 4))
        model = lnn.convert(model, rule, **options)
    expected = lnn.alignment(model), lnn.weight_ratio(model)
    x = torch.randn(5, 2, 3, 3)
    model(x).square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    model = moved(model)
    model(Metal.put(x)).square().sum().backward()
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad.values_, gradient, rtol=1e-4, atol=1e-4)
    found = lnn.alignment(model), lnn.weight_ratio(model)
    for ours, theirs in zip(found, expected):
        assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("make", [OffsetSGD, lambda p, lr: OffsetOptimizer(torch.optim.SGD(p, lr))])
def test_refreshes_of_offsets(make, metal):
    """The second has norms to compare with."""
    weight = torch.nn.Parameter(Metal.put(torch.randn(3, 4)))
    optimizer = make([weight], 0.1)
    x = Metal.put(torch.randn(16, 4))
    scales = dict(estimate_local_scale=True, estimate_offset_scale=True)
    for options in ({}, dict(max_growth=2.0), scales):
        optimizer.refresh(
            lambda x: (x @ weight.t()).square().mean(), lambda x: (x @ weight.t()).abs().sum(), x, **options
        )
        (x @ weight.t()).sum().backward()
        optimizer.step()
    assert optimizer.offsets() and weight.values_.isfinite().all()


@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
@pytest.mark.parametrize("law", ["normal", "sign"])
def test_zeroth_order(law, estimator, metal):
    model = moved(torch.nn.Linear(4, 3))
    x = Metal.put(torch.randn(8, 4))
    before = model.weight.values_.clone()
    ZerothOrder(model, 0.1, law=law, estimator=estimator).step(lambda: model(x).square().mean())
    assert not torch.equal(model.weight.values_, before)


def test_batch_manhattan(metal):
    weight = torch.nn.Parameter(Metal.put(torch.ones(3, 2)))
    optimizer = BatchManhattan([weight], 0.1, momentum=0.9, weight_decay=0.1, no_sign_change=True)
    weight.grad = Metal.put(torch.ones(3, 2))
    optimizer.step()
    assert not torch.equal(weight.values_, torch.ones(3, 2))

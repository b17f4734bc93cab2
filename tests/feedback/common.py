"""Shared by the tests of the family `feedback`: the definition written out, and its comparison with the functions."""

import torch
import torch.nn.functional as F

from lgkernels.ops.common.matrix import FeedbackMatrix
from lgkernels.random import RandomFeedback
from tests.support.cases import generator
from tests.support.tolerances import assert_accurate, assert_bit_equal

NAMES = ("y", "dX", "dW", "db")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


LAWS = {
    "uniform": dict(law="uniform", scale=0.5),
    "uniform8": dict(law="uniform8", scale=0.5, low=0.0),
    "normal": dict(law="normal", scale=0.3),
    "sign": dict(law="sign", scale=0.25),
}


def random_feedback(law="uniform8", seed=5, stream=3):
    return RandomFeedback(seed, stream, **LAWS[law])


def weights(*shape, seed=2, dtype=torch.float32):
    """As the golden files': a fifth exactly 0, some of it -0.0."""
    draw = torch.rand(*shape, generator=generator(seed + 50))
    weight = randn(*shape, seed=seed, dtype=dtype)
    weight[draw < 0.2] = 0.0
    weight[draw < 0.05] = -0.0
    return weight


def sign(weight, sign_zero="zero"):
    return weight.sign() if sign_zero == "zero" else torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)


def definition(layer, x, weight, bias, feedback, grad):
    """(y, dX, dW, db) in plain torch; `layer(x, weight, bias)` is F.linear or a convolution."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    y = layer(x.detach(), weight, bias)
    exact = torch.autograd.grad(y, [weight] + ([] if bias is None else [bias]), grad)
    (down,) = torch.autograd.grad(layer(x, feedback.to(x.dtype), None), x, grad)
    return [y.detach(), down, *exact]


def run(function, x, weight, bias, grad, **arguments):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    y = function(x, weight, bias, **arguments)
    return [y.detach(), *torch.autograd.grad(y, [t for t in (x, weight, bias) if t is not None], grad)]


def compare(function, layer, x, weight, bias, feedback, grad=None, /, *, length=None, **arguments):
    """`function` against `layer` with `feedback` in the weight's place, in float64 and in its own dtype."""
    tensors = [x, weight, bias]
    before = [None if t is None else t.clone() for t in tensors]
    if grad is None:
        grad = randn(*layer(x, weight, None).shape, seed=9, dtype=x.dtype)
    got = run(function, *tensors, grad, **arguments)
    for name, tensor, old in zip(("x", "weight", "bias"), tensors, before):
        if tensor is not None:
            assert_bit_equal(f"{name} was written to", tensor, old)
    double = [None if t is None else t.double() for t in (*tensors, feedback, grad)]
    truth = definition(layer, *double)
    rival = definition(layer, *tensors, feedback, grad)
    if length is None:
        length = max(weight[0].numel() if weight.numel() else 1, weight.shape[0], grad.numel())
    for name, ours, same, exact in zip(NAMES, got, rival, truth, strict=False):
        assert_accurate(name, ours, same, exact, length)
    return got


def linear(x, weight, bias):
    return F.linear(x, weight, bias)


def made(weight=None, magnitude=None, random=None, scale=1.0, sign_plus=False):
    """F as the kernels take it; `random`: (state, law, law_scale, low)."""
    return FeedbackMatrix(weight, magnitude, *(random or (None, "uniform", 1.0, None)), scale, sign_plus)

"""Linear layers and 3x3 convolutions with feedback matrices, in plain torch and in BioTorch."""

import importlib

import torch
import torch.nn.functional as F

from ..common import convolution_backward


def biotorch(layer, rule):
    """BioTorch's layer class, or None where it isn't installed (`pip install --no-deps biotorch==0.0.16`)."""
    try:
        return getattr(importlib.import_module(f"biotorch.layers.{rule}"), layer)
    except ImportError:
        return None


def conv2d_gradients(grad, x, weight, needed):
    """Of a 3x3 convolution with padding 1: of input, weight and bias; the input's goes back through `weight`."""
    sizes = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    return convolution_backward(grad, x, weight, [weight.shape[0]], *sizes, needed)


def lean_matrix(weight, rule, magnitude, scale):
    if rule == "fa":
        return magnitude
    if rule == "usf":
        return weight.sign().mul_(scale)
    if rule == "frsf":
        return weight.sign().mul_(magnitude)
    return torch.rand_like(weight).mul_(weight.sign()).mul_(scale * 3**0.5)


class LeanLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, magnitude, rule, scale):
        ctx.save_for_backward(x, weight, magnitude)
        ctx.rule, ctx.scale = rule, scale
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, magnitude = ctx.saved_tensors
        grad_x = grad @ lean_matrix(weight, ctx.rule, magnitude, ctx.scale) if ctx.needs_input_grad[0] else None
        return grad_x, grad.t() @ x, grad.sum(0), None, None, None


class LeanConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, magnitude, rule, scale):
        ctx.save_for_backward(x, weight, magnitude)
        ctx.rule, ctx.scale = rule, scale
        return F.conv2d(x, weight, bias, 1, 1)

    @staticmethod
    def backward(ctx, grad):
        x, weight, magnitude = ctx.saved_tensors
        feedback = lean_matrix(weight, ctx.rule, magnitude, ctx.scale)
        return *conv2d_gradients(grad, x, feedback, [True] * 3), None, None, None

"""Checks of the family's public functions, and what their feedback arguments mean to the autograd entries."""

import math
from typing import NamedTuple

import numpy as np
import torch

from ...core import checks
from ...core.ops import autocasts
from ...random import RandomFeedback
from .options import Formula

_INTEGERS = (int, torch.SymInt)


def positive_number(name, value, expected="a number"):
    """`value` (any real number, NumPy's too) as a float, finite and above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer, torch.SymFloat)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    checks.positive(name, value)
    if value == math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _dtype(value):
    return str(value.dtype)[6:]


def _no_proxy(x):
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            "x must be a torch.Tensor, got a Proxy of torch.fx.symbolic_trace, which cannot look into this "
            "layer: use torch.export, or a Tracer with is_leaf_module true for it"
        )


def _layer(x, weight, bias):
    """What linear and convolution have in common."""
    checks.same_device(weight=weight, x=x, bias=bias)
    if bias is not None:
        checks.floating("bias", bias)
        checks.shape("bias", bias, weight.shape[:1], "one for each output of weight")
    if not autocasts(x.device):
        for name, tensor in (("x", x), ("bias", bias)):
            if tensor is not None and tensor.dtype != weight.dtype:
                raise TypeError(
                    f"{name} must have weight's dtype {_dtype(weight)} (outside of autocast), got {_dtype(tensor)}"
                )


def check_linear(x, weight, bias):
    _no_proxy(x)
    checks.floating("x", x)
    checks.floating("weight", weight)
    checks.dims("weight", weight, (2,), "(N, K)")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., {weight.shape[1]}) (K of weight), got shape {checks.shape_of(x)}")
    _layer(x, weight, bias)


def _pair(name, value, least):
    pair = (value, value) if isinstance(value, _INTEGERS) else value
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or any(isinstance(n, bool) or not isinstance(n, _INTEGERS) for n in pair)
    ):
        raise TypeError(f"{name} must be an int or two of them, got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return tuple(pair)


def conv2d(x, weight, bias, stride, padding, dilation, groups):
    """`(x, (stride, padding, dilation, groups), batched)`: x with a batch, padding two numbers.

    padding="same" as torch: where the total is odd, x gets one more zero at the end.
    """
    _no_proxy(x)
    checks.floating("x", x)
    checks.floating("weight", weight)
    checks.dims("weight", weight, (4,), "(O, C / groups, kh, kw)")
    checks.positive_integer("groups", groups)
    if x.dim() not in (3, 4) or x.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"x must be (B, {weight.shape[1] * groups}, H, W) (weight's channels times groups) or the "
            f"same without B, got shape {checks.shape_of(x)}"
        )
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide weight's {weight.shape[0]} outputs, got {groups}")
    _layer(x, weight, bias)
    batched = x.dim() == 4
    x = x if batched else x.unsqueeze(0)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    reach = tuple(d * (k - 1) for d, k in zip(dilation, weight.shape[2:]))
    if isinstance(padding, str):
        checks.choice("padding", padding, ("same", "valid"))
        if padding == "same" and stride != (1, 1):
            raise ValueError(f"padding must be numbers where stride is not 1, got 'same' with stride={stride}")
        if padding == "same" and any(n % 2 for n in reach):
            x = torch.nn.functional.pad(x, (0, reach[1] % 2, 0, reach[0] % 2))
        padding = tuple(n // 2 for n in reach) if padding == "same" else (0, 0)
    else:
        padding = _pair("padding", padding, 0)
    if any(size + 2 * p < n + 1 for size, p, n in zip(x.shape[2:], padding, reach)):
        raise ValueError(
            f"x must reach over weight's kernel, {tuple(n + 1 for n in reach)} with dilation, when padded "
            f"by {padding}, got shape {checks.shape_of(x)}"
        )
    return x, (stride, padding, dilation, groups), batched


def _source(name, value, weight):
    """`(fields of Formula, keywords of the autograd entry)` of a tensor like weight or a RandomFeedback."""
    if isinstance(value, RandomFeedback):
        checks.same_device(weight=weight, **{name: value.state})
        return dict(law=value.law, law_scale=value.scale, low=value.low), {"state": value.state}
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor or a lgkernels.random.RandomFeedback, got {type(value).__name__}"
        )
    checks.floating(name, value)
    checks.shape(name, value, weight.shape, "that of weight")
    checks.same_device(weight=weight, **{name: value})
    return {}, {"magnitude": value.detach()}


def alignment(weight, feedback):
    """`(formula, keywords)` of feedback alignment."""
    law, source = _source("feedback", feedback, weight)
    return Formula(**law), source


def sign_symmetric(weight, scale, magnitude, sign_zero, packed_signs):
    """`(formula, keywords)` of sign-symmetric feedback."""
    checks.choice("sign_zero", sign_zero, ("zero", "plus"))
    if packed_signs and sign_zero != "plus":
        raise ValueError(
            f"sign_zero must be 'plus' with packed_signs=True (one bit cannot hold sign(0) = 0), got {sign_zero!r}"
        )
    if isinstance(scale, str):
        checks.choice("scale", scale, ("mean_abs",))
    else:
        scale = positive_number("scale", scale, "a number or 'mean_abs'")
    law, source = ({}, {}) if magnitude is None else _source("magnitude", magnitude, weight)
    return Formula("packed" if packed_signs else "weight", scale=scale, sign_plus=sign_zero == "plus", **law), source


class Scaled(NamedTuple):
    """A RandomFeedback of another scale, with the same state tensor."""

    feedback: RandomFeedback
    scale: float


def projection(name, value, feedback, shape, classes=None):
    """`(shape, columns, (matrix, law, state))` of a projection of `value`: matrix (C, prod(shape)) or None."""
    shape = (shape,) if isinstance(shape, _INTEGERS) else tuple(shape)
    if not shape or any(isinstance(n, bool) or not isinstance(n, _INTEGERS) or n < 0 for n in shape):
        raise ValueError(f"shape must be the sizes of one sample, none negative, got {shape}")
    columns = math.prod(shape)
    if isinstance(feedback, (RandomFeedback, Scaled)):
        random, scale = feedback if isinstance(feedback, Scaled) else (feedback, feedback.scale)
        checks.same_device(**{name: value, "feedback": random.state})
        return shape, columns, (None, (random.law, scale, random.low), random.state)
    if not isinstance(feedback, torch.Tensor):
        raise TypeError(
            f"feedback must be a torch.Tensor or a lgkernels.random.RandomFeedback, got {type(feedback).__name__}"
        )
    checks.floating("feedback", feedback)
    classes = feedback.shape[0] if classes is None and feedback.dim() else classes
    if tuple(feedback.shape) not in ((classes, *shape), (classes, columns)):
        raise ValueError(
            f"feedback must have shape {(classes, *shape)} or {(classes, columns)} (classes, then shape), "
            f"got {checks.shape_of(feedback)}"
        )
    checks.same_device(**{name: value, "feedback": feedback})
    return shape, columns, (feedback.reshape(classes, columns), ("uniform", 1.0, None), None)

"""Feedback without weight transport in plain torch: the definition that every other backend is tested against.

Every rule sends the error down by a matrix F (N, K) that is a formula, never a parameter:

    value(i, j) = 1 | magnitude[i, j] | law(seed, stream, step; row i, column j)
    F = scale * value                       without weight     FA, DFA (signed)
    F = scale * |value| * sign(weight)      with weight        uSF (value 1), frSF and brSF

N are a weight's outputs, K its inputs: (O, C / groups * kh * kw) of a convolution, (classes, neurons) of DFA.
sign(0) = 0, or with `sign_plus` +1 (also of -0.0); sign(nan) follows: 0 | +1. The functions take F as `f`, a
FeedbackMatrix (ops/common/matrix.py).

Any device; float32 arithmetic, float64 where `dtype` or `grad` is float64.
"""

import math

import torch
import torch.nn.functional as F

from ...core.ops import wide_dtype
from ...random import random_matrix, random_rows


def fold(columns, shape, kernel, positions, stride, padding, dilation):
    """Columns (B * positions, C * kh * kw) summed into `shape` (B, C, H, W): the adjoint of a convolution's windows."""
    columns = columns.view(shape[0], math.prod(positions), -1).transpose(1, 2)
    return F.fold(columns, shape[2:], kernel, dilation, padding, stride)


def pack_signs(weight):
    """(N, K) -> int32 (N, ceil(K / 32)): bit j % 32 of word j // 32 is set where weight[i, j] < 0 (so not for -0.0)."""
    rows, cols = weight.shape
    words = (cols + 31) // 32
    bits = torch.zeros(rows, words * 32, dtype=torch.int64, device=weight.device)
    bits[:, :cols] = weight < 0
    packed = (bits.view(rows, words, 32) << torch.arange(32, device=weight.device)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_signs(packed, cols):
    """The +-1 (float32) matrix of `pack_signs`' words."""
    bits = (packed.unsqueeze(-1) >> torch.arange(32, device=packed.device)) & 1
    return 1.0 - 2.0 * bits.flatten(1)[:, :cols].float()


def sign(weight, sign_plus, cols):
    """sign(weight) in float32; int32 `weight` holds packed signs of a matrix with `cols` columns."""
    if weight.dtype == torch.int32:
        return unpack_signs(weight, cols)
    if sign_plus:
        return 1.0 - 2.0 * (weight < 0).float()
    return (weight > 0).float() - (weight < 0).float()


def matrix(shape, f, dtype, device):
    """F (N, K) = shape in `dtype`, rounded once."""
    value = torch.ones(shape, dtype=wide_dtype(dtype), device=device)
    if f.magnitude is not None:
        value = f.magnitude.to(value.dtype)
    elif f.state is not None:
        value = random_matrix(f.state, *shape, f.law, f.law_scale, f.low).to(value.dtype)
    if f.weight is not None:
        value = value.abs() * sign(f.weight, f.sign_plus, shape[1])
    return (value * f.scale).to(dtype)


def product(grad, columns, f):
    """grad (M, N) @ F -> (M, K = columns) in grad's dtype."""
    shape = (grad.shape[1], columns)
    return grad @ matrix(shape, f, grad.dtype, grad.device)


def rows(index, columns, f, dtype):
    """(B, K) of row index[b] (int64) of scale * law: DRTP's projection of class indices."""
    value = random_rows(f.state, index, columns, f.law, f.law_scale, f.low)
    return (value.to(wide_dtype(dtype)) * f.scale).to(dtype)

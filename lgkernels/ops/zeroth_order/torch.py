"""Zeroth-order optimisation in few passes of plain torch, on any device: the functions of reference.py.

Noise by formula is made some rows at a time, so no matrix of the weight's size is ever there.
"""

import torch.nn.functional as F

from ...core.ops import wide_dtype

_AT_ONCE = 1 << 18  # elements of a matrix by formula that are written out together: a megabyte of them


def _chunks(rows, columns, all_at_once=False):
    size = max(rows, 1) if all_at_once else max(_AT_ONCE // max(columns, 1), 1)
    for first in range(0, rows, size):
        yield first, min(size, rows - first)


def perturbed_linear(x, weight, bias, coefficients, noise):
    """A product with the weight, and one with the noise: half operands lose nothing of a small perturbation."""
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    factors = coefficients.to(wide_dtype(x.dtype)).view(-1, 1, 1)
    one = noise.states is None or len(noise.states) == 1
    for first, count in _chunks(*weight.shape, all_at_once=noise.values is not None):
        parts = [(y, x, factors)] if one else zip(y.split(1), x.split(1), factors.split(1))
        for i, (into, rows, factor) in enumerate(parts):
            z = noise.rows(i, first, count, weight.shape[1], x.dtype)
            into.narrow(2, first, count).add_((rows @ z.t()) * factor)
    return y


def formula_update_(weight, coefficients, noise, keep):
    dtype = wide_dtype(weight.dtype)
    factors = coefficients.to(dtype)
    for first, count in _chunks(*weight.shape):
        part = weight.narrow(0, first, count)
        total = noise.rows(0, first, count, weight.shape[1], dtype).mul_(factors[0])
        for i in range(1, len(factors)):
            total.add_(noise.rows(i, first, count, weight.shape[1], dtype).mul_(factors[i]))
        if part.dtype == dtype:
            (part if keep == 1.0 else part.mul_(keep)).add_(total)
        else:
            part.copy_(part.to(dtype).mul_(keep).add_(total))

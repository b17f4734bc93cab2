"""Feedback as an expert writes it in plain torch, on any device: the functions of reference.py, in few passes.

F is made in `grad`'s dtype, and `scale` is a factor of the product's sum. What is given as it is needed is not copied.
"""

import torch
import torch.nn.functional as F

from ...core.ops import wide_dtype
from ...random import random_matrix, random_rows


def _times(a, b, scale):
    """scale * (a @ b), without a pass of its own."""
    return a @ b if scale == 1.0 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _unpacked(packed, columns, dtype):
    """+-1 of packed signs: each byte stands for eight of them."""
    place = torch.arange(8, device=packed.device)
    table = 1 - 2 * (torch.arange(256, device=packed.device).unsqueeze(1) >> place & 1).to(dtype)
    signs = F.embedding(packed.contiguous().view(torch.uint8).int(), table)
    return signs.flatten(1)[:, :columns]


def _signs(weight, sign_plus, columns, dtype):
    """sign(weight) (N, columns) in `dtype`, the caller's own."""
    if weight.dtype == torch.int32:
        return _unpacked(weight, columns, dtype)
    if not sign_plus:
        return weight.sign().to(dtype)
    negative = torch.lt(weight, 0, out=torch.empty(weight.shape, dtype=dtype, device=weight.device))
    return torch.rsub(negative, 1.0, alpha=2)


def _unscaled(shape, f, dtype, device):
    """(F / scale in `dtype`, whether it is the caller's own)."""
    if f.magnitude is not None:
        value, own = f.magnitude.to(dtype), f.magnitude.dtype != dtype
    elif f.state is not None:
        value = random_matrix(f.state, *shape, f.law, f.law_scale, f.low, dtype=dtype)
        own = True
    else:
        value, own = None, False
    if f.weight is None:
        return (torch.ones(shape, dtype=dtype, device=device), True) if value is None else (value, own)
    signs = _signs(f.weight, f.sign_plus, shape[1], dtype)
    if value is None:
        return signs, True
    if f.magnitude is not None or f.low is None or f.low < 0:
        value = value.abs_() if own else value.abs()
    return signs.mul_(value), True


def matrix(shape, f, dtype, device):
    # a value times `scale` is rounded once: in float32, where it is more than a sign
    signs_alone = f.magnitude is None and f.state is None
    value, own = _unscaled(shape, f, dtype if f.scale == 1.0 or signs_alone else wide_dtype(dtype), device)
    if f.scale != 1.0:
        value, own = value.mul_(f.scale) if own else value * f.scale, True
    return value.to(dtype, copy=not own)


def product(grad, columns, f):
    value, _ = _unscaled((grad.shape[1], columns), f, grad.dtype, grad.device)
    return _times(grad, value, f.scale)


def rows(index, columns, f, dtype):
    if f.scale == 1.0:
        return random_rows(f.state, index, columns, f.law, f.law_scale, f.low, dtype=dtype)
    value = random_rows(f.state, index, columns, f.law, f.law_scale, f.low)
    return value.to(wide_dtype(dtype)).mul_(f.scale).to(dtype)


def pack_signs(weight):
    (rows, columns), device = weight.shape, weight.device
    words = (columns + 31) // 32
    negative = torch.zeros if columns % 32 else torch.empty
    negative = negative((rows, 32 * words), dtype=torch.bool, device=device)
    torch.lt(weight, 0, out=negative[:, :columns])
    bit = torch.bitwise_left_shift(1, torch.arange(8, dtype=torch.uint8, device=device))
    packed = torch.sum(negative.view(rows, 4 * words, 8) * bit, 2, dtype=torch.uint8)
    return packed.flatten().view(torch.int32).view(rows, words)

"""Zeroth-order optimisation in few passes of plain torch, on any device: the functions of reference.py.

Noise by formula is made some rows at a time, so no matrix of the weight's size is ever there.
"""

import torch
import torch.nn.functional as F

from ...core.ops import wide_dtype

_AT_ONCE = 1 << 18  # elements of a matrix by formula that are written out together: a megabyte of them


def _chunks(rows, columns, size=_AT_ONCE):
    size = max(size // max(columns, 1), 1)
    for first in range(0, rows, size):
        yield first, min(size, rows - first)


def perturbed_linear(x, weight, bias, coefficients, noise):
    def write(m, first, count, own, factor, dtype):
        return noise.rows(m, first, count, weight.shape[1], dtype)

    size = _AT_ONCE if noise.values is None else max(weight.numel(), 1)
    return products(x, weight, bias, coefficients, noise, write, size)


def products(x, weight, bias, coefficients, noise, write, at_once):
    """A product with the weight, and one with the noise, written some rows at a time (`write` as of convolutions()):
    half operands lose nothing of a small perturbation."""
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    factors = coefficients.to(wide_dtype(x.dtype)).view(-1, 1, 1)
    one = noise.states is None or len(noise.states) == 1
    for first, count in _chunks(*weight.shape, at_once):
        parts = [(y, x, factors)] if one else zip(y.split(1), x.split(1), factors.split(1))
        for i, (into, rows, factor) in enumerate(parts):
            z = write(i, first, count, None, None, x.dtype)
            into.narrow(2, first, count).add_((rows @ z.t()) * factor)
    return y


def perturbed_rows(weight, x, coefficients, noise, dtype):
    wide, (count, columns) = wide_dtype(dtype), weight.shape
    members, factors = len(coefficients), coefficients.to(wide)
    out = torch.empty(members, count if x is None else x.shape[1], columns, dtype=dtype, device=weight.device)
    for m in range(members):
        if x is None:
            own, z = weight, noise.rows(m, 0, count, columns, wide)
        else:
            own, z = weight.index_select(0, x[m]), noise.picked(m, x[m], columns, wide)
        out[m] = own + factors[m] * z
    return out


def perturbed_conv2d(x, weight, bias, coefficients, noise, geometry):
    def write(m, first, count, own, factor, dtype):
        z = noise.rows(m, first, count, weight[0].numel(), dtype)
        return z if own is None else own[first : first + count] + factor * z

    return convolutions(x, weight, bias, coefficients, noise, geometry, write, _AT_ONCE)


def convolutions(x, weight, bias, coefficients, noise, geometry, write, at_once):
    """The library's convolutions with rows of perturbed weights, written some outputs at a time.

    write(m, first, count, own, factor, dtype): rows [first, first + count) of own + factor Z_m, own (O, K) or None: of
    Z_m alone. Half operands are convolved with the weight, then with the noise: they lose nothing of a small
    perturbation.
    """
    wide, single = wide_dtype(x.dtype), noise.states is None or len(noise.states) == 1
    matrix, kernel = weight.reshape(len(weight), -1), weight.shape[1:]
    bias = None if bias is None else bias.to(x.dtype)
    factors, parts = coefficients.to(wide), list(_parts(len(weight), matrix.shape[1], geometry.groups, at_once))
    if x.dtype == wide:
        out = None
        for m in range(len(x)):
            for first, count, channels, groups in parts:
                own = write(m, first, count, matrix, factors[m], wide).view(count, *kernel)
                b = None if bias is None else bias[first : first + count]
                y = F.conv2d(_channels(x[m], channels, kernel), own, b, *geometry[:3], groups)
                if len(x) == len(parts) == 1:
                    return y.unsqueeze(0)
                if out is None:
                    out = y.new_empty((len(x), len(y), len(weight), *y.shape[2:]))
                out[m].narrow(1, first, count).copy_(y)
        return out
    y = F.conv2d(x.flatten(0, 1), weight.to(x.dtype), bias, *geometry).unflatten(0, x.shape[:2])
    for m in range(1 if single else len(x)):
        some, into = (x, y) if single else (x[m : m + 1], y[m : m + 1])
        for first, count, channels, groups in parts:
            z = write(m, first, count, None, None, x.dtype).view(count, *kernel)
            along = F.conv2d(_channels(some.flatten(0, 1), channels, kernel), z, None, *geometry[:3], groups)
            own = factors if single else factors[m : m + 1]
            into.narrow(2, first, count).add_(along.unflatten(0, some.shape[:2]) * own.view(-1, 1, 1, 1, 1))
    return y


def _channels(x, groups, kernel):
    """Those of some groups."""
    first, count = groups
    return x if count is None else x.narrow(1, first * kernel[0], count * kernel[0])


def _parts(outputs, columns, groups, at_once):
    """(first output, how many, (first group, how many; None: all), groups): outputs of whole groups, or of one."""
    each, rows = outputs // groups, max(at_once // columns, 1)
    if rows >= outputs:
        yield 0, outputs, (0, None), groups
    elif rows >= each:
        for first in range(0, groups, rows // each):
            count = min(rows // each, groups - first)
            yield first * each, count * each, (first, count), count
    else:
        for group in range(groups):
            for first in range(0, each, rows):
                yield group * each + first, min(rows, each - first), (group, 1), 1


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

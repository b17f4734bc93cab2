"""Zeroth-order optimisation on the CPU: the functions of `reference.py` over the C++ kernels of `lgkernels._C`
(csrc/zeroth_order/cpu). float32 arithmetic, sums in an order that no number of threads changes."""

import torch

from ...core.native import cpu_entries, threads
from ..common.cpu import code, dense_rows, floats
from ..common.cpu import matrix as describe
from . import torch as lean

_C = cpu_entries()

# Up to this many rows a member the kernel that perturbs the weight in the cache and multiplies there is the faster;
# above it rows of the perturbed weights, four megabytes at a time, are written for the library's product, which packs
# x anew for each such part (a megabyte at a time: a third slower at 64 rows).
ROWS_OF_KERNEL = 32
_WRITTEN = 1 << 20  # elements
_MEMBERS_AT_ONCE = 4


def _noise(noise, coefficients):
    """The kernels' description, and what keeps its memory alive."""
    own = coefficients.float().contiguous(), noise.states.contiguous()
    return (own[1].data_ptr(), len(own[1]), noise.law, noise.law_scale, noise.low, own[0].data_ptr()), own


def _by_library(x, weight, bias, coefficients, noise, out):
    """Products with rows of the perturbed weights, which the second-level cache holds."""
    (members, _, inputs), outputs = x.shape, len(weight)
    described, kept = _noise(noise, coefficients)
    size = max(_WRITTEN // max(inputs * members, 1), 16)
    buffer = floats(members * min(size, outputs) * inputs)
    for first in range(0, outputs, size):
        count = min(size, outputs - first)
        shape = members, count, outputs, inputs
        _C.zeroth_order_perturbed(described, shape, describe(weight), 0, first, buffer.data_ptr(), threads())
        perturbed = buffer[: members * count * inputs].view(members, count, inputs)
        for m in range(members):
            into = out[m].narrow(1, first, count)
            if bias is None:
                torch.mm(x[m], perturbed[m].t(), out=into)
            else:
                torch.addmm(bias[first : first + count], x[m], perturbed[m].t(), out=into)
    del kept


def perturbed_linear(x, weight, bias, coefficients, noise):
    (members, rows, inputs), outputs = x.shape, len(weight)
    code(x.dtype)
    weight = dense_rows(weight)
    out = floats(members, rows, outputs)
    bias = None if bias is None else bias.float()
    if not out.numel():
        return out.to(x.dtype)
    if rows > ROWS_OF_KERNEL:
        x_ = x.float()
        for i in range(0, members, _MEMBERS_AT_ONCE):
            some = slice(i, i + _MEMBERS_AT_ONCE)
            states = noise.states if len(noise.states) == 1 else noise.states[some]
            _by_library(x_[some], weight, bias, coefficients[some], noise._replace(states=states), out[some])
        return out.to(x.dtype)
    x_ = dense_rows(x.reshape(members * rows, inputs))
    described, kept = _noise(noise, coefficients)
    shape = members, rows, outputs, inputs
    _C.zeroth_order_product(described, shape, describe(weight), describe(x_), out.data_ptr(), threads())
    del kept
    return (out if bias is None else out.add_(bias)).to(x.dtype)


def perturbed_rows(weight, x, coefficients, noise, dtype):
    members, (outputs, inputs) = len(coefficients), weight.shape
    code(dtype)
    own, (described, kept) = dense_rows(weight), _noise(noise, coefficients)
    rows = outputs if x is None else x.shape[1]
    out, shape = floats(members, rows, inputs), (members, rows, outputs, inputs)
    index = 0 if x is None else x.data_ptr()
    _C.zeroth_order_perturbed(described, shape, describe(own), index, 0, out.data_ptr(), threads())
    del kept
    return out.to(dtype)


def perturbed_conv2d(x, weight, bias, coefficients, noise, geometry):
    """The library's convolutions with rows of the perturbed weights, four megabytes at a time."""
    code(x.dtype)
    matrix = dense_rows(weight.reshape(len(weight), -1))
    buffer = floats(min(_WRITTEN, matrix.numel()) + matrix.shape[1])

    def write(m, first, count, own, factor, dtype):
        described, kept = _noise(noise.one(m), coefficients[m : m + 1])
        shape = 1, count, *matrix.shape
        _C.zeroth_order_perturbed(described, shape, describe(matrix), 0, first, buffer.data_ptr(), threads())
        del kept
        return buffer[: count * matrix.shape[1]]

    bias = None if bias is None else bias.float()
    y = lean.convolutions(x.float(), weight, bias, coefficients, noise, geometry, write, _WRITTEN)
    return y.to(x.dtype)


def formula_update_(weight, coefficients, noise, keep):
    own, (described, kept) = dense_rows(weight), _noise(noise, coefficients)
    _C.zeroth_order_update(described, describe(own), *weight.shape, keep, threads())
    del kept
    if own is not weight:
        weight.copy_(own)

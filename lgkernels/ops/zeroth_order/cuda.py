"""Zeroth-order optimisation on the CUDA C++ kernels of `lgkernels._C` (csrc/zeroth_order/cuda): the functions of
reference.py.

Every function allocates its outputs with torch.empty and launches on the current stream; nothing synchronises.
"""

import torch

from ..common.cuda import DTYPES, address, call
from . import torch as lean

# Up to this many rows of x a matrix of noise the kernel makes the noise in registers; above it the noise is written,
# four megabytes at a time, for the library's products, which for half operands have matrix instructions. Not measured
# on a GPU yet.
ROWS_IN_REGISTERS = {torch.float32: 64, torch.bfloat16: 16, torch.float16: 16}
_WRITTEN = 1 << 20  # elements
_GRID = 65535  # matrices, or members, of one launch


def _dense(matrix):
    """The kernels take any distance between rows, but no gaps within one."""
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def _matrix(tensor):
    """(address, row stride, dtype code) for the kernels, or None."""
    return None if tensor is None else (address(tensor), tensor.stride(0), DTYPES[tensor.dtype])


def _noise(noise, coefficients):
    """The kernels' description, and the tensors that must outlive the launch."""
    own, states = coefficients.float().contiguous(), noise.states.contiguous()
    return (address(states), len(states), noise.law, noise.law_scale, noise.low, address(own)), (own, states)


def perturbed_linear(x, weight, bias, coefficients, noise):
    (members, rows, inputs), outputs = x.shape, len(weight)
    groups = len(noise.states)
    if not x.numel() or not outputs or groups > _GRID or members * rows // groups > ROWS_IN_REGISTERS[x.dtype]:
        return lean.products(x, weight, bias, coefficients, noise, _panel(noise, weight), _WRITTEN)
    own, flat = _dense(weight), x.reshape(members * rows, inputs)
    out = torch.empty(members, rows, outputs, dtype=x.dtype, device=x.device)
    described, _keep = _noise(noise, coefficients)
    shift = None if bias is None else bias.contiguous().view(1, -1)
    shape, tensors = (members, rows, outputs, inputs), (own, _dense(flat), shift)
    call("zeroth_order_product", x.device, described, shape, *map(_matrix, tensors), address(out))
    return out


def _panel(noise, weight):
    """Writes rows of W + c Z, or of Z alone: what the library's products and convolutions take."""
    outputs, inputs = len(weight), weight[0].numel() if len(weight) else 0

    def write(m, first, count, own, factor, dtype):
        out = torch.empty(1, count, inputs, dtype=dtype, device=weight.device)
        matrix = None if own is None else _dense(own)
        described, _keep = _noise(noise.one(m), out.new_ones(1) if own is None else factor.view(1))
        shape = 1, count, outputs, inputs
        call("zeroth_order_rows", out.device, described, shape, _matrix(matrix), 0, first, address(out), DTYPES[dtype])
        return out[0]

    return write


def perturbed_rows(weight, x, coefficients, noise, dtype):
    members, (outputs, inputs) = len(coefficients), weight.shape
    if members > _GRID:
        return lean.perturbed_rows(weight, x, coefficients, noise, dtype)
    count = outputs if x is None else x.shape[1]
    out, own = torch.empty(members, count, inputs, dtype=dtype, device=weight.device), _dense(weight)
    described, _keep = _noise(noise, coefficients)
    shape = members, count, outputs, inputs
    call("zeroth_order_rows", out.device, described, shape, _matrix(own), address(x), 0, address(out), DTYPES[dtype])
    return out


def perturbed_conv2d(x, weight, bias, coefficients, noise, geometry):
    """The library's convolutions with rows of perturbed weights, or of the noise, four megabytes at a time."""
    return lean.convolutions(x, weight, bias, coefficients, noise, geometry, _panel(noise, weight), _WRITTEN)


def formula_update_(weight, coefficients, noise, keep):
    own, (described, _keep) = _dense(weight), _noise(noise, coefficients)
    call("zeroth_order_update", weight.device, described, _matrix(own), *weight.shape, keep)
    if own is not weight:
        weight.copy_(own)

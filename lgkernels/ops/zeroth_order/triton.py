"""Zeroth-order optimisation in Triton: the functions of reference.py, same arguments, shapes and dtypes (no float64).

Kernels in triton_noise.py, block sizes in tiles.py. Half operands of a product are multiplied as they are, the noise
rounded to their dtype (sign, and uniform8 of scale 1, are exact there). CPU tensors work under TRITON_INTERPRET=1.
"""

import torch

from ..common.dot import precision
from ..common.launch import block_count, configuration, launch
from ..common.philox import law_arguments, values_per_call
from . import torch as lean
from . import triton_noise
from .tiles import TILES

# Up to this many rows of x a matrix of noise the kernel makes the noise in registers. Above it every further tile would
# make it again: there it is written a megabyte at a time, and the library multiplies. Not measured on a GPU yet.
ROWS_IN_REGISTERS = 128
_WRITTEN = 1 << 20  # elements of a convolution's perturbed weights that are there at a time


def _law(noise):
    LAW, HAS_LOW, *numbers = law_arguments(noise.law, noise.law_scale, noise.low)
    return tuple(numbers), dict(LAW=LAW, HAS_LOW=HAS_LOW)


def perturbed_linear(x, weight, bias, coefficients, noise):
    (members, rows, K), N = x.shape, len(weight)
    summed = precision(x.dtype) == "tf32x3"
    groups = members if summed else len(noise.states)
    together = members * rows // max(groups, 1)  # rows that share a matrix of noise
    config = configuration(TILES["linear"], (together, N, K, values_per_call(noise.law)), x)
    if config is None or together > ROWS_IN_REGISTERS or not weight.numel() or not x.numel():
        return lean.products(x, weight, bias, coefficients, noise, _panel(noise, weight), _WRITTEN)
    out = torch.empty(members, rows, N, dtype=x.dtype, device=x.device)
    numbers, meta = _law(noise)
    programs = groups * block_count(together, config["BLOCK_M"]) * block_count(N, config["BLOCK_N"])
    launch(
        triton_noise.linear_kernel,
        programs,
        x.device,
        x.contiguous(),
        out,
        weight,
        None if bias is None else bias.contiguous(),
        coefficients.float().contiguous(),
        noise.states,
        *numbers,
        rows,
        together,
        N,
        K,
        *weight.stride(),
        3 if len(noise.states) > 1 else 0,
        SUMMED=summed,
        PRECISION=precision(x.dtype),
        **meta,
        **config,
    )
    return out


def perturbed_rows(weight, x, coefficients, noise, dtype):
    members, count = len(coefficients), len(weight) if x is None else x.shape[1]
    out = torch.empty(members, count, weight.shape[1], dtype=dtype, device=weight.device)
    return _write_rows(out, weight, x, 0, coefficients.float().contiguous(), noise, weight.shape[0])


def _write_rows(out, weight, index, first, coefficients, noise, N):
    """out (M, R, K): rows first + r, or index[m, r], of W + c_m Z_m, or of c_m Z_m without a weight."""
    members, rows, K = out.shape
    numbers, meta = _law(noise)
    config = configuration(TILES["update"], (rows, K, values_per_call(noise.law)), out)
    strides = (0, 0) if weight is None else weight.stride()
    launch(
        triton_noise.perturbed_rows_kernel,
        members * block_count(rows, config["BLOCK_N"]) * block_count(K, config["BLOCK_K"]),
        out.device,
        weight,
        out,
        index,
        coefficients,
        noise.states,
        *numbers,
        first,
        rows,
        N,
        K,
        *strides,
        3 if len(noise.states) > 1 else 0,
        **meta,
        **config,
    )
    return out


def _panel(noise, weight):
    """Writes rows of W + c Z, or of Z alone: what the library's products and convolutions take."""
    outputs, inputs = len(weight), weight[0].numel() if len(weight) else 0

    def write(m, first, count, own, factor, dtype):
        out = torch.empty(1, count, inputs, dtype=dtype, device=weight.device)
        one = out.new_ones(1, dtype=torch.float32) if own is None else factor.view(1)
        return _write_rows(out, own, None, first, one, noise.one(m), outputs)[0]

    return write


def perturbed_conv2d(x, weight, bias, coefficients, noise, geometry):
    """The library's convolutions with rows of perturbed weights, or of the noise, four megabytes at a time."""
    return lean.convolutions(x, weight, bias, coefficients, noise, geometry, _panel(noise, weight), _WRITTEN)


def formula_update_(weight, coefficients, noise, keep):
    N, K = weight.shape
    numbers, meta = _law(noise)
    config = configuration(TILES["update"], (N, K, values_per_call(noise.law)), weight)
    launch(
        triton_noise.update_kernel,
        block_count(N, config["BLOCK_N"]) * block_count(K, config["BLOCK_K"]),
        weight.device,
        weight,
        coefficients.float().contiguous(),
        noise.states,
        float(keep),
        *numbers,
        len(noise.states),
        N,
        K,
        *weight.stride(),
        **meta,
        **config,
    )

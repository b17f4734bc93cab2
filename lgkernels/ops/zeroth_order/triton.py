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
        return lean.perturbed_linear(x, weight, bias, coefficients, noise)
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

"""Feedback in Triton: the functions of reference.py, same arguments, shapes and dtypes (no float64).

Kernels in triton_matrix.py and triton_product.py; block sizes in tiles.py. Everything is computed in float32 and
rounded once on store, half operands of a product excepted: they are multiplied as they are, so F is rounded to `grad`'s
dtype (but for `scale`, a factor of the sum). Sums have a fixed order. CPU tensors work under TRITON_INTERPRET=1.
"""

import torch

from ..common.dot import precision
from ..common.launch import block_count, configuration, launch, new
from ..common.philox import law_arguments, values_per_call
from . import triton_matrix, triton_product
from .tiles import TILES

# `product` makes F in registers up to this many rows of grad, which one tile holds (two in float32), so each weight is
# made once. Above it every further tile would make it again: there F is written once and the library multiplies. With
# few rows of F (DFA) the output is the larger by far, and F is never written. Neither has been measured on a GPU yet.
ROWS_IN_REGISTERS = 128
SMALL_ROWS_OF_F = 128


def _strides(matrix):
    return (0, 0) if matrix is None else matrix.stride()


def _random(random):
    """`(arguments, LAW and HAS_LOW, columns of one Philox call)` of the kernels."""
    if random is None:
        return (None,), (0.0, 0.0, 0.0), dict(LAW=None, HAS_LOW=False), 1
    state, law, law_scale, low = random
    LAW, HAS_LOW, *numbers = law_arguments(law, law_scale, low)
    return (state,), tuple(numbers), dict(LAW=LAW, HAS_LOW=HAS_LOW), values_per_call(law)


def _signs(f):
    if f.weight is None:
        return "none"
    if f.weight.dtype == torch.int32:
        return "packed"
    return "plus" if f.sign_plus else "zero"


def matrix(shape, f, dtype, device):
    N, K = shape
    out = torch.empty((N, K), dtype=dtype, device=device)
    state, law, meta, v = _random(f.random)
    config = configuration(TILES["matrix"], (N, K, v), out)
    programs = block_count(N, config["BLOCK_N"]) * block_count(K, config["BLOCK_K"])
    launch(
        triton_matrix.matrix_kernel,
        programs,
        out.device,
        out,
        f.weight,
        f.magnitude,
        *state,
        float(f.scale),
        *law,
        N,
        K,
        *_strides(f.weight),
        *_strides(f.magnitude),
        SIGNS=_signs(f),
        **meta,
        **config,
    )
    return out


def product(grad, columns, f):
    (M, N), K = grad.shape, columns
    if M > ROWS_IN_REGISTERS and N > SMALL_ROWS_OF_F:
        return grad @ matrix((N, K), f, grad.dtype, grad.device)
    out = torch.empty((M, K), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    state, law, meta, v = _random(f.random)
    config = configuration(TILES["product"], (M, N, K, v), grad)
    programs = block_count(M, config["BLOCK_M"]) * block_count(K, config["BLOCK_K"])
    # too few programs for the card: share N, at least four tiles each
    slices = max(1, min(block_count(512, programs), N // (4 * config["BLOCK_N"]), 16))
    partial = out if slices == 1 else new(out, slices, M, K)
    launch(
        triton_product.product_kernel,
        programs * slices,
        out.device,
        grad.contiguous(),
        partial,
        f.weight,
        f.magnitude,
        *state,
        float(f.scale),
        *law,
        M,
        N,
        K,
        slices,
        *_strides(f.weight),
        *_strides(f.magnitude),
        SIGNS=_signs(f),
        PRECISION=precision(grad.dtype),
        **meta,
        **config,
    )
    if slices > 1:
        config = configuration(TILES["sum"], (M * K,), grad)
        launch(
            triton_product.sum_slices_kernel,
            block_count(M * K, config["BLOCK"]),
            out.device,
            partial,
            out,
            M * K,
            slices,
            **config,
        )
    return out


def rows(index, columns, f, dtype):
    B, K = index.shape[0], columns
    out = torch.empty((B, K), dtype=dtype, device=index.device)
    (state,), law, meta, v = _random(f.random)
    config = configuration(TILES["matrix"], (B, K, v), out)
    programs = block_count(B, config["BLOCK_N"]) * block_count(K, config["BLOCK_K"])
    launch(
        triton_matrix.rows_kernel,
        programs,
        out.device,
        index.contiguous(),
        out,
        state,
        float(f.scale),
        *law,
        B,
        K,
        **meta,
        **config,
    )
    return out


def pack_signs(weight):
    N, K = weight.shape
    packed = torch.empty((N, block_count(K, 32)), dtype=torch.int32, device=weight.device)
    config = configuration(TILES["matrix"], (N, K, 32), weight)
    programs = block_count(N, config["BLOCK_N"]) * block_count(K, config["BLOCK_K"])
    launch(triton_matrix.pack_signs_kernel, programs, weight.device, weight, packed, N, K, *weight.stride(), **config)
    return packed

"""Triton kernels of the product dX = grad F, with F made in registers."""

import triton
import triton.language as tl

from ..common.addressing import indices, load_tile, offset, program_id, within
from ..common.dot import dot
from ..common.rounding import rounded
from .triton_matrix import load_state, values


@triton.jit(do_not_specialize=["M", "slices"])
def product_kernel(
    grad,
    out,
    weight,
    magnitude,
    state,
    scale,
    law_scale,
    span,
    low,
    M,
    N,
    K,
    slices,
    weight_row,
    weight_column,
    magnitude_row,
    magnitude_column,
    LAW: tl.constexpr,
    HAS_LOW: tl.constexpr,
    SIGNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[slice] (M, K) = grad (M, N) F over every `slices`-th block of rows of F. Neighbouring programs share a panel
    of F."""
    pid = program_id(0)
    m_blocks, k_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    m, block = indices(pid % m_blocks, BLOCK_M), pid // m_blocks % k_blocks
    slice = pid // m_blocks // k_blocks
    seed, stream, step = load_state(state, LAW)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for rows in range(slice, tl.cdiv(N, BLOCK_N), slices):
        n = indices(rows, BLOCK_N)
        g = load_tile(grad, m, n, M, N)
        f = values(
            weight,
            magnitude,
            seed,
            stream,
            step,
            law_scale,
            span,
            low,
            n,
            block,
            N,
            K,
            weight_row,
            weight_column,
            magnitude_row,
            magnitude_column,
            LAW,
            HAS_LOW,
            SIGNS,
            BLOCK_K,
        )
        total = dot(g, f, total, PRECISION)
    k = indices(block, BLOCK_K)
    row = offset(offset(slice, M) + m, K)
    tl.store(
        out + row[:, None] + k[None, :],
        rounded(total * tl.cast(scale, tl.float32), out.dtype.element_ty),
        mask=within(m, M, k, K),
    )


@triton.jit(do_not_specialize=["slices"])
def sum_slices_kernel(partial, out, size, slices, BLOCK: tl.constexpr):
    """out = sum of partial over its slices, in order."""
    i = indices(program_id(0), BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slice in range(slices):
        total += tl.load(partial + offset(slice, size) + i, mask=i < size, other=0.0)
    tl.store(out + i, rounded(total, out.dtype.element_ty), mask=i < size)

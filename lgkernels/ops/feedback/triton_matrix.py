"""Triton kernels that write feedback matrices: F itself, rows of it, and packed signs.

    F = scale * value                       without weight
    F = scale * |value| * sign(weight)      with weight        value = 1 | magnitude | law(row, column)

`values` makes a tile of F / scale in registers; the products of triton_product.py use it too. LAW is None without
random values; SIGNS says what `weight` holds: "none", "zero" (sign(0) = 0), "plus" (sign(0) = 1), or "packed", 32
signs a word, a set bit for a negative weight.
"""

import triton
import triton.language as tl

from ..common import philox
from ..common.addressing import indices, offset, program_id, store_tile, within
from ..common.rounding import rounded
from ..common.signs import unpacked


@triton.jit
def _strided(matrix, n, block, N, K, row_stride, column_stride, BLOCK_K: tl.constexpr):
    """Rows n and columns [block * BLOCK_K, (block + 1) * BLOCK_K) of a matrix, 0 outside of it."""
    k = indices(block, BLOCK_K)
    return tl.load(
        matrix + offset(n, row_stride)[:, None] + offset(k, column_stride)[None, :], mask=within(n, N, k, K), other=0.0
    ).to(tl.float32)


@triton.jit
def _signs(weight, n, block, N, K, row_stride, column_stride, SIGNS: tl.constexpr, BLOCK_K: tl.constexpr):
    if SIGNS == "packed":
        word = indices(block, BLOCK_K // 32)
        words = tl.load(
            weight + offset(n, row_stride)[:, None] + offset(word, column_stride)[None, :],
            mask=within(n, N, word * 32, K),
            other=0,
        )
        return unpacked(words)
    else:
        w = _strided(weight, n, block, N, K, row_stride, column_stride, BLOCK_K)
        return tl.where(w < 0, -1.0, 1.0 if SIGNS == "plus" else tl.where(w > 0, 1.0, 0.0))


@triton.jit
def values(
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
    LAW: tl.constexpr,
    HAS_LOW: tl.constexpr,
    SIGNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 tile of F / scale: rows n (any integers), columns [block * BLOCK_K, (block + 1) * BLOCK_K). Some finite
    value outside of the matrix."""
    if LAW is not None:
        value = philox.panel(
            seed, stream, step, n[:, None], block, law_scale, span, low, LAW, HAS_LOW, n.shape[0], BLOCK_K
        )
    elif magnitude is not None:
        value = _strided(magnitude, n, block, N, K, magnitude_row, magnitude_column, BLOCK_K)
    else:
        value = tl.full((n.shape[0], BLOCK_K), 1.0, tl.float32)
    if SIGNS != "none":
        value = tl.abs(value) * _signs(weight, n, block, N, K, weight_row, weight_column, SIGNS, BLOCK_K)
    return value


@triton.jit
def load_state(state, LAW: tl.constexpr):
    """(seed, stream, step), zeros without random values."""
    if LAW is not None:
        return philox.load_state(state)
    else:
        return 0, 0, 0


@triton.jit(do_not_specialize=["N"])
def matrix_kernel(
    out,
    weight,
    magnitude,
    state,
    scale,
    law_scale,
    span,
    low,
    N,
    K,
    weight_row,
    weight_column,
    magnitude_row,
    magnitude_column,
    LAW: tl.constexpr,
    HAS_LOW: tl.constexpr,
    SIGNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = F (N, K)."""
    pid = program_id(0)
    blocks = tl.cdiv(K, BLOCK_K)
    n, block = indices(pid // blocks, BLOCK_N), pid % blocks
    seed, stream, step = load_state(state, LAW)
    value = values(
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
    k = indices(block, BLOCK_K)
    value = rounded(value * tl.cast(scale, tl.float32), out.dtype.element_ty)
    store_tile(out, value, n, k, N, K)


@triton.jit(do_not_specialize=["B"])
def rows_kernel(
    index,
    out,
    state,
    scale,
    law_scale,
    span,
    low,
    B,
    K,
    LAW: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[b] = row index[b] of scale * law."""
    pid = program_id(0)
    blocks = tl.cdiv(K, BLOCK_K)
    b, block = indices(pid // blocks, BLOCK_N), pid % blocks
    seed, stream, step = load_state(state, LAW)
    row = tl.load(index + b, mask=b < B, other=0)
    value = philox.panel(seed, stream, step, row[:, None], block, law_scale, span, low, LAW, HAS_LOW, BLOCK_N, BLOCK_K)
    k = indices(block, BLOCK_K)
    value = rounded(value * tl.cast(scale, tl.float32), out.dtype.element_ty)
    store_tile(out, value, b, k, B, K)


@triton.jit(do_not_specialize=["N"])
def pack_signs_kernel(weight, packed, N, K, row_stride, column_stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bit j % 32 of packed[i, j // 32] is set where weight[i, j] < 0."""
    pid = program_id(0)
    blocks = tl.cdiv(K, BLOCK_K)
    n, block = indices(pid // blocks, BLOCK_N), pid % blocks
    w = _strided(weight, n, block, N, K, row_stride, column_stride, BLOCK_K)
    bits = tl.reshape((w < 0).to(tl.int32), (BLOCK_N, BLOCK_K // 32, 32)) << tl.arange(0, 32)[None, None, :]
    word = indices(block, BLOCK_K // 32)
    tl.store(
        packed + offset(n, tl.cdiv(K, 32))[:, None] + word[None, :], tl.sum(bits, 2), mask=within(n, N, word * 32, K)
    )

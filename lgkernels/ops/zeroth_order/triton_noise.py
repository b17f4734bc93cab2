"""Triton kernels of zeroth-order optimisation: noise by formula is made in registers, where its tile is."""

import triton
import triton.language as tl

from ..common import philox
from ..common.addressing import indices, load_tile, offset, program_id, store_tile, within
from ..common.dot import dot
from ..common.rounding import product, rounded


@triton.jit(do_not_specialize=["R", "P"])
def linear_kernel(
    x,
    out,
    weight,
    bias,
    coefficients,
    states,
    law_scale,
    span,
    low,
    R,
    P,
    N,
    K,
    weight_row,
    weight_column,
    state_row,
    LAW: tl.constexpr,
    HAS_LOW: tl.constexpr,
    SUMMED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of out = x (W + c Z)^T + b for the P rows of a group, which share a matrix Z; R rows a member. SUMMED:
    the group is one member, and float32 operands hold W + c Z; else x W^T and c (x Z^T) are two sums, so that half
    operands lose nothing of a small c."""
    pid = program_id(0)
    n_blocks, m_blocks = tl.cdiv(N, BLOCK_N), tl.cdiv(P, BLOCK_M)
    n, rest = indices(pid % n_blocks, BLOCK_N), pid // n_blocks
    m, group = indices(rest % m_blocks, BLOCK_M), rest // m_blocks
    seed, stream, step = philox.load_state(states + offset(group, state_row))
    x += offset(offset(group, P), K)
    plain = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    along = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(tl.cdiv(K, BLOCK_K)):
        k = indices(block, BLOCK_K)
        rows = load_tile(x, m, k, P, K)
        w = tl.load(
            weight + offset(n, weight_row)[:, None] + offset(k, weight_column)[None, :],
            mask=within(n, N, k, K),
            other=0.0,
        )
        z = philox.panel(seed, stream, step, n[:, None], block, law_scale, span, low, LAW, HAS_LOW, BLOCK_N, BLOCK_K)
        if SUMMED:
            c = tl.load(coefficients + group)
            plain = dot(rows, tl.trans(w.to(tl.float32) + c * z), plain, PRECISION)
        else:
            plain = dot(rows, tl.trans(w), plain, PRECISION)
            along = dot(rows, tl.trans(z), along, PRECISION)
    if not SUMMED:
        row = offset(group, P) + m
        plain += tl.load(coefficients + row // R, mask=m < P, other=0.0)[:, None] * along
    total = plain
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    store_tile(out + offset(offset(group, P), N), rounded(total, out.dtype.element_ty), m, n, P, N)


@triton.jit(do_not_specialize=["first", "R", "N"])
def perturbed_rows_kernel(
    weight,
    out,
    index,
    coefficients,
    states,
    law_scale,
    span,
    low,
    first,
    R,
    N,
    K,
    weight_row,
    weight_column,
    state_row,
    LAW: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of a member's R rows of W + c Z (without a weight c Z): first + r, or index[r]; nan where none is."""
    pid = program_id(0)
    blocks, r_blocks = tl.cdiv(K, BLOCK_K), tl.cdiv(R, BLOCK_N)
    block, rest = pid % blocks, pid // blocks
    r, member = indices(rest % r_blocks, BLOCK_N), rest // r_blocks
    k = indices(block, BLOCK_K)
    row = first + r
    if index is not None:
        row = tl.load(index + offset(member, R) + r, mask=r < R, other=0)
    there = (row >= 0) & (row < N)
    seed, stream, step = philox.load_state(states + offset(member, state_row))
    z = philox.panel(seed, stream, step, row[:, None], block, law_scale, span, low, LAW, HAS_LOW, BLOCK_N, BLOCK_K)
    total = z * tl.load(coefficients + member)
    if weight is not None:
        at = weight + offset(row, weight_row)[:, None] + offset(k, weight_column)[None, :]
        total += tl.load(at, mask=there[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    total = tl.where(there[:, None], total, float("nan"))
    store_tile(out + offset(offset(member, R), K), rounded(total, out.dtype.element_ty), r, k, R, K)


@triton.jit(do_not_specialize=["count", "N"])
def update_kernel(
    weight,
    coefficients,
    states,
    keep,
    law_scale,
    span,
    low,
    count,
    N,
    K,
    weight_row,
    weight_column,
    LAW: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of W <- keep W + sum_i c_i Z_i, each product rounded by itself."""
    pid = program_id(0)
    blocks = tl.cdiv(K, BLOCK_K)
    n, block = indices(pid // blocks, BLOCK_N), pid % blocks
    k = indices(block, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for i in range(count):
        seed, stream, step = philox.load_state(states + offset(i, 3))
        z = philox.panel(seed, stream, step, n[:, None], block, law_scale, span, low, LAW, HAS_LOW, BLOCK_N, BLOCK_K)
        moved = product(z, tl.zeros_like(z) + tl.load(coefficients + i))
        total = tl.where(i == 0, moved, total + moved)  # 0 + (-0) is another zero
    at = weight + offset(n, weight_row)[:, None] + offset(k, weight_column)[None, :]
    inside = within(n, N, k, K)
    w = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    kept = product(w, tl.zeros_like(w) + tl.cast(keep, tl.float32))
    tl.store(at, rounded(kept + total, weight.dtype.element_ty), mask=inside)

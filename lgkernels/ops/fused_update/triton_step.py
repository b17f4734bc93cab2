"""The Triton kernel of the fused step: a tile of dW in registers meets its tile of W and of W's states."""

import triton
import triton.language as tl

from ..common.addressing import indices, load_tile, offset, program_id, within
from ..common.dot import dot
from ..common.rounding import rounded
from .triton_codes import decoded, encoded


@triton.jit
def _place(matrix, n, k, row_stride, column_stride):
    return matrix + offset(n, row_stride)[:, None] + offset(k, column_stride)[None, :]


@triton.jit
def _gradient(
    grad,
    x,
    gradient,
    n,
    k,
    inside,
    M,
    N,
    K,
    gradient_row,
    gradient_column,
    grad_scale,
    clip_value,
    MANHATTAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile's whole sum over the samples, with a gradient of the caller's own, scaled and clipped."""
    g = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        rows = load_tile(grad, m, n, M, N)
        columns = load_tile(x, m, k, M, K)
        g = dot(tl.trans(rows), columns, g, PRECISION)
    if gradient is not None:
        at = _place(gradient, n, k, gradient_row, gradient_column)
        g += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    g *= tl.cast(grad_scale, tl.float32)
    limit = tl.cast(clip_value, tl.float32)
    g = tl.where(g > limit, limit, tl.where(g < -limit, -limit, g))  # NaN stays
    if MANHATTAN:
        g = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))
    return g


@triton.jit(do_not_specialize=["M"])
def fused_update_kernel(
    weight,
    first,
    second,
    gradient,
    grad,
    x,
    lr,
    momentum,
    fresh,
    weight_decay,
    keep,
    beta2,
    fresh2,
    eps,
    root,
    grad_scale,
    clip_value,
    M,
    N,
    K,
    weight_row,
    weight_column,
    first_row,
    first_column,
    second_row,
    second_column,
    gradient_row,
    gradient_column,
    NESTEROV: tl.constexpr,
    MANHATTAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of W, its whole sum over the samples, then the step (reference.py); a `second` makes it Adam's."""
    pid = program_id(0)
    blocks = tl.cdiv(K, BLOCK_K)
    n, k = indices(pid // blocks, BLOCK_N), indices(pid % blocks, BLOCK_K)
    inside = within(n, N, k, K)
    g = _gradient(
        grad,
        x,
        gradient,
        n,
        k,
        inside,
        M,
        N,
        K,
        gradient_row,
        gradient_column,
        grad_scale,
        clip_value,
        MANHATTAN,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    at = _place(weight, n, k, weight_row, weight_column)
    w = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    g += tl.cast(weight_decay, tl.float32) * w
    step = g
    if first is not None:
        mu = tl.cast(momentum, tl.float32)
        at_first = _place(first, n, k, first_row, first_column)
        v = mu * tl.load(at_first, mask=inside, other=0.0).to(tl.float32) + tl.cast(fresh, tl.float32) * g
        tl.store(at_first, rounded(v, first.dtype.element_ty), mask=inside)
        step = g + mu * v if NESTEROV else v
        if second is not None:
            at_second = _place(second, n, k, second_row, second_column)
            s = tl.cast(beta2, tl.float32) * tl.load(at_second, mask=inside, other=0.0).to(tl.float32)
            s += tl.cast(fresh2, tl.float32) * g * g
            tl.store(at_second, rounded(s, second.dtype.element_ty), mask=inside)
            step = v / (tl.sqrt(s) / tl.cast(root, tl.float32) + tl.cast(eps, tl.float32))
    w = tl.cast(keep, tl.float32) * w - tl.cast(lr, tl.float32) * step
    tl.store(at, rounded(w, weight.dtype.element_ty), mask=inside)


@triton.jit
def _codes_of(state, absmax, n, k, N, K, inside, SIGNED: tl.constexpr):
    """Values of a tile that is one block wide."""
    codes = tl.load(state + offset(n, K)[:, None] + k[None, :], mask=inside, other=0)
    scale = tl.load(absmax + _block_of(n, k, K), mask=n < N, other=0.0)
    return decoded(codes, SIGNED) * scale[:, None]


@triton.jit
def _block_of(n, k, K):
    """The place of the block that rows n have at columns k."""
    return offset(n, tl.cdiv(K, 256)) + tl.min(k, 0) // 256


@triton.jit
def _round_to(state, absmax, value, n, k, N, K, inside, SIGNED: tl.constexpr):
    codes, largest = encoded(value, inside, SIGNED)
    tl.store(state + offset(n, K)[:, None] + k[None, :], codes, mask=inside)
    tl.store(absmax + _block_of(n, k, K), largest, mask=n < N)


@triton.jit(do_not_specialize=["M"])
def fused_update_8bit_kernel(
    weight,
    first,
    first_max,
    second,
    second_max,
    gradient,
    grad,
    x,
    lr,
    momentum,
    fresh,
    weight_decay,
    keep,
    beta2,
    fresh2,
    eps,
    root,
    grad_scale,
    clip_value,
    M,
    N,
    K,
    weight_row,
    weight_column,
    gradient_row,
    gradient_column,
    NESTEROV: tl.constexpr,
    MANHATTAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`fused_update_kernel` with states of 8 bits, whose blocks are the rows of a tile: BLOCK_K is 256."""
    pid = program_id(0)
    blocks = tl.cdiv(K, BLOCK_K)
    n, k = indices(pid // blocks, BLOCK_N), indices(pid % blocks, BLOCK_K)
    inside = within(n, N, k, K)
    g = _gradient(
        grad,
        x,
        gradient,
        n,
        k,
        inside,
        M,
        N,
        K,
        gradient_row,
        gradient_column,
        grad_scale,
        clip_value,
        MANHATTAN,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    at = _place(weight, n, k, weight_row, weight_column)
    w = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    g += tl.cast(weight_decay, tl.float32) * w
    mu = tl.cast(momentum, tl.float32)
    v = mu * _codes_of(first, first_max, n, k, N, K, inside, True) + tl.cast(fresh, tl.float32) * g
    step = g + mu * v if NESTEROV else v
    if second is not None:
        s = tl.cast(beta2, tl.float32) * _codes_of(second, second_max, n, k, N, K, inside, False)
        s += tl.cast(fresh2, tl.float32) * g * g
        step = v / (tl.sqrt(s) / tl.cast(root, tl.float32) + tl.cast(eps, tl.float32))
        _round_to(second, second_max, s, n, k, N, K, inside, False)
    _round_to(first, first_max, v, n, k, N, K, inside, True)
    w = tl.cast(keep, tl.float32) * w - tl.cast(lr, tl.float32) * step
    tl.store(at, rounded(w, weight.dtype.element_ty), mask=inside)

"""Triton kernels over rows that lie side by side: cross entropy of logits, goodness, and the similarity of rows against
that of labels.

A program owns BLOCK_B rows and runs over them, BLOCK_F columns at a time, as often as sums depend on each other;
what it reads again lies in the cache. 1e-8 is reference.py's EPS_NORM; 2^-20, eight units in the last place, is
what rounding may leave of a constant.
"""

import triton
import triton.language as tl

from ..common.addressing import indices, offset, program_id, within
from ..common.rows import cross_entropy_in_tiles, row_tile


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], small x included."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit(do_not_specialize=["B"])
def cross_entropy_kernel(
    logits,
    target,
    losses,
    B,
    F,
    smoothing,
    grad_scale,
    GRAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Losses of all rows; with GRAD v <- grad_scale * (softmax(v) - smoothed one-hot) (ops/common/rows.py)."""
    b = indices(program_id(0), BLOCK_B)
    label = tl.load(target + b, mask=b < B, other=0)[:, None]
    loss = cross_entropy_in_tiles(logits, label, b, B, F, smoothing, grad_scale, GRAD, BLOCK_B, BLOCK_F)
    tl.store(losses + b, loss, mask=b < B)


@triton.jit(do_not_specialize=["B", "slices"])
def goodness_kernel(
    partial,
    is_positive,
    squares,
    kappa,
    loss,
    B,
    slices,
    threshold,
    factor,
    SLICES: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One program: squares from their `slices` parts; loss = mean of softplus(s (threshold - factor * squares)),
    kappa (None: not wanted) = -s sigmoid(...) 2 factor / B."""
    part = tl.arange(0, SLICES)
    losses = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        at = offset(part, B)[:, None] + b[None, :]
        square = tl.sum(tl.load(partial + at, mask=within(part, slices, b, B), other=0.0), 0)
        sign = tl.where(tl.load(is_positive + b, mask=b < B, other=0) != 0, 1.0, -1.0)
        margin = sign * (tl.cast(threshold, tl.float32) - square * tl.cast(factor, tl.float32))
        tail = tl.exp(-tl.abs(margin))
        losses += tl.where(b < B, tl.maximum(margin, 0.0) + _log1p(tail), 0.0)
        tl.store(squares + b, square, mask=b < B)
        if kappa is not None:
            slope = tl.cast(factor, tl.float32) * -2.0 / B
            tl.store(kappa + b, sign * slope * tl.where(margin > 0.0, 1.0, tail) / (1.0 + tail), mask=b < B)
    tl.store(loss, tl.sum(losses, 0) / B)


@triton.jit(do_not_specialize=["B"])
def normalize_kernel(x, rows, norms, B, F, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr):
    """rows = (x - mean) / (1e-8 + norm), norms = |x - mean|; both 0 where only rounding varies in a row."""
    b = indices(program_id(0), BLOCK_B)
    total = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    square = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    for start in range(0, F, BLOCK_F):
        c, at, mask = row_tile(b, start, B, F, BLOCK_F)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        total += value
        square += value * value
    mean = (tl.sum(total, 1) / F)[:, None]
    length = tl.sqrt_rn(tl.sum(square, 1))
    square = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    for start in range(0, F, BLOCK_F):
        c, at, mask = row_tile(b, start, B, F, BLOCK_F)
        centred = tl.where(mask, tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean, 0.0)
        square += centred * centred
    norm = tl.sqrt_rn(tl.sum(square, 1))
    flat = norm <= length * 9.5367431640625e-07  # not where it is nan
    tl.store(norms + b, tl.where(flat, 0.0, norm), mask=b < B)
    inverse = tl.where(flat, 0.0, 1.0 / (norm + 1e-8))[:, None]
    for start in range(0, F, BLOCK_F):
        c, at, mask = row_tile(b, start, B, F, BLOCK_F)
        tl.store(rows + at, (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean) * inverse, mask=mask)


@triton.jit(do_not_specialize=["B"])
def match_kernel(products, target, losses, B, F, same, other, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr):
    """products <- clamp(products, -1, 1) - (same | other), B rows of F = B; losses = their sums of squares / F^2."""
    b = indices(program_id(0), BLOCK_B)
    label = tl.load(target + b, mask=b < B, other=0)[:, None]
    total = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    for start in range(0, F, BLOCK_F):
        c, at, mask = row_tile(b, start, B, F, BLOCK_F)
        product = tl.load(products + at, mask=mask, other=0.0)
        product = tl.where(product < -1.0, -1.0, tl.where(product > 1.0, 1.0, product))  # nan stays
        equal = tl.load(target + c, mask=c < F, other=0)[None, :] == label
        error = product - tl.where(equal, tl.cast(same, tl.float32), tl.cast(other, tl.float32))
        total += tl.where(mask, error * error, 0.0)
        tl.store(products + at, error, mask=mask)
    share = 1.0 / F
    tl.store(losses + b, tl.sum(total, 1) * share * share, mask=b < B)


@triton.jit(do_not_specialize=["B", "positions"])
def rows_grad_kernel(
    grad, rows, norms, deviation, mean, out, B, F, positions, factor, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr
):
    """The gradient factor * grad of rows, through their normalisation; with `deviation` through that too."""
    b = indices(program_id(0), BLOCK_B)
    norm = tl.load(norms + b, mask=b < B, other=0.0)
    along = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    sum_grad = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    sum_rows = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    for start in range(0, F, BLOCK_F):
        c, at, mask = row_tile(b, start, B, F, BLOCK_F)
        g, r = tl.load(grad + at, mask=mask, other=0.0), tl.load(rows + at, mask=mask, other=0.0)
        along += g * r
        sum_grad += g
        sum_rows += r
    varies = norm != 0.0  # nan too
    share = tl.sum(along, 1) * (1.0 + 1e-8 / tl.where(varies, norm, 1.0))
    centre = ((tl.sum(sum_grad, 1) - share * tl.sum(sum_rows, 1)) / F)[:, None]
    inverse = tl.where(varies, tl.cast(factor, tl.float32) / (norm + 1e-8), 0.0)[:, None]
    for start in range(0, F, BLOCK_F):
        c, at, mask = row_tile(b, start, B, F, BLOCK_F)
        g, r = tl.load(grad + at, mask=mask, other=0.0), tl.load(rows + at, mask=mask, other=0.0)
        value = (g - r * share[:, None] - centre) * inverse
        if deviation is not None:
            std = tl.load(deviation + at, mask=mask, other=1.0)
            flat = std <= tl.abs(tl.load(mean + at, mask=mask, other=0.0)) * 9.5367431640625e-07
            value = tl.where(flat, 0.0, value / (tl.where(flat, 1.0, std) * (positions - 1.0)))
        tl.store(out + at, value, mask=mask)

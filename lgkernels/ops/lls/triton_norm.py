"""Triton kernels of the convolution block: statistics, normalise + activate + pool, gradient of the pre-activation.

A tensor (B, C, H, W) is read as tiles (positions, planes); plane b * C + c is one channel of one sample, and
`CHANNELS_LAST` tells which of the two axes is contiguous. One program serves one bin of the adaptive average pool and a
block of planes, so what belongs to a bin (its sums, its gradient) is stored or loaded once. Bins may overlap
(H % P != 0) or repeat positions (P > H). A position is *owned* by the last bin that holds it, the one bin i with
start(i) <= position < start(i + 1): every output element is written by its owner, once.
"""

import triton
import triton.language as tl

from ..common.addressing import indices, offset, program_id, within
from ..common.moments import combine
from .triton_head import finish_head


@triton.jit
def bin_range(i, size, pool):
    """Bin i holds positions [floor(i * size / pool), ceil((i + 1) * size / pool)), and owns those before start(i + 1).

    Returns (start, end, end of the owned positions).
    """
    return i * size // pool, ((i + 1) * size + pool - 1) // pool, (i + 1) * size // pool


@triton.jit
def _elements(plane, row, column, C, H, W, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr):
    """int64 offsets (positions, planes) of [plane // C, plane % C, row, column]; in NCHW order columns come in
    aligned runs of RUN."""
    position = row * W + column
    if CHANNELS_LAST:
        return offset(position, C)[:, None] + (offset(plane // C, H * W * C) + plane % C)[None, :]
    position = tl.max_contiguous(tl.multiple_of(position, RUN), RUN)
    return offset(plane, tl.multiple_of(H * W, RUN))[None, :] + position[:, None]


@triton.jit
def _bin_of_program(P, BLOCK_C: tl.constexpr):
    """(bin row, bin column, planes) of this program, int32; bins vary fastest, so that neighbours share cache lines."""
    pid = program_id(0)
    bin = pid % (P * P)
    return bin // P, bin % P, indices(pid // (P * P), BLOCK_C).to(tl.int32)


@triton.jit
def _normalization(mean, rstd, gamma, beta, c, inside):
    """The four vectors at channels c, each (1, planes)."""
    return (
        tl.load(mean + c, mask=inside, other=0.0)[None, :],
        tl.load(rstd + c, mask=inside, other=0.0)[None, :],
        tl.load(gamma + c, mask=inside, other=0.0)[None, :],
        tl.load(beta + c, mask=inside, other=0.0)[None, :],
    )


@triton.jit(do_not_specialize=["B", "H", "W", "P"])
def norm_act_pool_kernel(
    z,
    out,
    latents,
    s1,
    s2,
    mean,
    rstd,
    gamma,
    beta,
    slope,
    B,
    C,
    H,
    W,
    P,
    NORM: tl.constexpr,
    GRAD: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """a = leaky_relu(gamma * (z - mean) * rstd + beta), or z itself without NORM; per bin the mean of a and the sums
    of lambda and lambda * xhat. Positions are visited in WINDOW x WINDOW groups, whose maximum is the output."""
    i, j, plane = _bin_of_program(P, BLOCK_C)
    top, bottom, next_top = bin_range(i, H, P)
    left, right, next_left = bin_range(j, W, P)
    exists = plane < B * C
    if NORM:
        mu, r, g, shift = _normalization(mean, rstd, gamma, beta, plane % C, exists)
        negative = tl.cast(slope, tl.float32)
    row0, column0 = top // WINDOW, left // WINDOW
    rows, columns = (bottom - 1) // WINDOW + 1 - row0, (right - 1) // WINDOW + 1 - column0
    count = tl.multiple_of(rows * columns, RUN)
    sum_a = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_lambda = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_xhat = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row, column = row0 + p // columns, column0 + p % columns
        inside = p < count
        largest = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
        for dy in tl.static_range(WINDOW):
            for dx in tl.static_range(WINDOW):
                h, w = row * WINDOW + dy, column * WINDOW + dx
                if WINDOW == 1:
                    valid = inside
                    member = valid[:, None]
                else:
                    valid = inside & (h < H) & (w < W)
                    member = (valid & (h >= top) & (h < bottom) & (w >= left) & (w < right))[:, None]
                value = tl.load(
                    z + _elements(plane, h, w, C, H, W, CHANNELS_LAST, RUN),
                    mask=valid[:, None] & exists[None, :],
                    other=0.0,
                ).to(tl.float32)
                if NORM:
                    xhat = (value - mu) * r
                    u = xhat * g + shift
                    slope_here = tl.where(u > 0, 1.0, negative)
                    a = u * slope_here
                    if WINDOW == 1:
                        largest = a
                    else:
                        largest = tl.where((a > largest) | (a != a), a, largest)
                    sum_a += tl.where(member, a, 0.0)
                    if GRAD:
                        sum_lambda += tl.where(member, slope_here, 0.0)
                        sum_xhat += tl.where(member, slope_here * xhat, 0.0)
                else:
                    sum_a += tl.where(member, value, 0.0)
        if NORM:
            if RUN > 1:  # exact tiling: all are owned, in aligned runs
                owned = inside
            else:
                owned = (
                    inside
                    & (row * WINDOW >= top)
                    & (row * WINDOW < next_top)
                    & (row < H // WINDOW)
                    & (column * WINDOW >= left)
                    & (column * WINDOW < next_left)
                    & (column < W // WINDOW)
                )
            to = _elements(plane, row, column, C, H // WINDOW, W // WINDOW, CHANNELS_LAST, RUN)
            tl.store(out + to, largest.to(out.dtype.element_ty), mask=owned[:, None] & exists[None, :])
    to = offset(plane, P * P) + (i * P + j)
    area = (bottom - top) * (right - left) * 1.0
    tl.store(latents + to, tl.sum(sum_a, 0) / area, mask=exists)
    if GRAD:
        tl.store(s1 + to, tl.sum(sum_lambda, 0), mask=exists)
        tl.store(s2 + to, tl.sum(sum_xhat, 0), mask=exists)


@triton.jit
def _bin_gradient(grad_latents, plane, exists, y, x, H, W, P):
    """grad / area of bin (y, x), (1, planes)."""
    top, bottom, _ = bin_range(y, H, P)
    left, right, _ = bin_range(x, W, P)
    grad = tl.load(grad_latents + offset(plane, P * P) + (y * P + x), mask=exists, other=0.0)
    return (grad / ((bottom - top) * (right - left) * 1.0))[None, :]


@triton.jit
def _unpooled(grad_latents, plane, exists, i, j, row, column, H, W, P, COVER: tl.constexpr):
    """Sum of grad / area over the bins that hold (row, column), positions owned by bin (i, j), (positions, planes).

    They are among the COVER bins up to the owner in each direction.
    """
    total = tl.zeros((row.shape[0], plane.shape[0]), tl.float32)
    for dy in range(COVER):
        for dx in range(COVER):
            holds = ((row < ((i - dy + 1) * H + P - 1) // P) & (column < ((j - dx + 1) * W + P - 1) // P))[:, None]
            y, x = tl.maximum(i - dy, 0), tl.maximum(j - dx, 0)  # holds is False at bins that do not exist
            total += tl.where(holds, _bin_gradient(grad_latents, plane, exists, y, x, H, W, P), 0.0)
    return total


@triton.jit(do_not_specialize=["B", "H", "W", "P"])
def grad_preactivation_kernel(
    z,
    mean,
    rstd,
    gamma,
    beta,
    grad_latents,
    grad_gamma,
    grad_beta,
    slope,
    scale,
    inverse_count,
    B,
    C,
    H,
    W,
    P,
    COVER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """z <- scale * gamma * rstd * (lambda * g - (dbeta + xhat * dgamma) / N), g = unpool(grad_latents)."""
    i, j, plane = _bin_of_program(P, BLOCK_C)
    top, _, next_top = bin_range(i, H, P)
    left, _, next_left = bin_range(j, W, P)
    columns = next_left - left
    count = tl.multiple_of((next_top - top) * columns, RUN)
    exists = plane < B * C
    mu, r, g, shift = _normalization(mean, rstd, gamma, beta, plane % C, exists)
    share = tl.cast(inverse_count, tl.float32)
    mean_grad = (tl.load(grad_beta + plane % C, mask=exists, other=0.0) * share)[None, :]
    mean_grad_xhat = (tl.load(grad_gamma + plane % C, mask=exists, other=0.0) * share)[None, :]
    factor = g * r * tl.cast(scale, tl.float32)
    negative = tl.cast(slope, tl.float32)
    if COVER == 1:
        grad = _bin_gradient(grad_latents, plane, exists, i, j, H, W, P)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row, column = top + p // columns, left + p % columns
        at = z + _elements(plane, row, column, C, H, W, CHANNELS_LAST, RUN)
        mask = (p < count)[:, None] & exists[None, :]
        xhat = (tl.load(at, mask=mask, other=0.0).to(tl.float32) - mu) * r
        if COVER > 1:
            grad = _unpooled(grad_latents, plane, exists, i, j, row, column, H, W, P, COVER)
        grad_u = tl.where(xhat * g + shift > 0, grad, grad * negative)
        result = factor * (grad_u - (mean_grad + xhat * mean_grad_xhat))
        tl.store(at, result.to(z.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "H", "W", "P"])
def expand_grad_kernel(
    grad_latents,
    scale,
    out,
    B,
    C,
    H,
    W,
    P,
    PER_ROW: tl.constexpr,
    COVER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = scale * unpool(grad_latents); scale is one value or one a sample."""
    i, j, plane = _bin_of_program(P, BLOCK_C)
    top, _, next_top = bin_range(i, H, P)
    left, _, next_left = bin_range(j, W, P)
    columns = next_left - left
    count = tl.multiple_of((next_top - top) * columns, RUN)
    exists = plane < B * C
    if PER_ROW:
        factor = tl.load(scale + plane // C, mask=exists, other=0.0).to(tl.float32)[None, :]
    else:
        factor = tl.load(scale).to(tl.float32)
    if COVER == 1:
        grad = _bin_gradient(grad_latents, plane, exists, i, j, H, W, P)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row, column = top + p // columns, left + p % columns
        if COVER > 1:
            grad = _unpooled(grad_latents, plane, exists, i, j, row, column, H, W, P, COVER)
        result = tl.broadcast_to(grad * factor, (BLOCK_P, BLOCK_C))
        tl.store(
            out + _elements(plane, row, column, C, H, W, CHANNELS_LAST, RUN),
            result.to(out.dtype.element_ty),
            mask=(p < count)[:, None] & exists[None, :],
        )


@triton.jit(do_not_specialize=["outer", "splits"])
def batch_moments_kernel(
    z, partial, outer, inner, C, splits, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Pass 1: count, mean and sum of squared deviations of every `splits`-th tile, by Welford's update in each tile
    slot. z is (outer, inner, C) with channels last, (outer, C, inner) else; partial is (splits, 4, C).

    All of z is counted from a value near the channel's mean, the fourth row: a mean far from zero then costs no digit
    of the variance."""
    pid = program_id(0)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    c, split = indices(pid % channel_blocks, BLOCK_C), pid // channel_blocks
    blocks = tl.cdiv(inner, BLOCK_P)
    shift = _near_mean(z, c, inner, C, CHANNELS_LAST)
    count = tl.zeros((BLOCK_P,), tl.float32)
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tile in range(split, outer * blocks, splits):
        o, p = tile // blocks, indices(tile % blocks, BLOCK_P)
        inside = p < inner
        if CHANNELS_LAST:
            at = offset(p + offset(o, inner), C)[:, None] + c[None, :]
        else:
            at = offset(c + offset(o, C), inner)[None, :] + p[:, None]
        value = tl.load(z + at, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32) - shift[None, :]
        count += tl.where(inside, 1.0, 0.0)
        delta = tl.where(inside[:, None], value - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)[:, None]
        squares += delta * (value - mean)
    _store_moments(partial + offset(split, 4 * C), count[:, None], mean, squares, c, C)
    tl.store(partial + offset(split, 4 * C) + 3 * C + c, shift, mask=c < C)


@triton.jit
def _near_mean(z, c, inner, C, CHANNELS_LAST: tl.constexpr):
    """Mean of the first sixteen elements of channels c, or of as many as there are in one piece, cut to twelve bits:
    then half precision less it is exact, and not all values of one exponent are rounded the same way. 0 where the mean
    is no larger than the spread: counting from elsewhere would cost the mean digits."""
    p = tl.arange(0, 16)
    at = offset(p, C)[:, None] + c[None, :] if CHANNELS_LAST else offset(c, inner)[None, :] + p[:, None]
    inside = (p < inner)[:, None]
    value = tl.load(z + at, mask=inside & (c < C)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / tl.minimum(inner, 16)
    spread = tl.max(tl.where(inside, tl.abs(value - mean[None, :]), 0.0), 0)
    short = (mean.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(mean) > 8 * spread, short, 0.0)


@triton.jit
def _store_moments(partial, count, mean, squares, c, C):
    total, total_mean, total_squares = combine(count, mean, squares)
    tl.store(partial + c, tl.zeros_like(total_mean) + total, mask=c < C)
    tl.store(partial + C + c, total_mean, mask=c < C)
    tl.store(partial + 2 * C + c, total_squares, mask=c < C)


@triton.jit(do_not_specialize=["splits", "C"])
def batch_stats_kernel(
    partial,
    bias,
    mean,
    rstd,
    running_mean,
    running_var,
    momentum,
    eps,
    splits,
    C,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Pass 2: combine the partial moments; write mean and 1/sqrt(var + eps), move the running statistics."""
    c = indices(program_id(0), BLOCK_C)
    s = tl.arange(0, SPLITS)
    at = partial + offset(s, 4 * C)[:, None] + c[None, :]
    mask = within(s, splits, c, C)
    total, mu, squares = combine(
        tl.load(at, mask=mask, other=0.0),
        tl.load(at + C, mask=mask, other=0.0),
        tl.load(at + 2 * C, mask=mask, other=0.0),
    )
    mu += tl.load(partial + 3 * C + c, mask=c < C, other=0.0)
    var = squares / total
    tl.store(mean + c, mu, mask=c < C)
    tl.store(rstd + c, 1.0 / tl.sqrt(var + tl.cast(eps, tl.float32)), mask=c < C)
    if running_mean is not None:
        weight = tl.cast(momentum, tl.float32)
        shifted = mu
        if bias is not None:
            shifted = mu + tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        old_mean = tl.load(running_mean + c, mask=c < C, other=0.0)
        old_var = tl.load(running_var + c, mask=c < C, other=0.0)
        unbiased = squares / tl.maximum(total - 1.0, 1.0)
        tl.store(running_mean + c, old_mean + weight * (shifted - old_mean), mask=c < C)
        tl.store(running_var + c, old_var + weight * (unbiased - old_var), mask=c < C)


@triton.jit
def _norm_grads(
    block,
    grad_latents,
    s1,
    s2,
    area,
    grad_gamma,
    grad_beta,
    grad_bias,
    B,
    C,
    positions,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dgamma, dbeta = sums over batch and bins of grad/area * s2, * s1, for a block of channels; grad_bias = 0."""
    c = indices(block, BLOCK_C)
    by_s1 = tl.zeros((BLOCK_B, BLOCK_C, BLOCK_P), tl.float32)
    by_s2 = tl.zeros((BLOCK_B, BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, positions, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        size = tl.load(area + p, mask=p < positions, other=1.0).to(tl.float32)[None, None, :]
        for first in range(0, B, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)
            at = offset(offset(b, C)[:, None] + c[None, :], positions)[:, :, None] + p[None, None, :]
            mask = (within(b, B, c, C))[:, :, None] & (p < positions)[None, None, :]
            g = tl.load(grad_latents + at, mask=mask, other=0.0) / size
            by_s1 += g * tl.load(s1 + at, mask=mask, other=0.0)
            by_s2 += g * tl.load(s2 + at, mask=mask, other=0.0)
    tl.store(grad_beta + c, tl.sum(tl.sum(by_s1, 2), 0), mask=c < C)
    tl.store(grad_gamma + c, tl.sum(tl.sum(by_s2, 2), 0), mask=c < C)
    tl.store(grad_bias + c, tl.zeros((BLOCK_C,), tl.float32), mask=c < C)


@triton.jit(do_not_specialize=["B", "C", "positions", "ignore_index"])
def norm_grads_kernel(
    grad_latents,
    s1,
    s2,
    area,
    grad_gamma,
    grad_beta,
    grad_bias,
    B,
    C,
    positions,
    losses,
    target,
    loss,
    similarity,
    grad_logits,
    grad_modulation,
    K,
    classes,
    ignore_index,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_B: tl.constexpr,
    HEAD_K: tl.constexpr,
    HEAD_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A block of channels a program; further programs finish the head where `losses` are given."""
    pid = program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    if losses is None:
        _norm_grads(
            pid,
            grad_latents,
            s1,
            s2,
            area,
            grad_gamma,
            grad_beta,
            grad_bias,
            B,
            C,
            positions,
            BLOCK_B,
            BLOCK_C,
            BLOCK_P,
        )
    else:
        if pid < blocks:
            _norm_grads(
                pid,
                grad_latents,
                s1,
                s2,
                area,
                grad_gamma,
                grad_beta,
                grad_bias,
                B,
                C,
                positions,
                BLOCK_B,
                BLOCK_C,
                BLOCK_P,
            )
        else:
            finish_head(
                pid - blocks,
                losses,
                target,
                loss,
                similarity,
                grad_logits,
                grad_modulation,
                B,
                K,
                classes,
                ignore_index,
                VECTOR,
                PRECISION,
                HEAD_B,
                HEAD_K,
                HEAD_C,
            )

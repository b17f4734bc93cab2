"""Triton kernels of the convolution block: statistics, normalise + activate + pool, gradient of the pre-activation.

A tensor (B, C, H, W) is read as tiles (positions, channels); `CHANNELS_LAST` tells which of the two is contiguous. One
program serves one bin of the adaptive average pool and a block of channels, so what belongs to a bin (its sums, its
gradient) is stored or loaded once. Bins may overlap (H % P != 0) or repeat positions (P > H). A position is *owned* by
the one bin i with start(i) <= position < start(i + 1): every output element is written by its owner, once.
"""
import triton
import triton.language as tl

from ..common.addressing import indices, offset, program_id


@triton.jit
def bin_start(i, size, pool):
    """First position of bin i: floor(i * size / pool)."""
    return i * size // pool


@triton.jit
def bin_end(i, size, pool):
    """One past the last position of bin i: ceil((i + 1) * size / pool)."""
    return ((i + 1) * size + pool - 1) // pool


@triton.jit
def _elements(b, row, column, c, C, H, W, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr):
    """int64 offsets (positions, channels) of [b, c, row, column]; columns come in aligned runs of RUN."""
    position = offset(row, W) + column
    if CHANNELS_LAST:
        return offset(position + offset(b, H * W), C)[:, None] + c[None, :]
    position = tl.max_contiguous(tl.multiple_of(position, RUN), RUN)
    return offset(c + offset(b, C), H * W)[None, :] + position[:, None]


@triton.jit
def _per_channel(vector, c, C):
    return tl.load(vector + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _bin_of_program(C, P, BLOCK_C: tl.constexpr):
    """(batch int64, bin row, bin column, channels int64) of this program; channel blocks vary fastest."""
    pid = program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    bin = pid // blocks
    return bin // (P * P), (bin // P % P).to(tl.int32), (bin % P).to(tl.int32), indices(pid % blocks, BLOCK_C)


@triton.jit
def norm_act_pool_kernel(z, out, latents, s1, s2, mean, rstd, gamma, beta, slope, C, H, W, P,
                         NORM: tl.constexpr, GRAD: tl.constexpr, WINDOW: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                         RUN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """a = leaky_relu(gamma * (z - mean) * rstd + beta), or z itself without NORM; per bin the mean of a and the sums
    of lambda and lambda * xhat. Positions are visited in WINDOW x WINDOW groups, whose maximum is the output."""
    b, i, j, c = _bin_of_program(C, P, BLOCK_C)
    top, bottom, next_top = bin_start(i, H, P), bin_end(i, H, P), bin_start(i + 1, H, P)
    left, right, next_left = bin_start(j, W, P), bin_end(j, W, P), bin_start(j + 1, W, P)
    if NORM:
        mu, r, g, shift = _per_channel(mean, c, C), _per_channel(rstd, c, C), _per_channel(gamma, c, C), _per_channel(beta, c, C)
        negative = tl.cast(slope, tl.float32)
    row0, column0 = top // WINDOW, left // WINDOW
    rows, columns = (bottom - 1) // WINDOW + 1 - row0, (right - 1) // WINDOW + 1 - column0
    sum_a = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_lambda = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_xhat = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, rows * columns, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row, column = row0 + p // columns, column0 + p % columns
        inside = p < rows * columns
        largest = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
        for dy in tl.static_range(WINDOW):
            for dx in tl.static_range(WINDOW):
                h, w = row * WINDOW + dy, column * WINDOW + dx
                valid = inside & (h < H) & (w < W)
                member = (valid & (h >= top) & (h < bottom) & (w >= left) & (w < right))[:, None]
                value = tl.load(z + _elements(b, h, w, c, C, H, W, CHANNELS_LAST, RUN),
                                mask=valid[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
                if NORM:
                    xhat = (value - mu) * r
                    u = xhat * g + shift
                    lam = tl.where(u > 0, 1.0, negative)
                    a = u * lam
                    if WINDOW == 1:
                        largest = a
                    else:
                        largest = tl.where((a > largest) | (a != a), a, largest)
                    lam = tl.where(member, lam, 0.0)
                    sum_a += tl.where(member, a, 0.0)
                    if GRAD:
                        sum_lambda += lam
                        sum_xhat += tl.where(member, lam * xhat, 0.0)
                else:
                    sum_a += tl.where(member, value, 0.0)
        if NORM:
            owned = (inside & (row * WINDOW >= top) & (row * WINDOW < next_top) & (row < H // WINDOW)
                     & (column * WINDOW >= left) & (column * WINDOW < next_left) & (column < W // WINDOW))
            to = _elements(b, row, column, c, C, H // WINDOW, W // WINDOW, CHANNELS_LAST, RUN)
            tl.store(out + to, largest.to(out.dtype.element_ty), mask=owned[:, None] & (c < C)[None, :])
    area = (bottom - top) * (right - left) * 1.0
    to = offset(offset(b, C) + c, P * P) + i * P + j
    tl.store(latents + to, tl.sum(sum_a, 0) / area, mask=c < C)
    if GRAD:
        tl.store(s1 + to, tl.sum(sum_lambda, 0), mask=c < C)
        tl.store(s2 + to, tl.sum(sum_xhat, 0), mask=c < C)


@triton.jit
def _unpooled(grad_latents, b, i, j, row, column, inside, c, C, H, W, P, COVER, EXACT: tl.constexpr):
    """Sum over the bins that hold (row, column) of grad / area, (positions or 1, channels). EXACT: bin (i, j) alone."""
    at = offset(offset(b, C) + c, P * P)[None, :]
    if EXACT:
        area = (H // P) * (W // P) * 1.0
        return tl.load(grad_latents + at + (i * P + j), mask=(c < C)[None, :], other=0.0) / area
    total = tl.zeros((row.shape[0], c.shape[0]), tl.float32)
    # position h lies in the bins floor(h * P / H) .. ceil((h + 1) * P / H) - 1
    for k in range(COVER * COVER):
        y, x = row * P // H + k // COVER, column * P // W + k % COVER
        covers = inside & (y < bin_end(row, P, H)) & (x < bin_end(column, P, W))
        area = (bin_end(y, H, P) - bin_start(y, H, P)) * (bin_end(x, W, P) - bin_start(x, W, P)) * 1.0
        total += tl.load(grad_latents + at + (y * P + x)[:, None], mask=covers[:, None] & (c < C)[None, :],
                         other=0.0) / area[:, None]
    return total


@triton.jit
def grad_preactivation_kernel(z, mean, rstd, gamma, beta, grad_latents, grad_gamma, grad_beta, slope, scale,
                              inverse_count, C, H, W, P, COVER, EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                              RUN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """z <- scale * gamma * rstd * (lambda * g - (dbeta + xhat * dgamma) / N), g = unpool(grad_latents)."""
    b, i, j, c = _bin_of_program(C, P, BLOCK_C)
    top, left = bin_start(i, H, P), bin_start(j, W, P)
    rows, columns = bin_start(i + 1, H, P) - top, bin_start(j + 1, W, P) - left
    mu, r, g, shift = _per_channel(mean, c, C), _per_channel(rstd, c, C), _per_channel(gamma, c, C), _per_channel(beta, c, C)
    share = tl.cast(inverse_count, tl.float32)
    mean_grad, mean_grad_xhat = _per_channel(grad_beta, c, C) * share, _per_channel(grad_gamma, c, C) * share
    factor = g * r * tl.cast(scale, tl.float32)
    negative = tl.cast(slope, tl.float32)
    if EXACT:
        grad = _unpooled(grad_latents, b, i, j, c, c, c, c, C, H, W, P, COVER, True)
    for start in range(0, rows * columns, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row, column = top + p // columns, left + p % columns
        inside = p < rows * columns
        at = z + _elements(b, row, column, c, C, H, W, CHANNELS_LAST, RUN)
        mask = inside[:, None] & (c < C)[None, :]
        xhat = (tl.load(at, mask=mask, other=0.0).to(tl.float32) - mu) * r
        if not EXACT:
            grad = _unpooled(grad_latents, b, i, j, row, column, inside, c, C, H, W, P, COVER, False)
        grad_u = tl.where(xhat * g + shift > 0, grad, grad * negative)
        result = factor * (grad_u - (mean_grad + xhat * mean_grad_xhat))
        tl.store(at, result.to(z.dtype.element_ty), mask=mask)


@triton.jit
def expand_grad_kernel(grad_latents, scale, out, C, H, W, P, COVER, PER_ROW: tl.constexpr, EXACT: tl.constexpr,
                       CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """out = scale * unpool(grad_latents); scale is one value or one a sample."""
    b, i, j, c = _bin_of_program(C, P, BLOCK_C)
    top, left = bin_start(i, H, P), bin_start(j, W, P)
    rows, columns = bin_start(i + 1, H, P) - top, bin_start(j + 1, W, P) - left
    factor = tl.load(scale + (b if PER_ROW else 0)).to(tl.float32)
    if EXACT:
        grad = _unpooled(grad_latents, b, i, j, c, c, c, c, C, H, W, P, COVER, True)
    for start in range(0, rows * columns, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row, column = top + p // columns, left + p % columns
        inside = p < rows * columns
        if not EXACT:
            grad = _unpooled(grad_latents, b, i, j, row, column, inside, c, C, H, W, P, COVER, False)
        result = tl.broadcast_to(grad * factor, (BLOCK_P, BLOCK_C))
        tl.store(out + _elements(b, row, column, c, C, H, W, CHANNELS_LAST, RUN), result.to(out.dtype.element_ty),
                 mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def batch_moments_kernel(z, partial, outer, inner, C, splits, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr,
                         BLOCK_C: tl.constexpr):
    """Pass 1: count, mean and sum of squared deviations of every `splits`-th tile, by Welford's update in each tile
    slot. z is (outer, inner, C) with channels last, (outer, C, inner) else; partial is (splits, 3, C)."""
    pid = program_id(0)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    c, split = indices(pid % channel_blocks, BLOCK_C), pid // channel_blocks
    blocks = tl.cdiv(inner, BLOCK_P)
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
        value = tl.load(z + at, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        count += tl.where(inside, 1.0, 0.0)
        delta = tl.where(inside[:, None], value - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)[:, None]
        squares += delta * (value - mean)
    _store_moments(partial + offset(split, 3 * C), count[:, None], mean, squares, c, C)


@triton.jit
def _store_moments(partial, count, mean, squares, c, C):
    total, total_mean, total_squares = _combine(count, mean, squares)
    tl.store(partial + c, tl.zeros_like(total_mean) + total, mask=c < C)
    tl.store(partial + C + c, total_mean, mask=c < C)
    tl.store(partial + 2 * C + c, total_squares, mask=c < C)


@triton.jit
def _combine(count, mean, squares):
    """Moments of the union along axis 0 (Chan): mean weighted by count, squares plus count * (mean - total mean)^2."""
    total = tl.sum(count, 0)
    total_mean = tl.sum(count * mean, 0) / total
    away = mean - total_mean[None, :]
    return total, total_mean, tl.sum(squares + count * away * away, 0)


@triton.jit
def batch_stats_kernel(partial, bias, mean, rstd, running_mean, running_var, momentum, eps, splits, C,
                       SPLITS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pass 2: combine the partial moments; write mean and 1/sqrt(var + eps), move the running statistics."""
    c = indices(program_id(0), BLOCK_C)
    s = tl.arange(0, SPLITS)
    at = partial + offset(s, 3 * C)[:, None] + c[None, :]
    mask = (s < splits)[:, None] & (c < C)[None, :]
    total, mu, squares = _combine(tl.load(at, mask=mask, other=0.0), tl.load(at + C, mask=mask, other=0.0),
                                  tl.load(at + 2 * C, mask=mask, other=0.0))
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
def norm_grads_kernel(grad_latents, s1, s2, area, grad_gamma, grad_beta, B, C, positions, BLOCK_B: tl.constexpr,
                      BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """dgamma, dbeta = sums over batch and bins of grad/area * s2, * s1, for a block of channels."""
    c = indices(program_id(0), BLOCK_C)
    by_s1 = tl.zeros((BLOCK_B, BLOCK_C, BLOCK_P), tl.float32)
    by_s2 = tl.zeros((BLOCK_B, BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, positions, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        size = tl.load(area + p, mask=p < positions, other=1.0).to(tl.float32)[None, None, :]
        for first in range(0, B, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)
            at = offset(offset(b, C)[:, None] + c[None, :], positions)[:, :, None] + p[None, None, :]
            mask = ((b < B)[:, None] & (c < C)[None, :])[:, :, None] & (p < positions)[None, None, :]
            g = tl.load(grad_latents + at, mask=mask, other=0.0) / size
            by_s1 += g * tl.load(s1 + at, mask=mask, other=0.0)
            by_s2 += g * tl.load(s2 + at, mask=mask, other=0.0)
    tl.store(grad_beta + c, tl.sum(tl.sum(by_s1, 2), 0), mask=c < C)
    tl.store(grad_gamma + c, tl.sum(tl.sum(by_s2, 2), 0), mask=c < C)

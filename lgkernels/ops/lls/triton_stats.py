"""Batch statistics in Triton, in two passes: moments of pieces of the batch, then their union in a fixed order."""

import triton
import triton.language as tl

from ...core.tiles import power_of_two
from ..common.addressing import indices, offset, program_id, within
from ..common.launch import block_count, configuration, launch, new
from ..common.moments import combine
from .tiles import TILES
from .triton_bins import dense


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


def batch_stats(z, bias, running_mean, running_var, momentum, eps):
    z, channels_last = dense(z)
    C = z.shape[1]
    mean, rstd = new(z, C), new(z, C)
    if z.numel() == 0:
        for tensor in (mean, rstd, running_mean, running_var):
            if tensor is not None:
                tensor.fill_(float("nan"))
        return mean, rstd
    count = z.numel() // C
    outer, inner = (1, count) if channels_last else (z.shape[0], count // z.shape[0])
    config = configuration(TILES["batch_stats"], (inner, C, channels_last, False), z)
    channel_blocks = block_count(C, config["BLOCK_C"])
    splits = min(outer * block_count(inner, config["BLOCK_P"]), 128, block_count(1024, channel_blocks))
    partial, sizes = new(z, splits, 4, C), (outer, inner, C, splits)
    launch(
        batch_moments_kernel,
        channel_blocks * splits,
        z.device,
        z,
        partial,
        *sizes,
        CHANNELS_LAST=channels_last,
        **config,
    )
    block = min(power_of_two(C), 16)
    launch(
        batch_stats_kernel,
        block_count(C, block),
        z.device,
        partial,
        bias,
        mean,
        rstd,
        running_mean,
        running_var,
        float(momentum or 0.0),
        float(eps),
        splits,
        C,
        SPLITS=power_of_two(splits),
        BLOCK_C=block,
    )
    return mean, rstd

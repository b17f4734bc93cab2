"""Triton kernels over feature maps: sums and standard deviations of planes, and the gradients that come back.

A tensor is read as tiles (positions, planes); `CHANNELS_LAST` tells which of the two axes is contiguous: planes are
(planes, positions), or channels of samples (planes // channels, positions, channels).
"""

import triton
import triton.language as tl

from ..common.addressing import indices, offset, program_id
from ..common.moments import combine
from ..common.rounding import rounded


@triton.jit
def _planes(block, planes, positions, channels, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """(planes of block number `block`, whether each exists, the int64 offset of its first element), (BLOCK_C,)."""
    if CHANNELS_LAST:
        blocks = tl.cdiv(channels, BLOCK_C)
        sample, c = block // blocks, indices(block % blocks, BLOCK_C)
        return offset(sample, channels) + c, c < channels, offset(offset(sample, positions), channels) + c
    plane = indices(block, BLOCK_C)
    return plane, plane < planes, offset(plane, positions)


@triton.jit
def _load(x, at, p, positions, exists):
    return tl.load(x + at, mask=(p < positions)[:, None] & exists[None, :], other=0.0).to(tl.float32)


@triton.jit
def _elements(first, p, channels, CHANNELS_LAST: tl.constexpr):
    return (offset(p, channels) if CHANNELS_LAST else p)[:, None] + first[None, :]


@triton.jit
def _tile(x, first, tile, positions, channels, exists, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr):
    """(values, whether each position exists) of tile number `tile`; zeros where it lies past the last position."""
    p = indices(tile, BLOCK_P)
    return _load(x, _elements(first, p, channels, CHANNELS_LAST), p, positions, exists), p < positions


@triton.jit(do_not_specialize=["planes", "slices"])
def sums_kernel(
    x,
    out,
    planes,
    positions,
    channels,
    slices,
    factor,
    SQUARES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    LOADS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out (slices, planes) = factor * sum of x, or of its squares, over every slices-th tile of the positions.
    LOADS (1 or 4) tiles are loaded before the first is added."""
    pid = program_id(0)
    part = pid % slices
    plane, exists, first = _planes(pid // slices, planes, positions, channels, CHANNELS_LAST, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tile in range(part, tl.cdiv(positions, BLOCK_P), LOADS * slices):
        a, _ = _tile(x, first, tile, positions, channels, exists, CHANNELS_LAST, BLOCK_P)
        if LOADS > 1:
            b, _ = _tile(x, first, tile + slices, positions, channels, exists, CHANNELS_LAST, BLOCK_P)
            c, _ = _tile(x, first, tile + 2 * slices, positions, channels, exists, CHANNELS_LAST, BLOCK_P)
            d, _ = _tile(x, first, tile + 3 * slices, positions, channels, exists, CHANNELS_LAST, BLOCK_P)
        total += a * a if SQUARES else a
        if LOADS > 1:
            total += b * b if SQUARES else b
            total += c * c if SQUARES else c
            total += d * d if SQUARES else d
    tl.store(out + offset(part, planes) + plane, tl.sum(total, 0) * tl.cast(factor, tl.float32), mask=exists)


@triton.jit
def _welford(count, mean, squares, value, inside):
    """The three with a tile of values, as far as it lies inside."""
    count += tl.where(inside, 1.0, 0.0)
    delta = tl.where(inside[:, None], value - mean, 0.0)
    mean += delta * (1.0 / tl.maximum(count, 1.0))[:, None]
    return count, mean, squares + delta * (value - mean)


@triton.jit(do_not_specialize=["planes"])
def deviation_kernel(
    x,
    mean,
    deviation,
    planes,
    positions,
    channels,
    CHANNELS_LAST: tl.constexpr,
    LOADS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and unbiased standard deviation of each plane, by Welford's update in each tile slot. All is counted from
    the plane's first element: a mean far from zero costs no digit, and what is constant has deviation 0. LOADS (1 or
    4) tiles are loaded before the first is counted."""
    plane, exists, first = _planes(program_id(0), planes, positions, channels, CHANNELS_LAST, BLOCK_C)
    shift = tl.load(x + first, mask=exists, other=0.0).to(tl.float32)
    count = tl.zeros((BLOCK_P,), tl.float32)
    mu = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tile in range(0, tl.cdiv(positions, BLOCK_P), LOADS):
        a, in_a = _tile(x, first, tile, positions, channels, exists, CHANNELS_LAST, BLOCK_P)
        if LOADS > 1:
            b, in_b = _tile(x, first, tile + 1, positions, channels, exists, CHANNELS_LAST, BLOCK_P)
            c, in_c = _tile(x, first, tile + 2, positions, channels, exists, CHANNELS_LAST, BLOCK_P)
            d, in_d = _tile(x, first, tile + 3, positions, channels, exists, CHANNELS_LAST, BLOCK_P)
        count, mu, squares = _welford(count, mu, squares, a - shift[None, :], in_a)
        if LOADS > 1:
            count, mu, squares = _welford(count, mu, squares, b - shift[None, :], in_b)
            count, mu, squares = _welford(count, mu, squares, c - shift[None, :], in_c)
            count, mu, squares = _welford(count, mu, squares, d - shift[None, :], in_d)
    _, total_mean, total = combine(count[:, None], mu, squares)
    tl.store(mean + plane, shift + total_mean, mask=exists)
    tl.store(deviation + plane, tl.sqrt_rn(total / (positions - 1.0)), mask=exists)


@triton.jit(do_not_specialize=["planes", "slices"])
def scale_kernel(
    x,
    mean,
    factor,
    scale,
    out,
    planes,
    positions,
    channels,
    slices,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = (x - mean) * factor * scale: mean (None: 0) and factor of the plane, scale one value; laid out as x."""
    pid = program_id(0)
    plane, exists, first = _planes(pid // slices, planes, positions, channels, CHANNELS_LAST, BLOCK_C)
    slope = (tl.load(factor + plane, mask=exists, other=0.0) * tl.load(scale).to(tl.float32))[None, :]
    for tile in range(pid % slices, tl.cdiv(positions, BLOCK_P), slices):
        p = indices(tile, BLOCK_P)
        at = _elements(first, p, channels, CHANNELS_LAST)
        value = _load(x, at, p, positions, exists)
        if mean is not None:
            value -= tl.load(mean + plane, mask=exists, other=0.0)[None, :]
        tl.store(
            out + at, rounded(value * slope, out.dtype.element_ty), mask=(p < positions)[:, None] & exists[None, :]
        )

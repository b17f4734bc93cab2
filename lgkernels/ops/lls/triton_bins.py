"""Bins of the adaptive average pool in Triton: what the passes over feature maps share, and the gradient of the pool.

A tensor (B, C, H, W) is read as tiles (positions, planes); plane b * C + c is one channel of one sample, and
`CHANNELS_LAST` tells which of the two axes is contiguous. One program serves one bin and a block of planes, so what
belongs to a bin (its sums, its gradient) is stored or loaded once. Bins may overlap (H % P != 0) or repeat positions
(P > H). A position is *owned* by the last bin that holds it, the one bin i with start(i) <= position < start(i + 1):
every output element is written by its owner, once.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..common.addressing import indices, offset, program_id
from ..common.launch import block_count, configuration, launch
from .tiles import TILES

_LONGEST_RUN = 8  # elements of the widest load, 16 bytes in half precision


def dense(z):
    """`(z, channels_last)`: z itself where it is dense in NCHW or channels_last order (or 2-D rows), else a copy."""
    if z.dim() == 4 and z.shape[1] > 1 and z.is_contiguous(memory_format=torch.channels_last):
        return z, True
    return z.contiguous(), z.dim() == 2


@lru_cache(maxsize=1024)
def widest(size, pool):
    """Positions of the largest bin."""
    return max(-(-(i + 1) * size // pool) - i * size // pool for i in range(pool)) if size % pool else size // pool


def cover(size, pool):
    """Largest number of bins that share a position."""
    return widest(pool, size)


def bin_layout(shape, pool_size, channels_last, window=1):
    """`(RUN, largest number of positions of a bin)`. RUN > 1 where bins tile the map exactly, and windows the bins, and
    the columns of each bin come in aligned runs of RUN contiguous elements."""
    height, width = shape[2:]
    run, unit = 1, pool_size * window
    if not channels_last and height % unit == 0 and width % unit == 0:
        bin_width = width // pool_size
        run = min(bin_width & -bin_width, _LONGEST_RUN)
    return run, block_count(widest(height, pool_size), window) * block_count(widest(width, pool_size), window)


def bin_programs(shape, pool_size, config):
    """Programs of a pass over maps: one for each bin and block of planes."""
    planes = shape[0] * shape[1]
    if planes >= 2**31:
        raise ValueError(f"batch * channels must be below 2^31, got {planes}: split the batch")
    return pool_size**2 * block_count(planes, config["BLOCK_C"])


@triton.jit
def bin_range(i, size, pool):
    """Bin i holds positions [floor(i * size / pool), ceil((i + 1) * size / pool)), and owns those before start(i + 1).

    Returns (start, end, end of the owned positions).
    """
    return i * size // pool, ((i + 1) * size + pool - 1) // pool, (i + 1) * size // pool


@triton.jit
def owned_positions(i, j, H, W, P, RUN: tl.constexpr):
    """(first row, first column, columns, number of positions) that bin (i, j) owns."""
    top, _, next_top = bin_range(i, H, P)
    left, _, next_left = bin_range(j, W, P)
    columns = next_left - left
    return top, left, columns, tl.multiple_of((next_top - top) * columns, RUN)


@triton.jit
def elements(plane, row, column, C, H, W, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr):
    """int64 offsets (positions, planes) of [plane // C, plane % C, row, column]; in NCHW order columns come in
    aligned runs of RUN."""
    position = row * W + column
    if CHANNELS_LAST:
        return offset(position, C)[:, None] + (offset(plane // C, H * W * C) + plane % C)[None, :]
    position = tl.max_contiguous(tl.multiple_of(position, RUN), RUN)
    return offset(plane, tl.multiple_of(H * W, RUN))[None, :] + position[:, None]


@triton.jit
def bin_of_program(P, BLOCK_C: tl.constexpr):
    """(bin row, bin column, planes) of this program, int32; bins vary fastest, so that neighbours share cache lines."""
    pid = program_id(0)
    bin = pid % (P * P)
    return bin // P, bin % P, indices(pid // (P * P), BLOCK_C).to(tl.int32)


@triton.jit
def bin_gradient(grad_latents, plane, exists, y, x, H, W, P):
    """grad / area of bin (y, x), (1, planes)."""
    top, bottom, _ = bin_range(y, H, P)
    left, right, _ = bin_range(x, W, P)
    grad = tl.load(grad_latents + offset(plane, P * P) + (y * P + x), mask=exists, other=0.0)
    return (grad / ((bottom - top) * (right - left) * 1.0))[None, :]


@triton.jit
def unpooled(grad_latents, plane, exists, i, j, row, column, H, W, P, COVER: tl.constexpr):
    """Sum of grad / area over the bins that hold (row, column), positions owned by bin (i, j), (positions, planes).

    They are among the COVER bins up to the owner in each direction.
    """
    total = tl.zeros((row.shape[0], plane.shape[0]), tl.float32)
    for dy in range(COVER):
        for dx in range(COVER):
            holds = ((row < ((i - dy + 1) * H + P - 1) // P) & (column < ((j - dx + 1) * W + P - 1) // P))[:, None]
            y, x = tl.maximum(i - dy, 0), tl.maximum(j - dx, 0)  # holds is False at bins that do not exist
            total += tl.where(holds, bin_gradient(grad_latents, plane, exists, y, x, H, W, P), 0.0)
    return total


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
    i, j, plane = bin_of_program(P, BLOCK_C)
    top, left, columns, count = owned_positions(i, j, H, W, P, RUN)
    exists = plane < B * C
    if PER_ROW:
        factor = tl.load(scale + plane // C, mask=exists, other=0.0).to(tl.float32)[None, :]
    else:
        factor = tl.load(scale).to(tl.float32)
    if COVER == 1:
        grad = bin_gradient(grad_latents, plane, exists, i, j, H, W, P)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row, column = top + p // columns, left + p % columns
        if COVER > 1:
            grad = unpooled(grad_latents, plane, exists, i, j, row, column, H, W, P, COVER)
        result = tl.broadcast_to(grad * factor, (BLOCK_P, BLOCK_C))
        tl.store(
            out + elements(plane, row, column, C, H, W, CHANNELS_LAST, RUN),
            result.to(out.dtype.element_ty),
            mask=(p < count)[:, None] & exists[None, :],
        )


def expand_maps(grad_latents, scale, out, pool_size):
    """Into maps `out`, which it returns."""
    maps, channels_last = dense(out)
    B, C, H, W = out.shape
    run, positions = bin_layout(out.shape, pool_size, channels_last)
    config = configuration(TILES["expand_grad"], (positions, B * C, channels_last, False), out)
    launch(
        expand_grad_kernel,
        bin_programs(out.shape, pool_size, config),
        out.device,
        grad_latents,
        scale,
        maps,
        B,
        C,
        H,
        W,
        pool_size,
        PER_ROW=scale.dim() > 0,
        COVER=max(cover(H, pool_size), cover(W, pool_size)),
        CHANNELS_LAST=channels_last,
        RUN=run,
        **config,
    )
    return out if maps is out else out.copy_(maps)


@triton.jit
def normalization(mean, rstd, gamma, beta, c, inside):
    """The four vectors at channels c, each (1, planes)."""
    return (
        tl.load(mean + c, mask=inside, other=0.0)[None, :],
        tl.load(rstd + c, mask=inside, other=0.0)[None, :],
        tl.load(gamma + c, mask=inside, other=0.0)[None, :],
        tl.load(beta + c, mask=inside, other=0.0)[None, :],
    )


@triton.jit
def larger(a, b):
    """The larger of two values; NaN where either is."""
    return tl.where((a > b) | (a != a), a, b)

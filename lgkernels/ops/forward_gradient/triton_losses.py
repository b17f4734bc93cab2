"""Triton kernels of the replicated losses: pooling, softmax, and the streams of their tangents and cotangents.

A tile is (patches, groups, channels) of one sample. With a layer norm all channels of a group are in the tile. STEP is
a divisor of the contiguous size: the compiler sees by it how wide loads may be. 1e-5 is reference.py's EPS.
"""

import triton
import triton.language as tl

from ..common.addressing import indices, offset, program_id
from ..common.rounding import product, rounded
from ..common.rows import cross_entropy_in_tiles


@triton.jit
def _place(P, G, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr):
    """(sample, patches, groups) of this program."""
    pid = program_id(0)
    across, down = tl.cdiv(G, BLOCK_G), tl.cdiv(P, BLOCK_P)
    rest = pid // across
    return rest // down, indices(rest % down, BLOCK_P), indices(pid % across, BLOCK_G)


@triton.jit
def _rows(n, p, g, P, G):
    """(rows (patches, groups, 1) of sample n, whether each exists)."""
    row = offset(offset(n, P) + p, G)[:, None] + g[None, :]
    return row[:, :, None], ((p < P)[:, None] & (g < G)[None, :])[:, :, None]


@triton.jit
def _channels(start, C, BLOCK_C: tl.constexpr):
    c = start + tl.arange(0, BLOCK_C)
    return c[None, None, :], (c < C)[None, None, :]


@triton.jit
def _load(x, at, mask):
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _mean(value, C):
    return (tl.sum(value, 2) / C)[:, :, None]


@triton.jit
def _standardized(x, at, mask, C):
    """`(centred, r)` of a tile of x: zh = centred r; centred is 0 outside."""
    value = _load(x, at, mask)
    centred = tl.where(mask, value - _mean(value, C), 0.0)
    return centred, 1.0 / tl.sqrt_rn(_mean(product(centred, centred), C) + 1e-5)


@triton.jit(do_not_specialize=["slices"])
def pooled_kernel(
    x,
    out,
    P,
    G,
    C,
    slices,
    factor,
    NORM: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out (slices, N, G, C) = factor * sum of x (N, P, G, C), or of LN_C(x), over every slices-th tile of the patches.
    Without a norm the channels are groups of one channel."""
    if NORM:
        C = C // STEP * STEP
    else:
        G = G // STEP * STEP
    pid = program_id(0)
    across = tl.cdiv(G, BLOCK_G)
    g, rest = indices(pid % across, BLOCK_G), pid // across
    part, n = rest % slices, rest // slices
    samples = tl.num_programs(0) // (across * slices)
    c, inside = _channels(0, C, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_G, BLOCK_C), tl.float32)
    for tile in range(part, tl.cdiv(P, BLOCK_P), slices):
        row, exists = _rows(n, indices(tile, BLOCK_P), g, P, G)
        mask, at = exists & inside, offset(row, C) + c
        if NORM:
            centred, r = _standardized(x, at, mask, C)
            total += centred * r
        else:
            total += _load(x, at, mask)
    at = offset(offset(offset(part, samples) + n, G) + g, C)[None, :, None] + c
    mean = tl.sum(total, 0)[None, :, :] * tl.cast(factor, tl.float32)
    tl.store(out + at, mean, mask=(g < G)[None, :, None] & inside)


@triton.jit(do_not_specialize=["B"])
def softmax_kernel(logits, target, losses, B, F, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr):
    """Losses of all rows; logits <- softmax(logits) - one-hot."""
    b = indices(program_id(0), BLOCK_B)
    label = tl.load(target + b, mask=b < B, other=0)[:, None]
    loss = cross_entropy_in_tiles(logits, label, b, B, F, 0.0, 1.0, True, BLOCK_B, BLOCK_F)
    tl.store(losses + b, loss, mask=b < B)


@triton.jit
def tangent_kernel(
    x,
    x_tangent,
    teach,
    head,
    out,
    P,
    G,
    C,
    STEP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out (N, P, G) = <x_tangent, teach>_C / P + head, of tangents that pass LN_C where there is x:

    <LN'(x; v), t> = r (<w, t> - mean(zh w) <zh, t>), w = v - mean v
    """
    C = C // STEP * STEP
    n, p, g = _place(P, G, BLOCK_P, BLOCK_G)
    row, exists = _rows(n, p, g, P, G)
    lesson = (offset(offset(n, G) + g, C))[None, :, None]
    if x is not None:
        c, inside = _channels(0, C, BLOCK_C)
        mask, at = exists & inside, offset(row, C) + c
        centred, r = _standardized(x, at, mask, C)
        v = _load(x_tangent, at, mask)
        t = _load(teach, lesson + c, (g < G)[None, :, None] & inside)
        w = tl.where(mask, v - _mean(v, C), 0.0)
        along = _mean(product(centred, w), C) * r * r
        result = (tl.sum(product(w, t), 2)[:, :, None] - along * tl.sum(product(centred, t), 2)[:, :, None]) * r
    else:
        total = tl.zeros((BLOCK_P, BLOCK_G, BLOCK_C), tl.float32)
        for start in range(0, C, BLOCK_C):
            c, inside = _channels(start, C, BLOCK_C)
            v = _load(x_tangent, offset(row, C) + c, exists & inside)
            total += v * _load(teach, lesson + c, (g < G)[None, :, None] & inside)
        result = tl.sum(total, 2)[:, :, None]
    result = result / P
    if head is not None:
        result += tl.load(head + n)
    tl.store(out + row, result, mask=exists)


@triton.jit
def cotangent_kernel(
    x,
    grad,
    teach,
    out,
    P,
    G,
    C,
    STEP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out (N, P, G, C) = grad (N, P, G) teach / P, through LN_C where there is x."""
    C = C // STEP * STEP
    n, p, g = _place(P, G, BLOCK_P, BLOCK_G)
    row, exists = _rows(n, p, g, P, G)
    lesson = (offset(offset(n, G) + g, C))[None, :, None]
    share = tl.load(grad + row, mask=exists, other=0.0) / P
    for start in range(0, C, BLOCK_C):
        c, inside = _channels(start, C, BLOCK_C)
        mask, at = exists & inside, offset(row, C) + c
        v = _load(teach, lesson + c, (g < G)[None, :, None] & inside)
        if x is not None:
            centred, r = _standardized(x, at, mask, C)
            v = v - _mean(v, C)
            v = (v - centred * (_mean(product(centred, v), C) * r * r)) * r
        tl.store(out + at, rounded(v * share, out.dtype.element_ty), mask=mask)

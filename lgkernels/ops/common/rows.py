"""Cross entropy of rows of logits inside Triton kernels, in the two ways to hold a row.

`cross_entropy` has whole rows in registers. `cross_entropy_in_tiles` takes rows of any length, walks over them tile by
tile and keeps sums only. They are two functions because their sums are: the first adds up q (log sum - v); the second
does not know the log sum while it passes v, and takes the sums of v from it afterwards. Each rounds in its own way.
"""

import triton
import triton.language as tl

from .addressing import offset, within


@triton.jit
def smoothed(label, c, C, smoothing):
    """(1 - smoothing) * one-hot + smoothing / C at classes c, of labels (rows, 1)."""
    even = tl.cast(smoothing, tl.float32) / C
    return even + tl.where(c[None, :] == label, 1.0 - tl.cast(smoothing, tl.float32), 0.0)


@triton.jit
def cross_entropy(v, label, c, C, smoothing):
    """Losses (rows,) and gradients softmax(v) - smoothed one-hot (rows, classes) of logits v."""
    inside = (c < C)[None, :]
    v = tl.where(inside, v, float("-inf"))
    v = v - tl.max(v, 1)[:, None]
    e = tl.exp(v)
    total = tl.sum(e, 1)
    q = smoothed(label[:, None], c, C, smoothing)
    loss = tl.sum(tl.where(inside, q * (tl.log(total)[:, None] - v), 0.0), 1)
    return loss, e / total[:, None] - q


@triton.jit
def row_tile(b, start, B, F, BLOCK_F: tl.constexpr):
    """(columns, offsets and mask of the tile) of rows b and columns start to start + BLOCK_F."""
    c = start + tl.arange(0, BLOCK_F)
    return c, offset(b, F)[:, None] + c[None, :], within(b, B, c, F)


@triton.jit
def cross_entropy_in_tiles(
    logits, label, b, B, F, smoothing, grad_scale, GRAD: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr
):
    """Losses (rows,) = logsumexp(v) - (1 - smoothing) v_label - smoothing * mean(v) of rows b of the logits, labels
    (rows, 1); with GRAD v <- grad_scale * (softmax(v) - smoothed one-hot)."""
    largest = tl.full((BLOCK_B, BLOCK_F), float("-inf"), tl.float32)
    for start in range(0, F, BLOCK_F):
        c, at, mask = row_tile(b, start, B, F, BLOCK_F)
        largest = tl.maximum(largest, tl.load(logits + at, mask=mask, other=float("-inf")))
    most = tl.where(b < B, tl.max(largest, 1), 0.0)[:, None]
    total = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    evenly = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    picked = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    for start in range(0, F, BLOCK_F):
        c, at, mask = row_tile(b, start, B, F, BLOCK_F)
        v = tl.load(logits + at, mask=mask, other=float("-inf")) - most
        total += tl.exp(v)
        evenly += tl.where(mask, v, 0.0)
        picked += tl.where(mask & (c[None, :] == label), v, 0.0)
    log_sum = tl.log(tl.where(b < B, tl.sum(total, 1), 1.0))
    even = tl.cast(smoothing, tl.float32) / F
    sharp = 1.0 - tl.cast(smoothing, tl.float32)
    loss = log_sum - sharp * tl.sum(picked, 1) - even * tl.sum(evenly, 1)
    if GRAD:
        for start in range(0, F, BLOCK_F):
            c, at, mask = row_tile(b, start, B, F, BLOCK_F)
            v = tl.load(logits + at, mask=mask, other=float("-inf")) - most
            p = tl.exp(v - log_sum[:, None])
            gradient = (p - smoothed(label, c, F, smoothing)) * tl.cast(grad_scale, tl.float32)
            tl.store(logits + at, gradient, mask=mask)
    return loss

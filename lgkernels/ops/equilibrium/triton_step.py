"""A settling step of a dense net: one launch for all of its layers.

A program has a tile of rows and of one layer's units. It walks over the activities of all layers that lead there (and
over the nudge of the last step, which is one of them), by a table; adds the input's drive; and stores the states and
their activities. The program of the last layer has all of it in its tile, and makes the next nudge of that at once.

Rows of a state and what belongs to them (their imaginary parts, or tangents) lie `items` rows apart:
(1 or 2, items, N). The units of the layers lie side by side, the even layers first, each padded to whole blocks; the
nudge comes last.
"""

import triton
import triton.language as tl

from ..common.addressing import indices, offset, program_id
from ..common.dot import dot
from ..common.rounding import product
from .triton_activations import COMPLEX, REAL, activities, activity, turned


@triton.jit
def _softmax(z, second, KIND: tl.constexpr):
    """softmax(z), or its (Re, Im); columns beyond the classes are -inf."""
    e = tl.exp(z - tl.max(z, 1)[:, None])
    if KIND == COMPLEX:
        cosine, sine = turned(second)
        a, b = product(e, cosine), product(e, sine)
        x, y = tl.sum(a, 1)[:, None], tl.sum(b, 1)[:, None]
        scale = 1.0 / (x * x + y * y)
        return (a * x + b * y) * scale, (b * x - a * y) * scale
    else:
        return e / tl.sum(e, 1)[:, None], second


@triton.jit
def _nudge(
    active,
    second,
    readout,
    bias,
    goal,
    beta,
    sample,
    phase,
    KIND: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """beta dL/dr by the readout's logits, (of rows, of what belongs to them), from whole rows of the last layer."""
    c = tl.arange(0, BLOCK_C)
    z, other = active, second
    if readout is not None:
        w = tl.load(readout + offset(tl.arange(0, BLOCK_N), BLOCK_C)[:, None] + c[None, :])
        z = dot(active, w, tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION)
        other = z
        if KIND == COMPLEX:
            other = dot(second, w, tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION)
    if SOFTMAX:
        z, other = _softmax(z + tl.load(bias + c)[None, :], other, KIND)
    force = z - tl.load(goal + offset(sample, BLOCK_C)[:, None] + c[None, :])
    if KIND == COMPLEX:
        re, im = tl.load(beta + offset(phase, 2))[:, None], tl.load(beta + offset(phase, 2) + 1)[:, None]
        return force * re - other * im, force * im + other * re
    elif KIND == REAL:
        force = force * tl.load(beta + offset(phase, 2))[:, None]
        return force, force
    else:  # the derivative by beta, at beta = 0
        return tl.zeros_like(force), force


@triton.jit(do_not_specialize=["first", "even", "odd", "items", "samples", "period", "start"])
def step_kernel(
    table,
    weights,
    drive,
    r,
    u,
    readout,
    bias,
    goal,
    beta,
    first,
    even,
    odd,
    items,
    samples,
    period,
    start,
    N,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NUDGE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """u <- r W + drive, r <- phi(u), from one of the two halves of r (2, 1 or 2, items, N) to the other: `even`, `odd`
    say which one has the activities of such layers now. `start`: u is `drive` (1 or 2, items, N) itself, period is
    items; otherwise drive is (samples, N), and period samples."""
    PARTS: tl.constexpr = 1 if KIND == REAL else 2
    pid = program_id(0)
    row_blocks = tl.cdiv(items, BLOCK_M)
    item = indices(pid % row_blocks, BLOCK_M).to(tl.int32)
    exists = (item < items)[:, None]
    row, part = offset(item, N)[:, None], offset(items, N)
    at = table + offset(first + pid // row_blocks, 8)
    source, runs = table + tl.load(at), tl.where(start != 0, 0, tl.load(at + 1))
    width = tl.load(at + 3) * BLOCK_N
    parity = tl.load(at + 6)
    column = tl.load(at + 4) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    weight = weights + indices(tl.load(at + 5), BLOCK_N)[None, :] + offset(depth, width)[:, None]
    weight += offset(tl.load(at + 2), BLOCK_K * BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(runs):
        half = tl.where(tl.load(source + 2) == 0, even, odd)
        left = r + offset(half, part * PARTS) + row + (tl.load(source) * BLOCK_K + depth)[None, :]
        for _ in range(tl.load(source + 1)):
            w = tl.load(weight)
            total = dot(tl.load(left, mask=exists, other=0.0), w, total, PRECISION)
            if PARTS == 2:
                second = dot(tl.load(left + part, mask=exists, other=0.0), w, second, PRECISION)
            left += BLOCK_K
            weight += offset(width, BLOCK_K)
        source += 3
    outer = drive + offset(item % period, N)[:, None] + column[None, :]
    total += tl.load(outer, mask=exists, other=0.0)
    here = row + column[None, :]
    tl.store(u + here, total, mask=exists & (start == 0))
    out = r + offset(1 - tl.where(parity == 0, even, odd), part * PARTS) + row
    if PARTS == 2:
        second += tl.load(outer + offset(period, N), mask=exists & (start != 0), other=0.0)
        tl.store(u + part + here, second, mask=exists & (start == 0))
        active, other = activities(total, second, KIND, ACTIVATION)
        tl.store(out + part + column[None, :], other, mask=exists)
    else:
        active = activity(total, ACTIVATION)
        other = active
    tl.store(out + column[None, :], active, mask=exists)
    if NUDGE:
        if tl.load(at + 7) != 0:
            sample, phase = item % samples, tl.minimum(item, items - 1) // samples
            force, along = _nudge(
                active,
                other,
                readout,
                bias,
                goal,
                beta,
                sample,
                phase,
                KIND,
                SOFTMAX,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_C,
            )
            next_nudge = out + N - BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
            tl.store(next_nudge, force, mask=exists)
            if PARTS == 2:
                tl.store(next_nudge + part, along, mask=exists)

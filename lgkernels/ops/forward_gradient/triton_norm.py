"""The Triton kernel of layers with a tangent: layer norm, its derivative, noise, residual and ReLU in one pass.

z is (outer, C, inner) and the norm runs over C. A tile is (rows, channels): a row is a place of the outer and inner
sizes. Where inner is 1 (LAST) a row is contiguous; else rows that follow each other lie side by side. A tile that
holds whole rows (WHOLE) reads everything once. Longer rows are walked over three times, for the sums depend on
each other; what is read again lies in the cache, and noise by formula is made again.
"""

import triton
import triton.language as tl

from ..common import philox
from ..common.addressing import indices, offset, program_id
from ..common.rounding import product, rounded


@triton.jit
def _load(x, at, mask):
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _noise(
    values,
    state,
    at,
    mask,
    sample,
    place,
    start,
    inner,
    scale,
    span,
    low,
    LAW: tl.constexpr,
    HAS_LOW: tl.constexpr,
    LAST: tl.constexpr,
    CALL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Noise of a tile. By formula: of samples (rows,), whose row's channel 0 is at `place` (rows,) of the sample.
    CALL: values of one Philox call where the contiguous side of the tile starts at a multiple of them, else 0."""
    if values is not None:
        noise = _load(values, at, mask)
    else:
        seed, stream, step = philox.load_state(state)
        c = start + tl.arange(0, BLOCK_C)
        if CALL == 0:
            col = place[:, None] + offset(c, inner)[None, :]
            noise = philox.element(seed, stream, step, sample[:, None], col, scale, span, low, LAW, HAS_LOW)
        elif LAST:
            calls: tl.constexpr = BLOCK_C // CALL
            block = ((place + start) // CALL)[:, None] + tl.arange(0, calls)[None, :]
            row = sample[:, None]
            noise = philox.tile(seed, stream, step, row, block, scale, span, low, LAW, HAS_LOW, BLOCK_R, calls)
        else:
            row_calls: tl.constexpr = BLOCK_R // CALL
            block = ((offset(c, inner) + tl.min(place, 0)) // CALL)[:, None] + tl.arange(0, row_calls)[None, :]
            row = tl.min(sample, 0) + tl.zeros((BLOCK_C, 1), tl.int64)
            made = philox.tile(seed, stream, step, row, block, scale, span, low, LAW, HAS_LOW, BLOCK_C, row_calls)
            noise = tl.trans(made)
        # rounded by itself: added to something else it is what a tensor of noise holds
        noise = product(noise, tl.full((BLOCK_R, BLOCK_C), 1.0, tl.float32))
    return noise


@triton.jit
def _derivative(v, mean_v, centred, along, r):
    """LN'(z; v) = r (v - mean v - zh mean(zh v)); along = r^2 mean(centred v)."""
    return (v - mean_v - centred * along) * r


@triton.jit
def _cotangent(
    noise,
    activity,
    coefficient,
    at,
    mask,
    exists,
    above,
    start,
    C,
    inner,
    runs,
    RELU: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """coefficient noise 1[activity > 0]; rows of the coefficient (of `runs` entries) start at `above`."""
    if SINGLE:
        v = noise * tl.load(coefficient + above, mask=exists, other=0.0)[:, None]
    else:
        run = (start + tl.arange(0, BLOCK_C)) // (C // runs)
        v = noise * _load(coefficient, above[:, None] + offset(run, inner)[None, :], mask)
    return v * tl.where(_load(activity, at, mask) > 0.0, 1.0, 0.0) if RELU else v


@triton.jit
def _store_both(out, out_tangent, residual, zh, v, at, mask, RELU: tl.constexpr):
    """out = act(zh + residual), out_tangent = act' v where it is wanted. A NaN passes the ReLU."""
    y = zh
    if residual is not None:
        y += _load(residual, at, mask)
    if out_tangent is not None:
        slope = tl.where(y > 0.0, 1.0, 0.0) if RELU else 1.0
        tl.store(out_tangent + at, rounded(v * slope, out_tangent.dtype.element_ty), mask=mask)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)
    tl.store(out + at, rounded(y, out.dtype.element_ty), mask=mask)


@triton.jit
def _tile(base, exists, start, C, inner, BLOCK_C: tl.constexpr):
    """(offsets, mask) of a tile's channels from `start` on."""
    c = start + tl.arange(0, BLOCK_C)
    return base[:, None] + offset(c, inner)[None, :], exists[:, None] & (c < C)[None, :]


@triton.jit(do_not_specialize=["rows", "per_sample"])
def norm_kernel(
    z,
    moved,
    other,
    values,
    state,
    coefficient,
    out,
    out_tangent,
    rows,
    C,
    inner,
    per_sample,
    runs,
    eps,
    scale,
    span,
    low,
    LAW: tl.constexpr,
    HAS_LOW: tl.constexpr,
    NOISY: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    CALL: tl.constexpr,
    SINGLE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Without coefficient: out = act(LN(z) + other), out_tangent (None: not wanted) = act' (LN'(z; moved) + noise);
    `other` is the residual. With it: out = LN'(z; coefficient noise 1[other > 0]); `other` is the activation.

    rows: places of the outer sizes; per_sample: how many of them a sample has. moved, other, values and state may be
    None. SINGLE: the coefficient has one run. STEP: a divisor of the contiguous size, for wide loads.
    """
    pid = program_id(0)
    if LAST:
        C = C // STEP * STEP
        row = indices(pid, BLOCK_R)
        exists, sample = row < rows, row // per_sample
        base, above, place = offset(row, C), offset(row, runs), offset(row % per_sample, C)
    else:
        inner = inner // STEP * STEP
        across = tl.cdiv(inner, BLOCK_R)
        o, i = pid // across, indices(pid % across, BLOCK_R)
        exists, sample = i < inner, i * 0 + o // per_sample
        base, above = offset(offset(o, C), inner) + i, offset(offset(o, runs), inner) + i
        place = offset(offset(o % per_sample, C), inner) + i

    if WHOLE:
        at, mask = _tile(base, exists, 0, C, inner, BLOCK_C)
        value = _load(z, at, mask)
        centred = tl.where(mask, value - (tl.sum(value, 1) / C)[:, None], 0.0)
        r = (1.0 / tl.sqrt_rn(tl.sum(product(centred, centred), 1) / C + eps))[:, None]
        v = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        if NOISY:
            noise = _noise(
                values,
                state,
                at,
                mask,
                sample,
                place,
                0,
                inner,
                scale,
                span,
                low,
                LAW,
                HAS_LOW,
                LAST,
                CALL,
                BLOCK_R,
                BLOCK_C,
            )
        if coefficient is not None:
            v = _cotangent(noise, other, coefficient, at, mask, exists, above, 0, C, inner, runs, RELU, SINGLE, BLOCK_C)
        elif moved is not None:
            v = _load(moved, at, mask)
        if coefficient is not None or moved is not None:
            # masked places hold whatever the formula gives there
            v = tl.where(mask, v, 0.0)
            along = (tl.sum(product(centred, v), 1) / C)[:, None] * r * r
            v = _derivative(v, (tl.sum(v, 1) / C)[:, None], centred, along, r)
        if coefficient is not None:
            tl.store(out + at, rounded(v, out.dtype.element_ty), mask=mask)
        else:
            _store_both(out, out_tangent, other, centred * r, v + noise if NOISY else v, at, mask, RELU)
    else:
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for start in range(0, C, BLOCK_C):
            at, mask = _tile(base, exists, start, C, inner, BLOCK_C)
            total += _load(z, at, mask)
        mean = (tl.sum(total, 1) / C)[:, None]
        squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for start in range(0, C, BLOCK_C):
            at, mask = _tile(base, exists, start, C, inner, BLOCK_C)
            centred = tl.where(mask, _load(z, at, mask) - mean, 0.0)
            squares += centred * centred
            if coefficient is not None:
                noise = _noise(
                    values,
                    state,
                    at,
                    mask,
                    sample,
                    place,
                    start,
                    inner,
                    scale,
                    span,
                    low,
                    LAW,
                    HAS_LOW,
                    LAST,
                    CALL,
                    BLOCK_R,
                    BLOCK_C,
                )
                v = _cotangent(
                    noise, other, coefficient, at, mask, exists, above, start, C, inner, runs, RELU, SINGLE, BLOCK_C
                )
            elif moved is not None:
                v = _load(moved, at, mask)
            if coefficient is not None or moved is not None:
                sums += tl.where(mask, v, 0.0)
                products += centred * v
        r = (1.0 / tl.sqrt_rn(tl.sum(squares, 1) / C + eps))[:, None]
        mean_v, along = (tl.sum(sums, 1) / C)[:, None], (tl.sum(products, 1) / C)[:, None] * r * r
        for start in range(0, C, BLOCK_C):
            at, mask = _tile(base, exists, start, C, inner, BLOCK_C)
            centred = _load(z, at, mask) - mean
            v = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
            if NOISY:
                noise = _noise(
                    values,
                    state,
                    at,
                    mask,
                    sample,
                    place,
                    start,
                    inner,
                    scale,
                    span,
                    low,
                    LAW,
                    HAS_LOW,
                    LAST,
                    CALL,
                    BLOCK_R,
                    BLOCK_C,
                )
            if coefficient is not None:
                v = _cotangent(
                    noise, other, coefficient, at, mask, exists, above, start, C, inner, runs, RELU, SINGLE, BLOCK_C
                )
            elif moved is not None:
                v = _load(moved, at, mask)
            if coefficient is not None or moved is not None:
                v = _derivative(v, mean_v, centred, along, r)
            if coefficient is not None:
                tl.store(out + at, rounded(v, out.dtype.element_ty), mask=mask)
            else:
                _store_both(out, out_tangent, other, centred * r, v + noise if NOISY else v, at, mask, RELU)

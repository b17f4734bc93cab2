"""Triton kernels around the convolutions of a net that settles: the softmax pool with its vector-Jacobian product, and
what ends a layer's step; the sum of an error over its phases; and of a dense net the exact homeostatic loss.

Rows are those of `Phases`: real ones, or pairs (Re, Im) `samples` rows apart.
"""

import triton
import triton.language as tl

from ..common.addressing import indices, load_tile, offset, program_id, store_tile
from ..common.rounding import product
from .triton_activations import COMPLEX, activity, complex_activity, turned


@triton.jit
def _row(image, samples, KIND: tl.constexpr):
    """Row of the real part."""
    return image // samples * (2 * samples) + image % samples if KIND == COMPLEX else image


@triton.jit
def _windows(z, at, W, mask):
    """The four entries of windows."""
    a, b = tl.load(z + at, mask=mask, other=0.0), tl.load(z + at + 1, mask=mask, other=0.0)
    c, d = tl.load(z + at + W, mask=mask, other=0.0), tl.load(z + at + W + 1, mask=mask, other=0.0)
    return a, b, c, d


@triton.jit
def _store(out, at, W, mask, a, b, c, d):
    tl.store(out + at, a, mask=mask)
    tl.store(out + at + 1, b, mask=mask)
    tl.store(out + at + W, c, mask=mask)
    tl.store(out + at + W + 1, d, mask=mask)


@triton.jit
def _exponentials(a, b, c, d):
    most = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    return tl.exp(a - most), tl.exp(b - most), tl.exp(c - most), tl.exp(d - most)


@triton.jit
def _softmax(a, b, c, d):
    """(o, p) of real windows: o = sum p z."""
    e, f, g, h = _exponentials(a, b, c, d)
    scale = 1.0 / ((e + f) + (g + h))
    p, q, r, s = e * scale, f * scale, g * scale, h * scale
    return (p * a + q * b) + (r * c + s * d), p, q, r, s


@triton.jit
def _times(a, ai, b, bi):
    return a * b - ai * bi, a * bi + ai * b


@triton.jit
def _complex_softmax(a, b, c, d, ai, bi, ci, di):
    """(Re o, Im o, and p as Re, Im of each entry) of complex windows."""
    e, f, g, h = _exponentials(a, b, c, d)
    ac, sa = turned(ai)
    bc, sb = turned(bi)
    cc, sc = turned(ci)
    dc, sd = turned(di)
    x, y = (e * ac + f * bc) + (g * cc + h * dc), (e * sa + f * sb) + (g * sc + h * sd)
    scale = 1.0 / (x * x + y * y)
    x, y = x * scale, -y * scale
    p, pi = _times(e * ac, e * sa, x, y)
    q, qi = _times(f * bc, f * sb, x, y)
    r, ri = _times(g * cc, g * sc, x, y)
    s, si = _times(h * dc, h * sd, x, y)
    o = (p * a - pi * ai + q * b - qi * bi) + (r * c - ri * ci + s * d - si * di)
    oi = (p * ai + pi * a + q * bi + qi * b) + (r * ci + ri * c + s * di + si * d)
    return o, oi, p, pi, q, qi, r, ri, s, si


@triton.jit
def _spread(p, pi, z, zi, o, oi, high, high_i):
    """p (1 + z - o) high."""
    q, qi = _times(p, pi, 1.0 + z - o, zi - oi)
    return _times(q, qi, high, high_i)


@triton.jit(do_not_specialize=["images", "samples", "C", "H", "W"])
def pool_kernel(z, bias, high, out, back, images, samples, C, H, W, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Of the maps z (rows, C or 2 C, H, W): out (rows, C, H/2, W/2) the pool of the first C, with a bias, where there
    is `out`; back (rows, C, H, W) the pool's derivative at the others, times high (rows, C, H/2, W/2), where there is
    `back`. A program: windows of rows, or of pairs of rows."""
    BOTH: tl.constexpr = out is not None and back is not None
    i = indices(program_id(0), BLOCK).to(tl.int32)
    h, w = H // 2, W // 2
    y, x, channel = i // w % h, i % w, i // (w * h) % C
    image = i // (w * h * C)
    mask = image < images
    row = _row(image, samples, KIND)
    channels = 2 * C if BOTH else C
    inner = 2 * y * W + 2 * x
    at = offset(offset(row, channels) + channel, H * W) + inner
    pooled = offset(offset(row, C) + channel, h * w) + y * w + x
    # between the two rows of a pair
    apart, apart_pooled = offset(samples, channels) * (H * W), offset(samples, C) * (h * w)
    if out is not None:
        a, b, c, d = _windows(z, at, W, mask)
        if bias is not None:
            shift = tl.load(bias + channel, mask=mask, other=0.0)
            a, b, c, d = a + shift, b + shift, c + shift, d + shift
        if KIND == COMPLEX:
            ai, bi, ci, di = _windows(z, at + apart, W, mask)
            o, oi, _, _, _, _, _, _, _, _ = _complex_softmax(a, b, c, d, ai, bi, ci, di)
            tl.store(out + pooled + apart_pooled, oi, mask=mask)
        else:
            o, _, _, _, _ = _softmax(a, b, c, d)
        tl.store(out + pooled, o, mask=mask)
    if back is not None:
        if BOTH:
            at += offset(C, H * W)
        a, b, c, d = _windows(z, at, W, mask)
        back_at = offset(offset(row, C) + channel, H * W) + inner
        up = tl.load(high + pooled, mask=mask, other=0.0)
        if KIND == COMPLEX:
            ai, bi, ci, di = _windows(z, at + apart, W, mask)
            upi = tl.load(high + pooled + apart_pooled, mask=mask, other=0.0)
            o, oi, p, pi, q, qi, r, ri, s, si = _complex_softmax(a, b, c, d, ai, bi, ci, di)
            a, ai = _spread(p, pi, a, ai, o, oi, up, upi)
            b, bi = _spread(q, qi, b, bi, o, oi, up, upi)
            c, ci = _spread(r, ri, c, ci, o, oi, up, upi)
            d, di = _spread(s, si, d, di, o, oi, up, upi)
            _store(back, back_at + offset(samples, C) * (H * W), W, mask, ai, bi, ci, di)
        else:
            o, p, q, r, s = _softmax(a, b, c, d)
            a, b = p * (1.0 + a - o) * up, q * (1.0 + b - o) * up
            c, d = r * (1.0 + c - o) * up, s * (1.0 + d - o) * up
        _store(back, back_at, W, mask, a, b, c, d)


@triton.jit(do_not_specialize=["images", "samples"])
def layer_kernel(
    first, second, drive, u, r, images, samples, N, KIND: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """u (rows, N) = first + second + drive (samples, N; of real parts), those that there are; r = phi(u). No u: it is
    `first`, and only r is wanted."""
    i = indices(program_id(0), BLOCK).to(tl.int32)
    image, n = i // N, i % N
    mask = image < images
    at = offset(_row(image, samples, KIND), N) + n
    total = tl.load(first + at, mask=mask, other=0.0)
    if second is not None:
        total += tl.load(second + at, mask=mask, other=0.0)
    if drive is not None:
        total += tl.load(drive + offset(image % samples, N) + n, mask=mask, other=0.0)
    if u is not None:
        tl.store(u + at, total, mask=mask)
    if KIND == COMPLEX:
        apart = offset(samples, N)
        imaginary = tl.load(first + at + apart, mask=mask, other=0.0)
        if second is not None:
            imaginary += tl.load(second + at + apart, mask=mask, other=0.0)
        if u is not None:
            tl.store(u + at + apart, imaginary, mask=mask)
        total, imaginary = complex_activity(total, imaginary, ACTIVATION)
        tl.store(r + at + apart, imaginary, mask=mask)
        tl.store(r + at, total, mask=mask)
    else:
        tl.store(r + at, activity(total, ACTIVATION), mask=mask)


@triton.jit
def skew_kernel(up, down, grad_up, grad_down, sums, R, C, scale, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """s = up (R, C) - down^T, or up where there is no down (C, R): the gradients scale * s and -scale * s^T, and the
    sum of squares of each tile."""
    pid = program_id(0)
    across = tl.cdiv(C, BLOCK_C)
    row, column = indices(pid // across, BLOCK_R), indices(pid % across, BLOCK_C)
    s = load_tile(up, row, column, R, C)
    if down is not None:
        s -= tl.trans(load_tile(down, column, row, C, R))
    factor = tl.cast(scale, tl.float32)
    store_tile(grad_up, s * factor, row, column, R, C)
    if down is not None:
        store_tile(grad_down, tl.trans(s) * -factor, column, row, C, R)
    tl.store(sums + pid, tl.sum(tl.sum(product(s, s), 1), 0))


@triton.jit(do_not_specialize=["many", "apart", "along", "samples", "width", "units", "add"])
def error_kernel(
    r,
    start,
    share,
    out,
    many,
    apart,
    along,
    samples,
    width,
    units,
    add,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (samples, units) = the sum over the phases of what r - phi(start) counts, `share` (many, 2) of Re and Im;
    added to what is there if `add`. r: rows `width` apart, those of the next phase `apart`, the imaginary parts
    `along`."""
    place = indices(program_id(0), BLOCK)
    exists = place < offset(samples, units)
    before = activity(tl.load(start + place, mask=exists, other=0.0), ACTIVATION)
    total = tl.load(out + place, mask=exists & (add != 0), other=0.0)
    at = r + offset(place // units, width) + place % units
    for _ in range(many):
        total += (tl.load(at, mask=exists, other=0.0) - before) * tl.load(share)
        if KIND == COMPLEX:
            total += tl.load(at + along, mask=exists, other=0.0) * tl.load(share + 1)
        at += apart
        share += 2
    tl.store(out + place, total, mask=exists)

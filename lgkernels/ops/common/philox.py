"""Triton pieces for random matrices: the words and laws of `lgkernels.random`, for use inside kernels.

State is the device tensor (seed, stream, step); scalars are loaded by `load_state`. `tile` and `panel` make v values
per Philox call for tiles that start at a multiple of v; `element` takes any (row, col) at one call per element.
Rows, columns and blocks may be int32 or int64 and broadcast against each other.
"""

import numpy as np
import triton
import triton.language as tl

from lgkernels.random import VALUES_PER_CALL

from .addressing import indices
from .rounding import fma

LAWS = {"uniform": 0, "normal": 1, "uniform8": 2, "sign": 3}
_UNIFORM, _NORMAL, _UNIFORM8, _SIGN = (tl.constexpr(LAWS[law]) for law in ("uniform", "normal", "uniform8", "sign"))


def law_arguments(law, scale=1.0, low=None):
    """`(LAW, HAS_LOW, scale, span, low)` as the functions below take them; the last three float32 values."""
    span = 0.0 if low is None else float(np.float32(scale - low))
    return LAWS[law], low is not None, float(np.float32(scale)), span, float(np.float32(low or 0.0))


def values_per_call(law):
    """v: columns that share one Philox call."""
    return VALUES_PER_CALL[law]


@triton.jit
def load_state(state):
    """(seed, stream, step) from their int64 tensor: seed int64, the others uint32."""
    return tl.load(state), tl.load(state + 1).to(tl.uint32), tl.load(state + 2).to(tl.uint32)


@triton.jit
def words(seed, stream, step, row, block):
    """Four uint32 tensors: the Philox words of columns [block * v, (block + 1) * v) of `row`."""
    zero = row.to(tl.uint32) * 0 + block.to(tl.uint32) * 0
    return tl.philox(seed, zero + block.to(tl.uint32), zero + row.to(tl.uint32), zero + step, zero + stream)


@triton.jit
def unit(word):
    """u = ((word >> 9) + 0.5) * 2**-23, exact in float32."""
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def affine(unit_value, scale, span, low, HAS_LOW: tl.constexpr):
    if HAS_LOW:
        return fma(unit_value, span, low)
    else:
        return (2.0 * unit_value - 1.0) * scale


@triton.jit
def uniform8(byte, scale, span, low, HAS_LOW: tl.constexpr):
    """(byte + 0.5) / 256 runs over the same range as u: 2 (byte + 0.5) / 256 - 1 = (2 byte - 255) / 256."""
    return affine((byte.to(tl.int32).to(tl.float32) + 0.5) * 0.00390625, scale, span, low, HAS_LOW)


@triton.jit
def sign(bit, scale):
    return tl.where((bit & 1) != 0, -scale, scale)


@triton.jit
def cosine_sine(angle):
    """(cos, sin) of angles in [0, 2 pi), within one ulp: both from one reduction to [-pi/4, pi/4], with its rounding
    error carried along. The built-in functions reduce any angle, in a buffer on the stack."""
    quadrant = (angle * 0.6366197466850281 + 0.5).to(tl.int32)
    q = quadrant.to(tl.float32)
    above = angle - q * 1.5703125 - q * 0.0004837512969970703  # exact: pi/2 in three parts, the first two short
    r = above - q * 7.54978995489188e-08
    error = (above - r) - q * 7.54978995489188e-08
    s = r * r
    odd = ((-1.9515295891e-4 * s + 8.3321608736e-3) * s - 1.6666654611e-1) * s * r
    even = ((2.443315711809948e-5 * s - 1.388731625493765e-3) * s + 4.166664568298827e-2) * s * s
    half = 0.5 * s
    most = 1.0 - half
    sine = r + (odd + error)
    cosine = most + (((1.0 - most) - half) + even - r * error)
    swap = (quadrant & 1) != 0
    x, y = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    return tl.where(((quadrant + 1) & 2) != 0, -x, x), tl.where((quadrant & 2) != 0, -y, y)


@triton.jit
def normal(word0, word1, scale):
    """Box-Muller: the pair of values of two words."""
    radius = tl.sqrt_rn(-2.0 * tl.log(unit(word0)))
    cosine, sine = cosine_sine(unit(word1) * 6.283185307179586)
    return (radius * cosine) * scale, (radius * sine) * scale


@triton.jit
def element(seed, stream, step, row, col, scale, span, low, LAW: tl.constexpr, HAS_LOW: tl.constexpr):
    """float32 values at broadcast (row, col), one Philox call each."""
    v: tl.constexpr = 16 if LAW == _UNIFORM8 else 128 if LAW == _SIGN else 4
    w0, w1, w2, w3 = words(seed, stream, step, row, col // v)
    index = (col % v).to(tl.int32) + row.to(tl.int32) * 0
    which = index // (v // 4)
    word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    if LAW == _UNIFORM:
        return affine(unit(word), scale, span, low, HAS_LOW)
    elif LAW == _UNIFORM8:
        return uniform8((word >> ((index % 4) * 8).to(tl.uint32)) & 255, scale, span, low, HAS_LOW)
    elif LAW == _SIGN:
        return sign(word >> (index % 32).to(tl.uint32), scale)
    else:
        cosine, sine = normal(tl.where(which < 2, w0, w2), tl.where(which < 2, w1, w3), scale)
        return tl.where(index % 2 == 0, cosine, sine)


@triton.jit
def tile(
    seed,
    stream,
    step,
    row,
    block,
    scale,
    span,
    low,
    LAW: tl.constexpr,
    HAS_LOW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """(ROWS, BLOCKS * v) float32 values for `row` (ROWS, 1) and `block` = col // v (1, BLOCKS)."""
    w0, w1, w2, w3 = words(seed, stream, step, row, block)
    if LAW == _NORMAL:
        n0, n1 = normal(w0, w1, scale)
        n2, n3 = normal(w2, w3, scale)
        return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (ROWS, BLOCKS * 4))
    else:
        word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, BLOCKS * 4))
        if LAW == _UNIFORM:
            return affine(unit(word), scale, span, low, HAS_LOW)
        elif LAW == _UNIFORM8:
            shift = (tl.arange(0, 4) * 8).to(tl.uint32)
            byte = (word[:, :, None] >> shift[None, None, :]) & 255
            return tl.reshape(uniform8(byte, scale, span, low, HAS_LOW), (ROWS, BLOCKS * 16))
        else:
            shift = tl.arange(0, 32).to(tl.uint32)
            return tl.reshape(sign(word[:, :, None] >> shift[None, None, :], scale), (ROWS, BLOCKS * 128))


@triton.jit
def panel(
    seed,
    stream,
    step,
    row,
    block,
    scale,
    span,
    low,
    LAW: tl.constexpr,
    HAS_LOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """(ROWS, COLS) float32 values for `row` (ROWS, 1) and columns [block * COLS, (block + 1) * COLS), v | COLS."""
    CALLS: tl.constexpr = COLS // (16 if LAW == _UNIFORM8 else 128 if LAW == _SIGN else 4)
    return tile(seed, stream, step, row, indices(block, CALLS)[None, :], scale, span, low, LAW, HAS_LOW, ROWS, CALLS)

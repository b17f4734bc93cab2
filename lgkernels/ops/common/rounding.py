"""Rounding of float32 values inside Triton kernels, the same under the interpreter as on a GPU."""

import triton
import triton.language as tl

from ...core.dispatch import interpreting

INTERPRETING = tl.constexpr(interpreting())


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """float32 `value` in DTYPE, rounded to nearest even. (The interpreter's own bfloat16 cast drops bits.)"""
    if INTERPRETING and DTYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, nearest, value)
    return value.to(DTYPE)


@triton.jit
def product(a, b):
    """a * b of float32 values, rounded by itself, for sums over lanes.

    The compiler fuses a plain product into the addition that follows. Where that addition takes the product of another
    lane, each of the two rounds another one of the two products, and they disagree in the last bit."""
    if INTERPRETING:
        return a * b
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def fma(a, b, c):
    """a * b + c of float32 values, rounded once. (The interpreter's own rounds the product too.)"""
    if INTERPRETING:
        product = a.to(tl.float64) * b  # exact
        addend = tl.zeros_like(product) + c
        total = product + addend
        added = total - product
        error = (product - (total - added)) + (addend - added)
        # the float64 neighbour with an odd last bit: rounded again, it gives what the exact sum gives
        odd = (total.to(tl.int64, bitcast=True) & 1) != 0
        step = tl.where((error > 0) == (total > 0), 1, -1)
        neighbour = (total.to(tl.int64, bitcast=True) + step).to(tl.float64, bitcast=True)
        return tl.where(odd | (error == 0), total, neighbour).to(tl.float32)
    else:
        return tl.fma(a, tl.zeros_like(a) + b, tl.zeros_like(a) + c)

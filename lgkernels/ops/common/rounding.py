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

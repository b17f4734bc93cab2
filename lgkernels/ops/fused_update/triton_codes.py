"""States of 8 bits in Triton kernels: codes to values and back by arithmetic (csrc/fused_update/codes.h says how)."""

import triton
import triton.language as tl


@triton.jit
def decoded(code, SIGNED: tl.constexpr):
    """Values in [-1, 1] of uint8 codes: the largest of the lines of the seven decades."""
    c = code.to(tl.int32)
    if SIGNED:
        c = c - 127
    j = tl.abs(c) if SIGNED else c + 1
    middle = j.to(tl.float32) + 0.5
    parts: tl.constexpr = 1.0 if SIGNED else 2.0
    value = tl.zeros_like(middle)
    for i in tl.static_range(7):
        from_start = (middle - parts * 2.0**i) + parts * 2.0**i / 9.0
        value = tl.maximum(value, from_start * (0.9 * 10.0 ** (i - 6) / (parts * 2.0**i)))
    value = tl.where(j < parts, 0.0, tl.where(j >= parts * 128, 1.0, value))
    return tl.where(c < 0, -value, value) if SIGNED else value


@triton.jit
def _encoded(q, SIGNED: tl.constexpr):
    size = tl.abs(q)
    parts: tl.constexpr = 1.0 if SIGNED else 2.0
    bend: tl.constexpr = 0.275e-6 if SIGNED else 0.1625e-6
    slope: tl.constexpr = 0.8 / ((1e-6 if SIGNED else 0.55e-6) - bend)
    f = size * slope + (parts + 0.2 - slope * bend)
    for i in tl.static_range(1, 7):
        f = tl.minimum(f, size * (parts * 2.0**i * 10.0 ** (6 - i) / 0.9) + parts * 2.0**i * 8.0 / 9.0)
    j = f.to(tl.int32)
    between = ((j & (j - 1)) == 0) & (f - j.to(tl.float32) < 0.2)
    j = tl.where(between & (j > 0), j - 1, j)
    last = f >= parts * 128.0 - 0.25
    if SIGNED:
        j = tl.minimum(j, 127)
        return 127 + tl.where(q < 0, -j, tl.where(last, 128, j))
    return tl.where(q > 0, tl.maximum(tl.where(last, 255, tl.minimum(j - 1, 254)), 1), 0)


@triton.jit
def encoded(x, inside, SIGNED: tl.constexpr):
    """(codes, absmax) of the rows of x (rows, 256), each a block; what is not `inside` does not count."""
    size = tl.where(inside, tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf")), 0.0)  # NaN too
    absmax = tl.max(size, 1)
    usable = (absmax > 0) & (absmax < float("inf"))
    q = tl.where(usable[:, None], tl.div_rn(x, tl.where(usable, absmax, 1.0)[:, None]), 0.0)
    return _encoded(q, SIGNED).to(tl.uint8), tl.where(absmax < float("inf"), absmax, float("nan"))

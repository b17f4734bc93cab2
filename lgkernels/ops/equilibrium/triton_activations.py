"""Activations of the units inside Triton kernels: of real states, of complex pairs, and their slopes. Formulas:
activations.py."""

import triton
import triton.language as tl

from ..common.philox import cosine_sine

# What a row of a state stands for: one that is real, a complex pair, a value with its tangent.
REAL, COMPLEX, TANGENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _clipped(x):
    """x between 0 and 1; nan stays."""
    return tl.where(x < 0.0, 0.0, tl.where(x > 1.0, 1.0, x))


@triton.jit
def activity(u, ACTIVATION: tl.constexpr):
    """phi(u)."""
    if ACTIVATION == "sigmoid":
        return _logistic(4.0 * u - 2.0)
    elif ACTIVATION == "dsilu":
        return 0.5 * u * _logistic(u) + (1.0 - 0.5 * u) * _logistic(u - 2.0)
    elif ACTIVATION == "hard_sigmoid":
        return _clipped(0.5 * u)
    else:
        return _clipped(u)


@triton.jit
def slope(u, ACTIVATION: tl.constexpr):
    """phi'(u)."""
    if ACTIVATION == "sigmoid":
        s = _logistic(4.0 * u - 2.0)
        return 4.0 * s * (1.0 - s)
    elif ACTIVATION == "dsilu":
        s, s2 = _logistic(u), _logistic(u - 2.0)
        return 0.5 * (s - s2) + 0.5 * u * s * (1.0 - s) + (1.0 - 0.5 * u) * s2 * (1.0 - s2)
    elif ACTIVATION == "hard_sigmoid":
        return tl.where((u > 0.0) & (u < 2.0), 0.5, 0.0)
    else:
        return tl.where((u > 0.0) & (u < 1.0), 1.0, 0.0)


@triton.jit
def turned(x):
    """(cos x, sin x) of any angle; beyond some thousands, where a float is no exact angle, of what 2 pi leaves over."""
    angle = tl.abs(x)
    turns = angle * 0.15915494309189535
    angle = tl.where(angle < 8192.0, angle, (turns - tl.floor(turns)) * 6.283185307179586)
    cosine, sine = cosine_sine(angle)
    return cosine, tl.where(x < 0.0, -sine, sine)


@triton.jit
def _complex_logistic(a, cosine, sine):
    """1 / (1 + exp(-(a + i b))), cosine and sine of b; by the exponential that does not overflow."""
    e = tl.exp(-tl.abs(a))
    re, im = e * cosine, e * sine
    scale = 1.0 / ((1.0 + re) * (1.0 + re) + im * im)
    return tl.where(a >= 0.0, 1.0 + re, re + e * e) * scale, im * scale


@triton.jit
def complex_activity(re, im, ACTIVATION: tl.constexpr):
    """phi(re + i im)."""
    if ACTIVATION == "sigmoid":
        cosine, sine = turned(4.0 * im)
        return _complex_logistic(4.0 * re - 2.0, cosine, sine)
    else:
        cosine, sine = turned(im)
        a, b = _complex_logistic(re, cosine, sine)
        a2, b2 = _complex_logistic(re - 2.0, cosine, sine)
        re, im = 0.5 * re, 0.5 * im
        return re * a - im * b + (1.0 - re) * a2 + im * b2, re * b + im * a + (1.0 - re) * b2 - im * a2


@triton.jit
def activities(u, second, KIND: tl.constexpr, ACTIVATION: tl.constexpr):
    """(r, its imaginary part or its tangent) of a state and what belongs to it; KIND is no REAL."""
    if KIND == COMPLEX:
        return complex_activity(u, second, ACTIVATION)
    else:
        return activity(u, ACTIVATION), slope(u, ACTIVATION) * second

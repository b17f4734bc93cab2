"""Moments inside Triton kernels."""

import triton
import triton.language as tl

from .rounding import product


@triton.jit
def combine(count, mean, squares):
    """Moments of the union along axis 0 (Chan): mean weighted by count, squares plus count * (mean - total mean)^2."""
    total = tl.sum(count, 0)
    total_mean = tl.sum(product(count, mean), 0) / total
    away = mean - total_mean[None, :]
    return total, total_mean, tl.sum(squares + count * away * away, 0)

"""Zeroth-order optimisation in plain torch: the definition that every other backend is tested against.

    y[m] = x[m] (W + c_m Z_m)^T + b                       a layer at a perturbed weight
    y[m] = conv2d(x[m], W + c_m Z_m) + b                  a convolution, Z a matrix (outputs, the other sizes)
    y[m, r] = W[i] + c_m Z_m[i],  i = x[m, r]             rows, as an embedding picks them
    W <- keep * W + sum_i c_i Z_i                         the step along the noise

Z is a tensor or the matrix of a law, coefficients c are numbers in a tensor. Any device; float32 arithmetic, float64
where the weight is float64.

The step is defined to the bit, so that a log of its numbers rebuilds the weights on any device: the float32 product
c_i z, rounded; the sum of these products in the order of i, each rounded; keep * w, rounded; their sum, rounded; and
that to the weight's dtype. No two of them are fused. (Z is the same everywhere but for the law "normal".)
"""

import torch
import torch.nn.functional as F

from ...core.ops import wide_dtype


def perturbed_linear(x, weight, bias, coefficients, noise):
    """x (M, R, K), weight (N, K) -> (M, R, N) in x's dtype."""
    dtype = wide_dtype(x.dtype)
    own, (rows, columns) = weight.to(dtype), weight.shape
    out = x.new_empty((*x.shape[:2], rows))
    for m, c in enumerate(coefficients.to(dtype)):
        perturbed = own + c * noise.rows(m, 0, rows, columns, dtype)
        y = x[m].to(dtype) @ perturbed.t()
        out[m] = y if bias is None else y + bias.to(dtype)
    return out


def perturbed_conv2d(x, weight, bias, coefficients, noise, geometry):
    """x (M, B, C, H, W), weight (O, C / groups, kh, kw) -> (M, B, O, ...) in x's dtype."""
    dtype = wide_dtype(x.dtype)
    matrix, outputs = weight.to(dtype).reshape(len(weight), -1), []
    for m, c in enumerate(coefficients.to(dtype)):
        perturbed = matrix + c * noise.rows(m, 0, *matrix.shape, dtype)
        outputs.append(F.conv2d(x[m].to(dtype), perturbed.view(weight.shape), None, *geometry))
    y = torch.stack(outputs)
    return (y if bias is None else y + bias.to(dtype).view(-1, 1, 1)).to(x.dtype)


def perturbed_rows(weight, x, coefficients, noise, dtype):
    """weight (N, K), x (M, R) row numbers (None: all rows) -> (M, R, K) in `dtype`."""
    wide = wide_dtype(dtype)
    own, rows = weight.to(wide), []
    for m, c in enumerate(coefficients.to(wide)):
        perturbed = own + c * noise.rows(m, 0, *weight.shape, wide)
        rows.append(perturbed if x is None else perturbed[x[m]])
    return torch.stack(rows).to(dtype)


def formula_update_(weight, coefficients, noise, keep):
    """weight (N, K) in place; one coefficient for each matrix of the noise."""
    dtype = wide_dtype(weight.dtype)
    products = [noise.rows(i, 0, *weight.shape, dtype) * c for i, c in enumerate(coefficients.to(dtype))]
    total = products[0]
    for product in products[1:]:
        total = total + product
    weight.copy_(weight.to(dtype) * keep + total)

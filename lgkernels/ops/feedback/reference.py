"""Feedback without weight transport in plain torch: the definition that every other backend is tested against.

Every rule sends the error down by a matrix F (N, K) that is a formula, never a parameter:

    value(i, j) = 1 | magnitude[i, j] | law(seed, stream, step; row i, column j)
    F = scale * value                       without weight     FA, DFA (signed)
    F = scale * |value| * sign(weight)      with weight        uSF (value 1), frSF and brSF

N are a weight's outputs, K its inputs: (O, C / groups * kh * kw) of a convolution, (classes, neurons) of DFA.
sign(0) = 0, or with `sign_plus` +1 (also of -0.0); sign(nan) follows: 0 | +1. `random` is None or the tuple
(state, law, law_scale, low) of `lgkernels.random`: its int64 state tensor and the law's arguments.

Any device; float32 arithmetic, float64 where `dtype` or `grad` is float64.
"""

import math

import torch
import torch.nn.functional as F

from ...random import random_matrix, random_rows


def wide(dtype):
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fold(columns, shape, kernel, positions, stride, padding, dilation):
    """Columns (B * positions, C * kh * kw) summed into `shape` (B, C, H, W): the adjoint of a convolution's windows."""
    columns = columns.view(shape[0], math.prod(positions), -1).transpose(1, 2)
    return F.fold(columns, shape[2:], kernel, dilation, padding, stride)


def pack_signs(weight):
    """(N, K) -> int32 (N, ceil(K / 32)): bit j % 32 of word j // 32 is set where weight[i, j] < 0 (so not for -0.0)."""
    rows, cols = weight.shape
    words = (cols + 31) // 32
    bits = torch.zeros(rows, words * 32, dtype=torch.int64, device=weight.device)
    bits[:, :cols] = weight < 0
    packed = (bits.view(rows, words, 32) << torch.arange(32, device=weight.device)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_signs(packed, cols):
    """The +-1 (float32) matrix of `pack_signs`' words."""
    bits = (packed.unsqueeze(-1) >> torch.arange(32, device=packed.device)) & 1
    return 1.0 - 2.0 * bits.flatten(1)[:, :cols].float()


def sign(weight, sign_plus, cols):
    """sign(weight) in float32; int32 `weight` holds packed signs of a matrix with `cols` columns."""
    if weight.dtype == torch.int32:
        return unpack_signs(weight, cols)
    if sign_plus:
        return torch.where(weight < 0, -1.0, 1.0)
    return (weight > 0).float() - (weight < 0).float()


def matrix(shape, weight, magnitude, random, scale, sign_plus, dtype, device):
    """F (N, K) in `dtype`, rounded once. `weight` and `magnitude` are (N, K), or `weight` int32 packed signs."""
    value = torch.ones(shape, dtype=wide(dtype), device=device)
    if magnitude is not None:
        value = magnitude.to(value.dtype)
    elif random is not None:
        state, law, law_scale, low = random
        value = random_matrix(state, *shape, law, law_scale, low).to(value.dtype)
    if weight is not None:
        value = value.abs() * sign(weight, sign_plus, shape[1])
    return (value * scale).to(dtype)


def product(grad, columns, weight, magnitude, random, scale, sign_plus):
    """grad (M, N) @ F -> (M, K = columns) in grad's dtype."""
    shape = (grad.shape[1], columns)
    return grad @ matrix(shape, weight, magnitude, random, scale, sign_plus, grad.dtype, grad.device)


def rows(index, columns, random, scale, dtype):
    """(B, K) of row index[b] (int64) of scale * law: DRTP's projection of class indices."""
    state, law, law_scale, low = random
    value = random_rows(state, index, columns, law, law_scale, low)
    return (value.to(wide(dtype)) * scale).to(dtype)


def sgd_update_(
    weight, momentum_buffer, grad, x, lr, momentum, dampening, weight_decay, nesterov, manhattan, grad_scale=1.0
):
    """torch.optim.SGD's step, or Batch Manhattan's (`manhattan`), with the gradient grad_scale * grad^T x, in place.

        g = grad_scale * grad^T x;  manhattan: g = sign(g);  g += weight_decay * W
        v = momentum * v + (1 - dampening) * g;  W -= lr * (nesterov: g + momentum * v | v)

    weight (N, K), momentum_buffer (N, K) or None (then no v: W -= lr * g), grad (M, N), x (M, K). torch's first step
    with momentum sets v = g: pass a zero buffer and dampening 0.
    """
    dtype = wide(weight.dtype)
    g = (grad.to(dtype).t() @ x.to(dtype)) * grad_scale
    if manhattan:
        g = g.sign()
    g = g + weight_decay * weight.to(dtype)
    if momentum_buffer is not None:
        v = momentum * momentum_buffer.to(dtype) + (1 - dampening) * g
        momentum_buffer.copy_(v)
        g = g + momentum * v if nesterov else v
    weight.copy_(weight.to(dtype) - lr * g)


def _normalised(z, mean, rstd, gamma, beta, slope):
    """z - mean, the slope of the activation, the activation; (B, C, H, W)."""
    mean, gain, beta = (t.to(z.dtype).view(-1, 1, 1) for t in (mean, gamma * rstd, beta))
    centred = z - mean
    u = centred * gain + beta
    factor = torch.where(u > 0, 1.0, slope).to(z.dtype)
    return centred, factor, F.leaky_relu(u, slope) if slope else F.relu(u)


def direct_forward(z, gamma, beta, running_mean, running_var, momentum, eps, slope, max_pool):
    """Batch norm in training, leaky ReLU, and a 2x2 max-pool or none, of z (B, C, H, W): `(out, mean, rstd)` of the
    batch. The running statistics (or None both) are updated as torch.nn.BatchNorm2d does."""
    wider = z.to(wide(z.dtype))
    mean, var, count = wider.mean((0, 2, 3)), wider.var((0, 2, 3), correction=0), z.numel() // z.shape[1]
    rstd = (var + eps).rsqrt()
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)
    out = _normalised(wider, mean, rstd, gamma, beta, slope)[2].to(z.dtype)
    return F.max_pool2d(out, 2) if max_pool else out, mean, rstd


def direct_backward_(z, mean, rstd, gamma, beta, delta, error, random, slope, max_pool):
    """z becomes its gradient; returns `(grad_gamma, grad_beta)`.

    delta = error (B, classes) @ law (classes, C * H' * W')     where no delta (B, C, H', W') is given
    g = max-pool's backward of delta, times the activation's slope
    grad_beta = sum g;  grad_gamma = sum g * xhat;  dz = gamma * rstd * (g - mean g - xhat * mean (g * xhat))
    """
    centred, factor, activation = _normalised(z.to(wide(z.dtype)), mean, rstd, gamma, beta, slope)
    pooled, index = F.max_pool2d(activation, 2, return_indices=True) if max_pool else (activation, None)
    if delta is None:
        delta = product(error, pooled[0].numel(), None, None, random, 1.0, False)
    g = delta.to(centred.dtype).view(pooled.shape)
    if max_pool:
        g = torch.zeros_like(centred).flatten(2).scatter_(2, index.flatten(2), g.flatten(2)).view(z.shape)
    g = g * factor
    xhat, gain = centred * rstd.view(-1, 1, 1), (gamma * rstd).view(-1, 1, 1)
    grad_beta, grad_gamma = g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))
    count = z.numel() // z.shape[1]
    z.copy_(gain * (g - (grad_beta.view(-1, 1, 1) + xhat * grad_gamma.view(-1, 1, 1)) / count))
    return grad_gamma, grad_beta

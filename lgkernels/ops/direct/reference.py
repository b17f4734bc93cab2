"""The block of direct feedback in plain torch: the definition that every other backend is tested against.

Any device; float32 arithmetic, float64 where z is float64.
"""

import torch
import torch.nn.functional as F

from ...core.ops import wide_dtype
from ...random import random_matrix


def _normalised(z, mean, rstd, gamma, beta, slope):
    """z - mean, the slope of the activation, the activation; (B, C, H, W)."""
    mean, gain, beta = (t.to(z.dtype).view(-1, 1, 1) for t in (mean, gamma * rstd, beta))
    centred = z - mean
    u = centred * gain + beta
    factor = torch.full_like(u, slope).masked_fill_(u > 0, 1.0)
    return centred, factor, F.leaky_relu(u, slope) if slope else F.relu(u)


def direct_forward(z, gamma, beta, running_mean, running_var, norm, activation):
    """Batch norm in training, leaky ReLU, and a 2x2 max-pool or none, of z (B, C, H, W): `(out, mean, rstd)` of the
    batch. The running statistics (or None both) are updated as torch.nn.BatchNorm2d does."""
    wider = z.to(wide_dtype(z.dtype))
    mean, var, count = wider.mean((0, 2, 3)), wider.var((0, 2, 3), correction=0), z.numel() // z.shape[1]
    rstd = (var + norm.eps).rsqrt()
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), norm.momentum)
        running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), norm.momentum)
    out = _normalised(wider, mean, rstd, gamma, beta, activation.negative_slope)[2].to(z.dtype)
    return F.max_pool2d(out, 2) if activation.max_pool else out, mean, rstd


def direct_backward_(z, mean, rstd, gamma, beta, delta, error, state, signal, activation):
    """z becomes its gradient; returns `(grad_gamma, grad_beta)`.

    delta = error (B, classes) @ law (classes, C * H' * W')     where no delta (B, C, H', W') is given
    g = max-pool's backward of delta, times the activation's slope
    grad_beta = sum g;  grad_gamma = sum g * xhat;  dz = gamma * rstd * (g - mean g - xhat * mean (g * xhat))
    """
    slope, max_pool = activation
    centred, factor, activated = _normalised(z.to(wide_dtype(z.dtype)), mean, rstd, gamma, beta, slope)
    pooled, index = F.max_pool2d(activated, 2, return_indices=True) if max_pool else (activated, None)
    if delta is None:
        law = random_matrix(state, error.shape[1], pooled[0].numel(), signal.law, signal.law_scale, signal.low)
        delta = error.to(centred.dtype) @ law.to(centred.dtype)
    g = delta.to(centred.dtype).view(pooled.shape)
    if max_pool:
        g = torch.zeros_like(centred).flatten(2).scatter_(2, index.flatten(2), g.flatten(2)).view(z.shape)
    g = g * factor
    xhat, gain = centred * rstd.view(-1, 1, 1), (gamma * rstd).view(-1, 1, 1)
    grad_beta, grad_gamma = g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))
    count = z.numel() // z.shape[1]
    z.copy_(gain * (g - (grad_beta.view(-1, 1, 1) + xhat * grad_gamma.view(-1, 1, 1)) / count))
    return grad_gamma, grad_beta

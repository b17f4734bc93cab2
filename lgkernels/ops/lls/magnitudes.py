"""The sizes of what the results of reference.py add up, |a| + |b| for a - b, in the places of the results: a backend
for the bound of a trial (core/trial.py).

With one channel, one latent or one class a head's gradient is a difference of equal numbers: what is left of it is
their rounding, whose size is that of the numbers.
"""

import torch
import torch.nn.functional as F

from . import reference
from .reference import CAPABILITIES, batch_stats, expand_grad, latents  # noqa: F401


def head(x, target, modulation, basis, options, compute_grad):
    value, grad_x, _, grad_z = reference.head(x, target, modulation, basis, options, compute_grad)
    norm, phi = x.norm(dim=1, keepdim=True), basis.to(x.dtype).abs()
    inverse = 1 / norm.clamp_min(options.eps) if options.normalize else 1
    s = (x.abs() * inverse) @ phi.t() * options.basis_scale
    if not compute_grad:
        return value, grad_x, s, grad_z
    valid = target != options.ignore_index
    subtracted = F.one_hot(target.masked_fill(~valid, 0), options.num_classes) * valid.unsqueeze(1)
    if options.loss == "cross_entropy":
        smooth = options.label_smoothing
        subtracted = subtracted * (1 - smooth) + smooth / options.num_classes
    else:
        subtracted = subtracted * (2 / options.num_classes)
    count = valid.sum().clamp_min(1) if options.reduction == "mean" else 1
    size_z = grad_z.abs() + 2 * subtracted / (options.temperature * count)
    size_s = size_z
    if modulation is not None:
        m = modulation.to(x.dtype).abs()
        size_s = size_z * m if m.dim() == 1 else size_z @ m.t()
    size_x = size_s @ phi * options.basis_scale
    if options.normalize:
        along = (size_s * s).sum(1, keepdim=True)
        size_x = torch.where(norm >= options.eps, (size_x + x.abs() * inverse * along) * inverse, grad_x.abs())
    return value, size_x, s, size_z


def modulation_grad(similarity, grad_logits, vector, scale):
    return reference.modulation_grad(similarity, grad_logits, vector, scale)


def norm_act_pool(z, mean, rstd, gamma, beta, negative_slope, pool_size, max_pool, compute_grad):
    results = reference.norm_act_pool(z, mean, rstd, gamma, beta, negative_slope, pool_size, max_pool, compute_grad)
    out, pooled, s1, s2 = results
    if s2.numel():
        slope = reference._derivative(reference._affine(z, mean, rstd, gamma, beta), negative_slope)
        rows, columns = (reference.bins(n, pool_size, z.device).to(s2.dtype) for n in z.shape[2:])
        s2 = (rows @ ((slope * reference._normalized(z, mean, rstd).abs()) @ columns.t())).flatten(1)
    return out, pooled, s1, s2


norm_grads = reference.norm_grads  # of sizes


def _grad_affine(z, mean, rstd, gamma, beta, negative_slope, grad_latents, pool_size):
    u = reference._affine(z, mean, rstd, gamma, beta)
    return reference._derivative(u, negative_slope) * reference.unpool(grad_latents, z.shape, pool_size)


def grad_preactivation_(
    z, mean, rstd, gamma, beta, negative_slope, grad_latents, grad_gamma, grad_beta, pool_size, scale
):
    xhat, channel = reference._normalized(z, mean, rstd).abs(), reference._channel
    grad_u = _grad_affine(z, mean, rstd, gamma, beta, negative_slope, grad_latents, pool_size)
    centred = grad_u + (channel(grad_beta, z) + xhat * channel(grad_gamma, z)) / (z.numel() // z.shape[1])
    return z.copy_(channel(gamma.abs() * rstd * scale, z) * centred)


def linear_grad_preactivation_(z, mean, rstd, gamma, beta, negative_slope, grad_latents, pool_size, scale):
    norm = mean, rstd, gamma, beta, negative_slope
    grad_u = _grad_affine(z, *norm, grad_latents, pool_size)
    grad_gamma, grad_beta = (grad_u * reference._normalized(z, mean, rstd).abs()).sum(0), grad_u.sum(0)
    grad_preactivation_(z, *norm, grad_latents, grad_gamma, grad_beta, pool_size, scale)
    return grad_gamma, grad_beta, torch.zeros_like(grad_beta)

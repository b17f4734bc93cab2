"""LLS in plain torch: the definition that every other backend is tested against.

Symbols (LLS-DNN, Apolinario, Roy, Roy, WACV 2025):

    x  latents (B, d)      adaptive average pool of the activation, flattened (channel, row, column)
    Phi basis (K, d)       sin(f_k j) or its sign
    s  = basis_scale * (x / max(|x|, eps)) Phi^T           (B, K)   similarity
    z  = s | s * m | s M                                   (B, C)   LLS | LLS-M | LLS-MxM
    L  = cross_entropy(z / T) or mse(hard_sigmoid(z / T), one_hot)

Any device, float32 and float64 (half inputs are widened on load). Gradients are the closed forms; the
tests compare them with autograd of the written-out loss.
"""

import torch
import torch.nn.functional as F

from ...core.ops import wide
from .options import Capabilities

CAPABILITIES = Capabilities()


def bins(size, pool, device=None):
    """Adaptive-average-pool matrix (pool, size): row i holds 1 on [floor(i*size/pool), ceil((i+1)*size/pool))."""
    i = torch.arange(pool, device=device).unsqueeze(1)
    position = torch.arange(size, device=device).unsqueeze(0)
    start, end = (i * size) // pool, ((i + 1) * size + pool - 1) // pool
    return (position >= start) & (position < end)


def latents(activation, pool_size):
    """(B, C, H, W) -> (B, C*P*P); (B, N) -> (B, P)."""
    a = wide(activation)
    if a.dim() == 2:
        return a if pool_size == a.shape[1] else F.adaptive_avg_pool1d(a.unsqueeze(1), pool_size).squeeze(1)
    return F.adaptive_avg_pool2d(a, pool_size).flatten(1)


def unpool(grad_latents, shape, pool_size, divide=True):
    """Adjoint of `latents`: every position receives the sum over its bins of grad / area (or of grad alone)."""
    height, width = (1, shape[1]) if len(shape) == 2 else shape[2:]
    rows = bins(height, 1 if len(shape) == 2 else pool_size, grad_latents.device).to(grad_latents.dtype)
    columns = bins(width, pool_size, grad_latents.device).to(grad_latents.dtype)
    if divide:
        rows, columns = rows / rows.sum(1, keepdim=True), columns / columns.sum(1, keepdim=True)
    channels = 1 if len(shape) == 2 else shape[1]
    g = grad_latents.reshape(shape[0], channels, rows.shape[0], columns.shape[0])
    return (rows.t() @ (g @ columns)).reshape(shape)


def head(x, target, modulation, basis, options, compute_grad):
    """Latents to loss and gradients.

    Returns `(loss, grad_latents, similarity, grad_logits)`: loss () or, for reduction "none", (B,);
    grad_latents (B, d) = dL/dx; similarity s (B, K); grad_logits dL/dz (B, C), all for a unit incoming
    gradient (one per row when reduction is "none"). Without `compute_grad` the two gradients are empty.
    """
    phi = basis.to(x.dtype)
    norm = x.norm(dim=1, keepdim=True)
    inverse = 1 / norm.clamp_min(options.eps) if options.normalize else torch.ones_like(norm)
    s = (x * inverse) @ phi.t() * options.basis_scale
    if modulation is None:
        z = s
    else:
        z = s * modulation.to(x.dtype) if modulation.dim() == 1 else s @ modulation.to(x.dtype)
    v = z / options.temperature
    valid = target != options.ignore_index
    one_hot = F.one_hot(target.long().masked_fill(~valid, 0), options.num_classes).to(x.dtype)
    if options.loss == "cross_entropy":
        q = one_hot * (1 - options.label_smoothing) + options.label_smoothing / options.num_classes
        rows = -torch.where(q > 0, q * F.log_softmax(v, dim=1), 0).sum(1)  # a class of logit -inf, masked, is no nan
        grad_v = F.softmax(v, dim=1) - q
    else:
        difference = (v / 4 + 0.5).clamp(0, 1) - one_hot
        rows = difference.square().mean(1)
        grad_v = difference * (
            2 / options.num_classes
        )  # straight through: the hard sigmoid passes gradients as they are
    rows = torch.where(valid, rows, 0)
    count = valid.sum().to(z.dtype) if options.reduction == "mean" else 1
    value = rows if options.reduction == "none" else rows.sum() / count
    if not compute_grad:
        return value, x.new_empty(0), s, x.new_empty(0)
    grad_z = torch.where(valid.unsqueeze(1), grad_v / (options.temperature * count), 0)
    if modulation is None:
        grad_s = grad_z
    else:
        m = modulation.to(x.dtype)
        grad_s = grad_z * m if m.dim() == 1 else grad_z @ m.t()
    grad_x = grad_s @ phi * options.basis_scale
    if options.normalize:
        rho = (grad_s * s).sum(1, keepdim=True)  # <x/|x|, grad>: a length-K dot, not a second pass over d
        projected = (grad_x - x * inverse * rho) * inverse
        below = torch.zeros_like(grad_x) if options.zero_gradient_below_eps else grad_x / options.eps
        grad_x = torch.where(norm >= options.eps, projected, below)
    return value, grad_x, s, grad_z


def modulation_grad(similarity, grad_logits, vector, scale):
    """dL/dm (C,) = sum_b g_z * s or dL/dM (K, C) = s^T g_z; `scale` is the incoming gradient, () or (B,)."""
    g = grad_logits * (scale.unsqueeze(1) if scale.dim() else scale)
    return (g * similarity).sum(0) if vector else similarity.t() @ g


def expand_grad(grad_latents, scale, out, pool_size):
    """Gradient of the activation into `out` (shaped like it, dense in either memory format; every element is
    written): unpool(scale * grad_latents); `scale` () or (B,). Returns `out`."""
    g = grad_latents * (scale.unsqueeze(1) if scale.dim() else scale)
    return out.copy_(unpool(g, out.shape, pool_size))


# -- the pieces of the fused block: layer -> BatchNorm (batch statistics) -> LeakyReLU -> head ------------------


def _channel(vector, z):
    return vector.to(wide(z).dtype).reshape(1, -1, *[1] * (z.dim() - 2))


def batch_stats(z, bias, running_mean, running_var, momentum, eps):
    """Per-channel mean and 1/sqrt(var + eps) of z (B, C, ...) in float32 (float64 for float64).

    `z` lacks the layer's bias, which batch normalisation cancels; only the running mean, updated in place
    when given (with `momentum`, a float; running variance unbiased), has to know it.
    """
    dims = [i for i in range(z.dim()) if i != 1]
    var, mean = torch.var_mean(wide(z), dims, correction=0)
    if running_mean is not None:
        count = z.numel() // z.shape[1]
        shifted = mean if bias is None else mean + bias
        running_mean.lerp_(shifted.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)
    return mean, torch.rsqrt(var + eps)


def _normalized(z, mean, rstd):
    return (wide(z) - _channel(mean, z)) * _channel(rstd, z)


def _affine(z, mean, rstd, gamma, beta):
    return _normalized(z, mean, rstd) * _channel(gamma, z) + _channel(beta, z)


def _derivative(u, negative_slope):
    return torch.where(u > 0, torch.ones_like(u), negative_slope)


def norm_act_pool(z, mean, rstd, gamma, beta, negative_slope, pool_size, max_pool, compute_grad):
    """One pass over z: `(out, latents, s1, s2)`.

    a = leaky_relu(gamma * xhat + beta); out = a, or its 2x2 max-pool, in z's dtype; latents (B, d) of a;
    with lambda = 1 or the slope: s1, s2 (B, d) = sums over each bin of lambda and lambda * xhat, from which
    the closed forms of dgamma and dbeta need no further pass over z. Linear blocks (z 2-D) have no s1, s2.
    """
    u = _affine(z, mean, rstd, gamma, beta)
    a = F.leaky_relu(u, negative_slope)
    out = (F.max_pool2d(a, 2) if max_pool else a).to(z.dtype)
    empty = a.new_empty(0)
    if not compute_grad or z.dim() == 2:
        return out, latents(a, pool_size), empty, empty
    slope = _derivative(u, negative_slope)
    rows, columns = (bins(n, pool_size, z.device).to(a.dtype) for n in z.shape[2:])
    s1, s2 = ((rows @ (t @ columns.t())).flatten(1) for t in (slope, slope * _normalized(z, mean, rstd)))
    return out, latents(a, pool_size), s1, s2


def norm_grads(grad_latents, s1, s2, channels, area):
    """dgamma, dbeta (C,) = sums over batch and bins of grad/area * s2, * s1; `area` (P*P,) positions of each bin.

    The third result (C,) is the gradient of the layer's bias: zeros, for batch normalisation cancels it.
    """
    g = grad_latents.reshape(grad_latents.shape[0], channels, area.numel()) / area
    grad_gamma, grad_beta = (g * s2.reshape(g.shape)).sum((0, 2)), (g * s1.reshape(g.shape)).sum((0, 2))
    return grad_gamma, grad_beta, torch.zeros_like(grad_beta)


def grad_preactivation_(
    z, mean, rstd, gamma, beta, negative_slope, grad_latents, grad_gamma, grad_beta, pool_size, scale
):
    """Overwrite z with scale * dL/dz.

    dL/dz = gamma * rstd * (g_u - (dbeta + xhat * dgamma) / N), g_u = lambda * unpool(grad_latents)
    """
    xhat = _normalized(z, mean, rstd)
    u = xhat * _channel(gamma, z) + _channel(beta, z)
    grad_u = _derivative(u, negative_slope) * unpool(grad_latents, z.shape, pool_size)
    count = z.numel() // z.shape[1]
    centred = grad_u - (_channel(grad_beta, z) + xhat * _channel(grad_gamma, z)) / count
    return z.copy_(_channel(gamma * rstd * scale, z) * centred)


def linear_grad_preactivation_(z, mean, rstd, gamma, beta, negative_slope, grad_latents, pool_size, scale):
    """The linear block's twin, z (B, N): overwrites z and returns what `norm_grads` does."""
    xhat = _normalized(z, mean, rstd)
    u = xhat * _channel(gamma, z) + _channel(beta, z)
    grad_u = _derivative(u, negative_slope) * unpool(grad_latents, z.shape, pool_size)
    grad_gamma, grad_beta = (grad_u * xhat).sum(0), grad_u.sum(0)
    grad_preactivation_(
        z, mean, rstd, gamma, beta, negative_slope, grad_latents, grad_gamma, grad_beta, pool_size, scale
    )
    return grad_gamma, grad_beta, torch.zeros_like(grad_beta)

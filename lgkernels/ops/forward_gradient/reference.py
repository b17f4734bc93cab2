"""Local forward gradients in plain torch: the definition that every other backend is tested against.

N samples, P patches, G groups of C channels, D = G C, K classes. Any device; float32 and float64 (half inputs are
widened on load). A dot over a symbol is a tangent, LN a layer norm without scale and shift:

    LN(z) = zh = (z - mean z) r,  r = 1 / sqrt(var z + eps)
    LN'(z; v) = r (v - mean v - zh mean(zh v))              its own transpose: JVP and VJP are one function
"""

import torch
import torch.nn.functional as F

from ...core.ops import wide, wide_dtype

EPS = 1e-5  # of the layer norm in front of a loss


def standardized(z, dim, eps):
    """`(zh, r)` of z, in the dtype that it is computed in."""
    z = wide(z)
    centred = z - z.mean(dim, keepdim=True)
    r = (centred.square().mean(dim, keepdim=True) + eps).rsqrt()
    return centred * r, r


def norm_derivative(zh, r, v, dim):
    """LN'(z; v), of tangents or cotangents v."""
    return r * (v - v.mean(dim, keepdim=True) - zh * (zh * v).mean(dim, keepdim=True))


# -- the replicated losses --------------------------------------------------------------------------------------------


def pooled(x, layer_norm):
    """(N, D): the mean over the patches of x (N, P, G, C), or of LN_C(x)."""
    x = standardized(x, -1, EPS)[0] if layer_norm else wide(x)
    return x.mean(1).flatten(1)


def classify(pooled, weight, bias, target):
    """`(loss (N,), delta (N, K), teach (N, D))` of pooled (N, D), weight (D, K), bias (K,) or None.

    delta = softmax(logits) - one-hot, teach = delta W^T: the gradient of the loss for the pooled features.
    """
    weight = weight.to(pooled.dtype)
    logits = pooled @ weight if bias is None else torch.addmm(bias.to(pooled.dtype), pooled, weight)
    log_p, place = F.log_softmax(logits, 1), target.unsqueeze(1)
    loss = -log_p.gather(1, place).squeeze(1)
    delta = log_p.exp_()
    delta.scatter_add_(1, place, delta.new_full((1, 1), -1.0).expand(place.shape))
    return loss, delta, delta @ weight.t()


def contrast(projected, temperature):
    """`(loss (2N,), gradient (2N, D))` of the projections h (2N, D) of two views; rows i and i + N are of one sample.

    q = h / |h|; keys k = q without gradient. Row i has logits <q_i, k_j> / temperature for all j but i; its class is
    the other view's row. The squared norm is at least 1e-12; there q is linear in h.
    """
    rows, n = len(projected), len(projected) // 2
    square = projected.square().sum(1, keepdim=True)
    floored, inverse = square <= 1e-12, square.clamp_min(1e-12).rsqrt()
    q = projected * inverse
    itself = torch.eye(rows, dtype=torch.bool, device=q.device)
    log_p = F.log_softmax((q @ q.t() / temperature).masked_fill_(itself, -torch.inf), 1)
    other = torch.arange(rows, device=q.device).roll(n).unsqueeze(1)
    loss = -log_p.gather(1, other).squeeze(1)
    m = (log_p.exp_().scatter_add_(1, other, torch.full_like(other, -1, dtype=q.dtype)) @ q) / temperature
    along = (q * m).sum(1, keepdim=True).masked_fill_(floored, 0.0)
    return loss, (m - q * along) * inverse


def tangent(x, x_tangent, teach, head_tangent, out):
    """out (N, P, G) = <x_tangent, teach>_C / P + head_tangent: the tangents of the losses.

    x_tangent (N, P, G, C), teach (N, D), head_tangent (N,) or None; x: the input, where LN_C(x) is what is pooled.
    """
    v = wide(x_tangent)
    if x is not None:
        v = norm_derivative(*standardized(x, -1, EPS), v, -1)
    n, patches, groups, channels = v.shape
    result = (v * teach.view(n, 1, groups, channels)).sum(-1) / max(patches, 1)
    return out.copy_(result if head_tangent is None else result + head_tangent.view(n, 1, 1))


def cotangent(x, grad, teach, out):
    """out (N, P, G, C) = grad (N, P, G) teach / P: the gradient of x, through LN_C where x is given."""
    n, patches, groups, channels = out.shape
    v = grad.unsqueeze(-1) * teach.view(n, 1, groups, channels) / max(patches, 1)
    if x is not None:
        v = norm_derivative(*standardized(x, -1, EPS), v, -1)
    return out.copy_(v)


# -- layers with a tangent ----------------------------------------------------------------------------------------


def dual_norm(z, z_tangent, residual, noise, options):
    """(2, *z.shape): y and its tangent; (1, *z.shape), y alone, where there is neither z_tangent nor noise.

        y = act(LN(z) + residual)       y' = act'(y) (LN'(z; z_tangent) + noise)       act: ReLU or none

    The noise enters after the norm, as the tangent of what the ReLU takes. The residual has no tangent.
    """
    zh, r = standardized(z, options.dim, options.eps)
    y = zh if residual is None else zh + residual.to(zh.dtype)
    y = y.clamp_min(0) if options.relu else y
    if z_tangent is None and not noise.exists:
        return y.to(z.dtype).unsqueeze(0).contiguous()
    v = torch.zeros_like(y) if z_tangent is None else norm_derivative(zh, r, wide(z_tangent), options.dim)
    if noise.exists:
        v = v + noise.like(z, v.dtype)
    v = v * (y > 0) if options.relu else v
    return torch.stack((y, v)).to(z.dtype).contiguous()


def activity_grad(z, y, coefficient, noise, options):
    """The gradient of z, before the norm: LN'(z; coefficient noise 1[y > 0]).

    coefficient has z's sizes but that of `dim`, which divides z's: one number for each run of channels.
    """
    zh, r = standardized(z, options.dim, options.eps)
    q = coefficient.to(wide_dtype(z.dtype)).repeat_interleave(
        z.shape[options.dim] // coefficient.shape[options.dim], options.dim
    )
    v = q * noise.like(z, zh.dtype)
    v = v * (y > 0) if options.relu else v
    return norm_derivative(zh, r, v, options.dim).to(z.dtype).contiguous()

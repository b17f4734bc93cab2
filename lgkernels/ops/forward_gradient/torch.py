"""The family in plain torch with few passes over memory: the functions of reference.py, float32 and halves, any device.

A layer norm's own backward pass computes LN', of tangents as well as of cotangents.
"""

import torch

from ...core.ops import wide, wide_dtype
from . import reference
from .reference import EPS, classify, contrast  # noqa: F401

_aten = torch.ops.aten


def _normalized(z, eps):
    """torch's layer norm over the last dimension: `(zh, what LN' needs)`."""
    shape = z.shape[-1:]
    zh, mean, rstd = torch.native_layer_norm(z, shape, None, None, eps)
    return zh, (z, shape, mean, rstd, None, None, [True, False, False])


def _derivative(v, saved):
    return _aten.native_layer_norm_backward(v, *saved)[0]


def pooled(x, layer_norm):
    if layer_norm and x.numel():
        x = _normalized(wide(x), EPS)[0]
    return x.mean(1, dtype=wide_dtype(x.dtype)).flatten(1)


def tangent(x, x_tangent, teach, head_tangent, out):
    if x is not None and x.numel():
        x = wide(x).contiguous()
        x_tangent = _derivative(x_tangent.to(x.dtype).contiguous(), _normalized(x, EPS)[1])
    n, patches, groups, channels = x_tangent.shape
    torch.sum(x_tangent * (teach.view(n, 1, groups, channels) / max(patches, 1)), -1, out=out)
    return out if head_tangent is None else out.add_(head_tangent.view(n, 1, 1))


def cotangent(x, grad, teach, out):
    if x is not None:
        return reference.cotangent(x, grad, teach, out)
    n, patches, groups, channels = out.shape
    return torch.mul(grad.unsqueeze(-1), teach.view(n, 1, groups, channels) / max(patches, 1), out=out)


def _moved(tensor, dim):
    """The tensor with `dim` last, dense."""
    return None if tensor is None else tensor.movedim(dim, -1).contiguous()


def dual_norm(z, z_tangent, residual, noise, options):
    if not z.numel():
        return reference.dual_norm(z, z_tangent, residual, noise, options)
    if z.dtype != wide_dtype(z.dtype):  # the sums are rounded once
        return dual_norm(wide(z), z_tangent, residual, noise, options).to(z.dtype)
    out = z.new_empty((2 if z_tangent is not None or noise.exists else 1, *z.shape))
    zh, saved = _normalized(_moved(z, options.dim), options.eps)
    y = out[0].copy_(zh.movedim(-1, options.dim))
    if residual is not None:
        y.add_(residual)
    if options.relu:
        y.relu_()
    if len(out) == 1:
        return out
    v = out[1]
    if z_tangent is not None:
        v.copy_(_derivative(_moved(z_tangent.to(z.dtype), options.dim), saved).movedim(-1, options.dim))
        if noise.exists:
            v.add_(noise.like(z, v.dtype))
    else:
        v.copy_(noise.like(z, v.dtype))
    if options.relu:
        v.mul_(y > 0)
    return out


def activity_grad(z, y, coefficient, noise, options):
    if not z.numel():
        return reference.activity_grad(z, y, coefficient, noise, options)
    dim, runs = options.dim, coefficient.shape[options.dim]
    v = noise.like(z, wide_dtype(z.dtype))
    v = v * (y > 0) if options.relu else v
    v = (v.unflatten(dim, (runs, -1)) * coefficient.to(v.dtype).unsqueeze(dim + 1)).flatten(dim, dim + 1)
    saved = _normalized(_moved(wide(z), dim), options.eps)[1]
    return _derivative(_moved(v, dim), saved).movedim(-1, dim).to(z.dtype).contiguous()

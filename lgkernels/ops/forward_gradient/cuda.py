"""Forward gradients on the CUDA C++ kernels of `lgkernels._C` (csrc/forward_gradient/cuda): the functions of
reference.py, float32 and halves.

Every function allocates its outputs with torch.empty and launches on the current stream; nothing synchronises. Heads
of many classes are the library's products.
"""

import torch

from ..common.cuda import DTYPES, address, call
from . import reference
from .options import Noise, NormOptions
from .reference import EPS
from .torch import contrast  # noqa: F401  products of small matrices

_FEW_CLASSES = 32  # a warp's lanes: the kernel of whole heads
_POOLED_CHANNELS = 128  # of a group whose norm is a part of pooling


def _new(like, *shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _dense(tensor, dtype=None):
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


def _array(tensor):
    return None if tensor is None else (address(tensor), DTYPES[tensor.dtype])


# -- the replicated losses --------------------------------------------------------------------------------------------


def _norm_options(x):
    return NormOptions(x.dim() - 1, EPS, False)


def pooled(x, layer_norm):
    if not x.numel():
        return reference.pooled(x, layer_norm)
    if layer_norm and x.shape[3] > _POOLED_CHANNELS:
        x, layer_norm = dual_norm(x.float(), None, None, Noise(), _norm_options(x))[0], False
    x = _dense(x)
    out = _new(x, x.shape[0], x.shape[2] * x.shape[3])
    call("forward_gradient_pooled", x.device, tuple(x.shape), _array(x), layer_norm, address(out))
    return out


def classify(pooled, weight, bias, target):
    if not pooled.numel() or not weight.numel():
        return reference.classify(pooled, weight, bias, target)
    (rows, width), classes = pooled.shape, weight.shape[1]
    loss = _new(pooled, rows)
    if classes > _FEW_CLASSES:
        weight = weight.float()
        logits = pooled @ weight if bias is None else torch.addmm(bias.float(), pooled, weight)
        size = rows, classes
        call("forward_gradient_softmax", pooled.device, *size, address(target), address(logits), address(loss))
        return loss, logits, logits @ weight.t()
    pooled, weight, bias = _dense(pooled), _dense(weight), _dense(bias)
    delta, teach = _new(pooled, rows, classes), _new(pooled, rows, width)
    inputs = address(pooled), _array(weight), _array(bias), address(target)
    outputs = address(loss), address(delta), address(teach)
    call("forward_gradient_head", pooled.device, rows, width, classes, *inputs, *outputs)
    return loss, delta, teach


def tangent(x, x_tangent, teach, head_tangent, out):
    if not x_tangent.numel():
        return reference.tangent(x, x_tangent, teach, head_tangent, out)
    x, x_tangent = _dense(x), _dense(x_tangent)
    teach, head = _dense(teach, torch.float32), _dense(head_tangent, torch.float32)
    inputs = _array(x), _array(x_tangent), address(teach), address(head)
    call("forward_gradient_tangent", out.device, tuple(x_tangent.shape), *inputs, address(out))
    return out


def cotangent(x, grad, teach, out):
    if not out.numel():
        return out
    x, grad, teach = _dense(x), _dense(grad, torch.float32), _dense(teach, torch.float32)
    inputs = _array(x), address(grad), address(teach)
    call("forward_gradient_cotangent", out.device, tuple(out.shape), *inputs, _array(out))
    return out


# -- layers with a tangent ----------------------------------------------------------------------------------------


def _layer(z, options, runs):
    dim, channels = options.dim, z.shape[options.dim]
    inner = z.shape[dim + 1 :].numel()
    per_sample = max(z[0].numel() // (channels * inner), 1)
    return z.numel() // (channels * inner), inner, per_sample, channels, runs, float(options.eps), bool(options.relu)


def _noise(z, noise, dim):
    """`(values, description of a law)` and what they point to; a norm over the samples takes its noise written out."""
    values = noise.values
    if dim == 0 and values is None and noise.exists:
        values = noise.like(z, torch.float32)
    values, state = _dense(values), noise.state if values is None else None
    law = (len(z), z[0].numel(), None, None, address(state), noise.law, noise.law_scale, noise.low, 1.0, False)
    return (_array(values), law), (values, state)


def dual_norm(z, z_tangent, residual, noise, options):
    if not z.numel():
        return reference.dual_norm(z, z_tangent, residual, noise, options)
    z, z_tangent, residual = _dense(z), _dense(z_tangent), _dense(residual)
    out = z.new_empty((2 if z_tangent is not None or noise.exists else 1, *z.shape))
    source, _keep = _noise(z, noise, options.dim)
    inputs = _array(z), _array(z_tangent), _array(residual), *source
    outputs = address(out), address(out[1]) if len(out) == 2 else 0
    call("forward_gradient_dual_norm", z.device, _layer(z, options, 1), *inputs, *outputs)
    return out


def activity_grad(z, y, coefficient, noise, options):
    if not z.numel():
        return reference.activity_grad(z, y, coefficient, noise, options)
    z, y, coefficient = _dense(z), _dense(y), _dense(coefficient, torch.float32)
    out = torch.empty_like(z)
    source, _keep = _noise(z, noise, options.dim)
    inputs = _array(z), _array(y), address(coefficient), *source
    call(
        "forward_gradient_activity_grad",
        z.device,
        _layer(z, options, coefficient.shape[options.dim]),
        *inputs,
        address(out),
    )
    return out

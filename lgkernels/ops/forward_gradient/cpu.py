"""The family over the C++ kernels in csrc/forward_gradient/cpu: the functions of `reference.py`, float32 and halves.

Contiguous tensors are taken as they lie, anything else is copied once. Products of matrices are the library's.
Arithmetic is float32, sums in an order that no number of threads changes.
"""

import torch

from ...core.native import cpu_entries, threads
from ..common.cpu import DTYPES, address, code, feedback, floats
from ..common.matrix import FeedbackMatrix
from . import reference
from .reference import contrast  # noqa: F401  products of small matrices

_C = cpu_entries()


def _dense(tensor):
    """`(description, tensor)` for the kernels; (None, None) for None."""
    if tensor is None:
        return None, None
    dense = tensor.contiguous() if tensor.dtype in DTYPES else tensor.to(torch.float32).contiguous()
    return (dense.data_ptr(), DTYPES[dense.dtype]), dense


def _floats(tensor):
    return None if tensor is None else tensor.float().contiguous()


# -- the replicated losses --------------------------------------------------------------------------------------------


def pooled(x, layer_norm):
    if not x.numel():
        return reference.pooled(x, layer_norm)
    code(x.dtype)
    (array, _held), shape = _dense(x), tuple(x.shape)
    out = floats(shape[0], shape[2] * shape[3])
    _C.forward_gradient_pooled(shape, array, layer_norm, out.data_ptr(), threads())
    return out


def _logits(pooled, weight, bias):
    """pooled weight + bias, contiguous. Of fewer than 16 columns the library is three times as fast on its side."""
    if weight.shape[1] >= 16:
        return pooled @ weight if bias is None else torch.addmm(bias.float(), pooled, weight)
    columns, rows = weight.t(), pooled.t()
    logits = columns @ rows if bias is None else torch.addmm(bias.float().unsqueeze(1), columns, rows)
    return logits.t().contiguous()


def classify(pooled, weight, bias, target):
    if not pooled.numel() or not weight.numel():
        return reference.classify(pooled, weight, bias, target)
    weight = weight.float()
    logits = _logits(pooled, weight, bias)
    rows, classes = logits.shape
    loss, delta, target = (floats(rows), floats(rows, classes), target.contiguous())
    _C.forward_gradient_softmax(
        logits.data_ptr(), target.data_ptr(), rows, classes, delta.data_ptr(), loss.data_ptr(), threads()
    )
    return loss, delta, delta @ weight.t()


def tangent(x, x_tangent, teach, head_tangent, out):
    if not x_tangent.numel():
        return reference.tangent(x, x_tangent, teach, head_tangent, out)
    code(x_tangent.dtype)
    (array, _x), (moved, _v) = _dense(x), _dense(x_tangent)
    teach, head_tangent = _floats(teach), _floats(head_tangent)
    _C.forward_gradient_tangent(
        tuple(x_tangent.shape), array, moved, teach.data_ptr(), address(head_tangent), out.data_ptr(), threads()
    )
    return out


def cotangent(x, grad, teach, out):
    if not out.numel():
        return out
    (array, _x), grad, teach = _dense(x), _floats(grad), _floats(teach)
    result = out.data_ptr(), code(out.dtype)
    _C.forward_gradient_cotangent(tuple(out.shape), array, grad.data_ptr(), teach.data_ptr(), result, threads())
    return out


# -- layers with a tangent ----------------------------------------------------------------------------------------


def _shape(z, options):
    """The kernels' description of the norm."""
    dim, length = options.dim, z.shape[options.dim]
    inner = z.shape[dim + 1 :].numel()
    return z.numel() // (length * inner), length, inner, z.numel() // len(z), options.eps, options.relu


def _noise(z, noise):
    """`(description of a tensor, description of a law)` and the tensors that they point to."""
    array, held = _dense(noise.values)
    state = noise.state if held is None else None
    law = FeedbackMatrix(None, None, state, noise.law, noise.law_scale, noise.low)
    return array, feedback((len(z), z.numel() // len(z)), law), (held, state)


def dual_norm(z, z_tangent, residual, noise, options):
    if not z.numel():
        return reference.dual_norm(z, z_tangent, residual, noise, options)
    code(z.dtype)
    both = z_tangent is not None or noise.exists
    out = torch.empty((2 if both else 1, *z.shape), dtype=z.dtype, device="cpu")
    (array, _z), (moved, _v), (added, _r) = _dense(z), _dense(z_tangent), _dense(residual)
    values, law, _held = _noise(z, noise)
    _C.forward_gradient_dual_norm(
        _shape(z, options),
        array,
        moved,
        added,
        values,
        law,
        out.data_ptr(),
        out[1].data_ptr() if both else 0,
        threads(),
    )
    return out


def activity_grad(z, y, coefficient, noise, options):
    if not z.numel():
        return reference.activity_grad(z, y, coefficient, noise, options)
    code(z.dtype)
    (array, _z), (activity, _y), coefficient = _dense(z), _dense(y), _floats(coefficient)
    values, law, _held = _noise(z, noise)
    out = torch.empty(z.shape, dtype=z.dtype, device="cpu")
    _C.forward_gradient_activity_grad(
        _shape(z, options),
        array,
        activity,
        coefficient.data_ptr(),
        coefficient.shape[options.dim],
        values,
        law,
        out.data_ptr(),
        threads(),
    )
    return out

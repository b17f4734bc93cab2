"""Layers with explicit tangents: products by torch's library, the rest by the family's ops. No graph is recorded.

A primal and its tangent are the two halves of one tensor wherever they are made here, so that the next product takes
both at once.
"""

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from ...core import checks
from ...core.ops import wide
from ...random import RandomFeedback
from . import op  # noqa: F401  registers the ops

_ops = torch.ops.lgkernels
NO_NOISE = (None, None, "normal", 1.0, None)
_ROWS_AT_ONCE = 1 << 20  # elements of a weight's tangent that are written out together


def refuse_duals(name: str, *tensors) -> None:
    """Raise where a tangent is attached to an argument of a function that takes tangents by themselves."""
    if torch._C._are_functorch_transforms_active() or (
        forward_ad._current_level >= 0
        and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    ):
        raise NotImplementedError(
            f"{name} does not support torch.func transforms and dual tensors: it takes tangents as arguments, and "
            "theirs would be lost"
        )


def halves(x, x_tangent):
    """(2, *x.shape) where the two lie one behind the other in memory, else None."""
    if x_tangent is None or torch.compiler.is_compiling() or x.dtype != x_tangent.dtype:
        return None
    if not (x.is_contiguous() and x_tangent.is_contiguous()) or not x.numel():
        return None
    if x.untyped_storage().data_ptr() != x_tangent.untyped_storage().data_ptr():
        return None
    if x_tangent.storage_offset() != x.storage_offset() + x.numel():
        return None
    return x.as_strided((2, *x.shape), (x.numel(), *x.stride()))


def _random_product(x, law, out_features):
    """x Z^T for a matrix Z (out_features, in) by formula, some of its rows at a time."""
    rows = max(_ROWS_AT_ONCE // max(x.shape[-1], 1), 1)
    parts = []
    for start in range(0, out_features, rows):
        size = min(rows, out_features - start), x.shape[-1]
        parts.append(F.linear(x, law.materialize(size, x.device, x.dtype, offset=(start, 0))))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@torch.no_grad()
def dual_linear(x, x_tangent, weight, bias, weight_tangent=None, bias_tangent=None):
    both = halves(x, x_tangent)
    if both is not None:
        out = F.linear(both, weight)
        y, y_tangent = out.unbind()
        if bias is not None:
            y.add_(bias)
    else:
        y = F.linear(x, weight, bias)
        y_tangent = None if x_tangent is None else F.linear(x_tangent.to(x.dtype), weight)
    if weight_tangent is not None:
        if isinstance(weight_tangent, RandomFeedback):
            moved = _random_product(x, weight_tangent, len(weight))
        else:
            moved = F.linear(x, weight_tangent.to(x.dtype))
        y_tangent = moved if y_tangent is None else y_tangent.add_(moved)
    if bias_tangent is not None:
        bias_tangent = bias_tangent.to(y.dtype)
        y_tangent = bias_tangent.expand(y.shape).clone() if y_tangent is None else y_tangent.add_(bias_tangent)
    return y, torch.zeros_like(y) if y_tangent is None else y_tangent


def _under_autocast(*tensors):
    """The tensors as autocast gives them to a product: one that writes where it is told is none of those it knows."""
    device = tensors[0].device
    if not checks.autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _group_products(x, weight, out):
    """out (R, G, C_out) = x (R, G, C) by weight (G, C_out, C): one product a group, written where it belongs."""
    if torch.compiler.is_compiling():  # Dynamo takes dense results alone
        out.copy_(torch.einsum("rgc,gdc->rgd", x, weight))
        return
    torch.bmm(x.transpose(0, 1), weight.transpose(1, 2), out=out.transpose(0, 1))


@torch.no_grad()
def group_linear(x, weight, bias):
    """A linear layer of each group: x (..., G, C) by weight (G, C_out, C)."""
    x, weight = _under_autocast(x, weight)
    groups, out_channels, channels = weight.shape
    out = x.new_empty((x.shape[:-2].numel(), groups, out_channels))
    _group_products(x.reshape(len(out), groups, channels), weight, out)
    if bias is not None:
        out.add_(bias)
    return out.view(*x.shape[:-1], out_channels)


@torch.no_grad()
def dual_group_linear(x, x_tangent, weight, bias):
    x, x_tangent, weight = _under_autocast(x, x_tangent, weight)
    groups, out_channels, channels = weight.shape
    rows, both = x.shape[:-2].numel(), halves(x, x_tangent)
    out = x.new_empty((2, rows, groups, out_channels))
    if both is not None:
        _group_products(both.view(2 * rows, groups, channels), weight, out.view(2 * rows, groups, out_channels))
    else:
        _group_products(x.reshape(rows, groups, channels), weight, out[0])
        if x_tangent is None:
            out[1].zero_()
        else:
            _group_products(x_tangent.to(x.dtype).reshape(rows, groups, channels), weight, out[1])
    if bias is not None:
        out[0].add_(bias)
    y, y_tangent = out.view(2, *x.shape[:-1], out_channels)
    return y, y_tangent


@torch.no_grad()
def dual_norm(z, z_tangent, residual, noise, dim, eps, relu, impl):
    """`(y, y_tangent or None)`."""
    out = _ops.dual_norm(z, z_tangent, residual, *noise, dim, eps, relu, impl)
    return out[0], out[1] if len(out) == 2 else None


def sum_of_products(grad, x, groups):
    """`(grad^T x, sum of grad)` over all dimensions but the last, of each group where there are groups: the gradients
    of weight and bias."""
    grad, x = wide(grad), wide(x)
    if groups:
        grad, x = grad.flatten(0, -3), x.flatten(0, -3)
        return torch.bmm(grad.permute(1, 2, 0), x.transpose(0, 1)).to(grad.dtype), grad.sum(0)
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    return (grad.t() @ x).to(grad.dtype), grad.sum(0)


@torch.no_grad()
def activity_grads(x, z, y, coefficient, noise, dim, eps, groups, impl):
    return sum_of_products(_ops.activity_grad(z, y, coefficient, *noise, dim, eps, True, impl), x, groups)

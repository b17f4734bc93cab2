"""The losses as an expert writes them in plain torch, on any device: the functions of reference.py, which is lean but
where this file has its own. Half feature maps are read and written as they are, without a float32 copy beside them.
"""

import torch
import torch.nn.functional as F

from . import reference
from .reference import goodness, similarity  # noqa: F401

_aten = torch.ops.aten
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # torch's numbers
_NO_CLASS = -100  # ignored by torch; targets are checked


def _product(a, b, out):
    """a * b by broadcasting, computed in float32 and rounded once into `out`."""
    return torch.mul(a, b, out=out)


def local_cross_entropy(h, weight, bias, target, label_smoothing, reduction, compute_grad):
    if label_smoothing or not len(h):
        return reference.local_cross_entropy(h, weight, bias, target, label_smoothing, reduction, compute_grad)
    dims = reference.pooled_dims(h.dim())
    pooled = h.mean(dims, dtype=torch.float32) if dims else h.to(torch.float32, copy=True)
    weight = weight.to(pooled.dtype)
    log_p = F.log_softmax(F.linear(pooled, weight, None if bias is None else bias.to(pooled.dtype)), 1)
    of_torch = target, None, _REDUCTIONS[reduction], _NO_CLASS
    loss, total = _aten.nll_loss_forward(log_p, *of_torch)
    if not compute_grad:
        return loss, *(pooled.new_empty(0) for _ in range(3))
    grad = _aten.nll_loss_backward(loss.new_ones(()).expand(loss.shape), log_p, *of_torch, total)
    grad = _aten._log_softmax_backward_data(grad, log_p, 1, log_p.dtype)
    positions = h.shape[1:].numel() // max(pooled.shape[1], 1)
    grad_pooled = torch.addmm(pooled, grad, weight, beta=0, alpha=1 / max(positions, 1))
    return loss, pooled, grad, grad_pooled


def local_cross_entropy_grads(scale, pooled, grad_logits, grad_pooled, dtype, needs_h, needs_weight, needs_bias):
    factor = scale.unsqueeze(1) if scale.dim() else scale
    grad_h = torch.empty(grad_pooled.shape if needs_h else 0, dtype=dtype, device=pooled.device)
    if needs_h:
        _product(grad_pooled, factor, grad_h)
    g = grad_logits * factor if needs_weight or needs_bias else grad_logits
    return (
        grad_h,
        g.t() @ pooled.to(g.dtype) if needs_weight else pooled.new_empty(0),
        g.sum(0) if needs_bias else pooled.new_empty(0),
    )


def goodness_grad(h, kappa, scale):
    return _product(h, (kappa * scale).reshape(-1, *[1] * (h.dim() - 1)), torch.empty_like(h))


def similarity_grad(x, grad, mean, scale):
    if not mean.numel():
        return _product(grad, scale, torch.empty(grad.shape, dtype=x.dtype, device=x.device)).reshape(x.shape)
    return _product((x - mean[:, :, None, None]), (grad * scale)[:, :, None, None], torch.empty_like(x))

"""Adapters on the CPU. The layer's products are the library's; what a float32 LoKr factor of rank 1 adds to them, passes
over output and input, are C++ kernels of `lgkernels._C` (csrc/cpu/adapter.h). Everything else is the reference's.
"""
import torch
import torch.nn.functional as F

from ...core.native import native
from . import reference
from .reference import lokr_conv2d, lokr_conv2d_grads, lora_linear, lora_linear_grads  # noqa: F401

_C = native()


def _sums(x, vector, coefficient):
    """`(x (N, k) . vector (k), x^T coefficient (N))` in one pass; either may be None."""
    x = x.contiguous()
    along, across = (None if t is None else torch.empty(n) for t, n in zip((vector, coefficient), x.shape))
    _C.adapter_rank_one_sums(*x.shape, x.data_ptr(), *(0 if t is None else t.data_ptr() for t in (
        vector, coefficient, along, across)), torch.get_num_threads())
    return along, across


def _add_outer(y, coefficient, vector, scale):
    """y (N, k) += scale * coefficient (N) vector (k)^T"""
    _C.adapter_add_outer(*y.shape, coefficient.data_ptr(), vector.data_ptr(), scale, y.data_ptr(),
                         torch.get_num_threads())


def _rank_one(x, a, b):
    return a is not None and b.shape[0] == 1 and x.dtype == torch.float32


def lokr_linear(x, weight, bias, w1, a, b, scale):
    if not _rank_one(x, a, b):
        return reference.lokr_linear(x, weight, bias, w1, a, b, scale)
    rows, inner, outer = len(x), b.shape[1], a.shape[0]
    t = _sums(x.reshape(-1, inner), b.contiguous(), None)[0].view(rows, w1.shape[1])
    u = t @ w1.t()
    y = F.linear(x, weight, bias)
    _add_outer(y.view(-1, outer), u, a.contiguous(), scale)
    return y, t.unsqueeze(2), u.unsqueeze(2)


def lokr_linear_grads(g, x, weight, w1, a, b, t, u, scale, needs):
    if not _rank_one(g, a, b):
        return reference.lokr_linear_grads(g, x, weight, w1, a, b, t, u, scale, needs)
    none, rows, inner, outer = g.new_empty(0), len(g), b.shape[1], a.shape[0]
    v, grad_a = _sums(g.reshape(-1, outer), a.contiguous(), u.contiguous() if needs[4] else None)
    v = v.view(rows, w1.shape[0])
    grad_t = (v @ w1).mul_(scale)
    grad_x = none
    if needs[0]:
        grad_x = g @ weight
        _add_outer(grad_x.view(-1, inner), grad_t, b.contiguous(), 1.0)
    return (grad_x, g.t() @ x if needs[1] else none.clone(), g.sum(0) if needs[2] else none.clone(),
            (v.t() @ t.squeeze(2)).mul_(scale) if needs[3] else none.clone(),
            grad_a.mul_(scale).unsqueeze(1) if needs[4] else none.clone(),
            _sums(x.reshape(-1, inner), None, grad_t)[1].unsqueeze(0) if needs[5] else none.clone())

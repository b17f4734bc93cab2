"""Tiny cases of the family's ops for `python -m lgkernels info --selftest`.

`CASES[op](impl, device, dtype)` returns what the op computes, gradients included, from fixed inputs.
`ORDINARY`: those of `verify`.
"""

import torch

from ..common.selftest import IMAGES, Ordinary, arranged, leaves, values
from . import autograd
from .options import Noise, NormOptions

_ops = torch.ops.lgkernels


def _classes(x, classes):
    return torch.arange(len(x), device=x.device) % classes


def _cross_entropy(impl, device, dtype):
    x, weight, bias = leaves(((4, 3, 2, 5), (10, 4), (4,)), device, dtype)
    loss = autograd.cross_entropy(x, weight, bias, _classes(x, 4), True, impl)
    loss.square().sum().backward()
    return [loss.detach(), x.grad, weight.grad, bias.grad]


def _nt_xent(impl, device, dtype):
    x, y, weight = leaves(((4, 3, 2, 5), (4, 3, 2, 5), (10, 6)), device, dtype)
    loss = autograd.nt_xent(x, y, weight, None, 0.5, impl)
    loss.square().sum().backward()
    return [loss.detach(), x.grad, y.grad, weight.grad]


def _tangent(impl, device, dtype):
    x, x_tangent, teach, grad, head = (
        t.detach() for t in leaves(((4, 3, 2, 5), (4, 3, 2, 5), (4, 10), (4, 3, 2), (4,)), device, dtype)
    )
    return [
        result
        for normed in (None, x)
        for result in (
            _ops.replicated_tangent(normed, x_tangent, teach, head, impl),
            _ops.replicated_cotangent(normed, grad, teach, 5, dtype, impl),
        )
    ]


def _noise(device, values=None):
    return Noise(values, None if values is not None else torch.tensor([5, 1, 2], device=device, dtype=torch.int64))


def _dual_norm(impl, device, dtype):
    z, z_tangent, residual, values = (t.detach() for t in leaves([(3, 4, 6)] * 4, device, dtype))
    results = []
    for dim, noise in ((2, _noise(device)), (1, _noise(device, values))):
        options = NormOptions(dim, 1e-5, True)
        both = _ops.dual_norm(z, z_tangent, residual, *noise, *options, impl)
        coefficient = z.narrow(dim, 0, 2).contiguous()
        results += [both, _ops.activity_grad(z, both[0], coefficient, *noise, *options, impl)]
    return results


CASES = {
    "replicated_cross_entropy": _cross_entropy,
    "replicated_nt_xent": _nt_xent,
    "replicated_tangent": _tangent,
    "dual_norm": _dual_norm,
}


# -- ordinary sizes -------------------------------------------------------------------------------------------------


def _ordinary(function, *shape):
    def run(impl, device, dtype, layout):
        x = arranged(values(*shape, device=device, dtype=dtype), layout)
        function(impl, x, values(shape[2] * shape[3], 10, device=device, dtype=torch.float32, scale=0.05))

    return Ordinary(IMAGES, run)


def _ordinary_cross_entropy(impl, x, weight):
    for layer_norm in (False, True):
        _ops.replicated_cross_entropy(x, weight, None, _classes(x, 10), layer_norm, impl)


def _ordinary_tangent(impl, x, weight):
    teach = weight.sum(1).expand(len(x), -1)
    for normed in (None, x):
        grad = _ops.replicated_tangent(normed, x, teach, None, impl)
        _ops.replicated_cotangent(normed, grad, teach, x.shape[3], x.dtype, impl)


def _ordinary_dual_norm(impl, z, weight):
    for dim in (3, 1):
        noise, options = _noise(z.device), NormOptions(dim, 1e-5, True)
        both = _ops.dual_norm(z, z, z, *noise, *options, impl)
        _ops.activity_grad(z, both[0], z.narrow(dim, 0, 1), *noise, *options, impl)


_RUNS = {
    "replicated_cross_entropy": _ordinary_cross_entropy,
    "replicated_nt_xent": lambda impl, x, weight: _ops.replicated_nt_xent(x, x.flip(0), weight, None, 0.5, impl),
    "replicated_tangent": _ordinary_tangent,
    "dual_norm": _ordinary_dual_norm,
}
_SIZES = ((128, 64, 16, 32), (128, 1, 16, 32), (32, 64, 64, 32))
ORDINARY = {
    op: {"x".join(map(str, shape)): _ordinary(function, *shape) for shape in _SIZES} for op, function in _RUNS.items()
}

"""Tiny cases of the family's ops for `python -m lgkernels info --selftest`.

`CASES[op](impl, device, dtype)` returns what the op computes, gradients included, from fixed inputs.
`ORDINARY`: those of `verify`.
"""

import torch

from ..common.selftest import IMAGES, ROWS, Ordinary, arranged, leaves, values
from . import autograd
from .options import ContrastiveOptions


def _case(loss, *shapes):
    def case(impl, device, dtype):
        tensors = leaves(shapes, device, dtype)
        value = loss(torch.tensor([0, 3, 1, 0], device=device, dtype=torch.int64), impl, *tensors)
        value.backward()
        return [value.detach(), *(t.grad for t in tensors)]

    return case


CASES = {
    "local_cross_entropy": _case(
        lambda y, impl, h, weight, bias: autograd.local_cross_entropy(h, weight, bias, y, 0.1, "mean", impl),
        (4, 5, 3, 2),
        (4, 5),
        (4,),
    ),
    "goodness": _case(lambda y, impl, h: autograd.goodness(h, y > 0, 2.0, True, impl)[0], (4, 5, 3, 2)),
    "peer_normalization": _case(
        lambda y, impl, h: autograd.peer_normalization(h, torch.ones_like(h[0]), 0.5, impl)[0], (4, 6)
    ),
    "similarity": _case(lambda y, impl, x: autograd.similarity(x, y, 4, True, impl), (4, 5, 3, 2)),
    "contrastive": _case(
        lambda y, impl, z: autograd.contrastive(
            "supcon_loss", z, y, ContrastiveOptions(4, 0.5, 1.0, True, False), impl
        ),
        (4, 6),
    ),
    "info_nce": _case(lambda y, impl, q, k: autograd.info_nce(q, k, y.unsqueeze(1), 0.5, impl), (4, 6), (4, 6)),
}


def _ordinary(loss, *shape):
    def run(impl, device, dtype, layout):
        h = arranged(values(*shape, device=device, dtype=dtype), layout).requires_grad_()
        loss(torch.arange(shape[0], device=device) % 10, impl, h).backward()

    return Ordinary(IMAGES if len(shape) == 4 else ROWS, run)


def _classifier(y, impl, h):
    weight = values(10, h.shape[1], device=h.device, dtype=torch.float32).requires_grad_()
    return autograd.local_cross_entropy(h, weight, None, y, 0.0, "mean", impl)


_LOSSES = {
    "local_cross_entropy": _classifier,
    "goodness": lambda y, impl, h: autograd.goodness(h, y > 4, 2.0, True, impl)[0],
    "similarity": lambda y, impl, h: autograd.similarity(h, y, 10, True, impl),
}
_SIZES = ((128, 128, 32, 32), (128, 512, 8, 8), (128, 1024))
ORDINARY = {
    op: {"x".join(map(str, shape)): _ordinary(loss, *shape) for shape in _SIZES} for op, loss in _LOSSES.items()
}

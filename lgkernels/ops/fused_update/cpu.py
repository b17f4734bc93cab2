"""The fused step on the CPU: `update_` of `reference.py` over the C++ kernel of `lgkernels._C` (csrc/fused_update/cpu).

Rows of a matrix are taken with any stride, columns dense (anything else is copied once). Arithmetic is float32, sums
in an order that no number of threads changes.
"""

import torch

from ...core.native import cpu_entries, threads
from ..common.cpu import dense_rows
from ..common.cpu import matrix as describe
from .torch import update_8bit_  # noqa: F401  no kernel of its own yet

_C = cpu_entries()

# From this many rows of grad on the library's product makes a part of the gradient, which stays in the cache until the
# kernel steps that part of the weight. Below it the kernel's own sum costs less than another pass.
_LIBRARY_FROM = 64
_PART_BYTES = 1 << 20


def _in_place(tensors, dtype):
    """Those of dense rows and this dtype as they are, copies of the others."""
    return [t if t is None else dense_rows(t.to(dtype)) for t in tensors]


def _parts(weight, first, second, gradient, grad, x):
    """(rows of weight, first and second; their gradient), the same memory for each gradient."""
    (rows, columns), left, x = weight.shape, grad.float().t(), x.float()
    step = min(rows, max(16, _PART_BYTES // (4 * columns)))
    part = torch.empty(step, columns)
    for start in range(0, rows, step):
        own = [t if t is None else t[start : start + step] for t in (weight, first, second)]
        product = torch.mm(left[start : start + step], x, out=part[: len(own[0])])
        if gradient is not None:
            product += gradient[start : start + step]
        yield own, product


def _run(rule, own, gradient, grad, x):
    shape = (*own[0].shape, grad.shape[0])
    _C.fused_update(rule, shape, *map(describe, (*own, gradient, grad, x)), threads())


def update_(weight, first, second, gradient, grad, x, rule):
    theirs = weight, first, second
    own = _in_place(theirs, weight.dtype)
    if grad.shape[0] >= _LIBRARY_FROM and weight.numel():
        for part, product in _parts(*own, gradient, grad, x):
            _run(rule, part, product, grad[:0], x[:0])
    else:
        gradient = None if gradient is None else dense_rows(gradient)
        _run(rule, own, gradient, dense_rows(grad), dense_rows(x))
    for mine, used in zip(theirs, own):
        if used is not mine:
            mine.copy_(used)

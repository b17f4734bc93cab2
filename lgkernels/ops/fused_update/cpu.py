"""The fused step on the CPU: `update_` of `reference.py` over the C++ kernel of `lgkernels._C` (csrc/fused_update/cpu).

Rows of a matrix are taken with any stride, columns dense (anything else is copied once). Arithmetic is float32, sums
in an order that no number of threads changes.
"""

import torch

from ...core.native import cpu_entries, threads
from ..common.cpu import dense_rows, floats
from ..common.cpu import matrix as describe

_C = cpu_entries()

# Without AVX2 the library's product is faster from this many rows of grad on: it makes a part of the gradient, which
# stays in the cache until the kernel steps that part of the weight. With wider vectors the kernel's own sum is.
_LIBRARY_FROM = 2**62 if _C is not None and _C.cpu_level() != "default" else 64
_PART_BYTES = 1 << 20


def _in_place(tensors, dtype):
    """Those of dense rows and this dtype as they are, copies of the others."""
    return [t if t is None else dense_rows(t.to(dtype)) for t in tensors]


def _parts(own, gradient, grad, x):
    """(rows of weight and states; their gradient), the same memory for each gradient."""
    (rows, columns), left, x = own[0].shape, grad.float().t(), x.float()
    step = min(rows, max(16, _PART_BYTES // (4 * columns)))
    part = floats(step, columns)
    for start in range(0, rows, step):
        rows_of = [t if t is None else t[start : start + step] for t in own]
        product = torch.mm(left[start : start + step], x, out=part[: len(rows_of[0])])
        if gradient is not None:
            product += gradient[start : start + step]
        yield rows_of, product


def _run(rule, own, gradient, grad, x):
    shape = (*own[0].shape, grad.shape[0])
    _C.fused_update(rule, shape, *map(describe, (*own, gradient, grad, x)), threads())


def _coded(codes, absmax):
    return None if codes is None else (codes.data_ptr(), absmax.data_ptr())


def _run_8bit(rule, own, gradient, grad, x):
    weight, *states = own
    shape = (*weight.shape, grad.shape[0])
    states = _coded(*states[:2]), _coded(*states[2:])
    _C.fused_update_8bit(rule, shape, describe(weight), *states, *map(describe, (gradient, grad, x)), threads())


def _update(run, own, gradient, grad, x, rule):
    if grad.shape[0] >= _LIBRARY_FROM and own[0].numel():
        for part, product in _parts(own, gradient, grad, x):
            run(rule, part, product, grad[:0], x[:0])
    else:
        gradient = None if gradient is None else dense_rows(gradient)
        run(rule, own, gradient, dense_rows(grad), dense_rows(x))


def update_(weight, first, second, gradient, grad, x, rule):
    theirs = weight, first, second
    own = _in_place(theirs, weight.dtype)
    _update(_run, own, gradient, grad, x, rule)
    for mine, used in zip(theirs, own):
        if used is not mine:
            mine.copy_(used)


def update_8bit_(weight, first, first_max, second, second_max, gradient, grad, x, rule):
    own = dense_rows(weight)
    _update(_run_8bit, [own, first, first_max, second, second_max], gradient, grad, x, rule)
    if own is not weight:
        weight.copy_(own)

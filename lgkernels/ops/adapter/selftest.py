"""Tiny cases of the family's ops for `python -m lgkernels info --selftest`.

`CASES[op](impl, device, dtype)` returns what the op computes, gradients included, from fixed inputs.
"""

from ..common.selftest import leaves
from . import autograd


def _case(function, *shapes):
    def case(impl, device, dtype):
        tensors = leaves(shapes, device, dtype)
        y = function(impl, *tensors)
        y.square().mean().backward()
        return [y.detach(), *(t.grad for t in tensors)]

    return case


CASES = {
    "lora_linear": _case(
        lambda impl, x, w, a, b: autograd.lora_linear(x, w, None, a, b, 2.0, impl), (3, 6), (8, 6), (2, 6), (8, 2)
    ),
    "lokr_linear": _case(
        lambda impl, x, w, w1, a, b: autograd.lokr_linear(x, w, None, w1, a, b, 2.0, impl),
        (3, 6),
        (8, 6),
        (2, 2),
        (4, 1),
        (1, 3),
    ),
    "lokr_conv2d": _case(
        lambda impl, x, w, w1, a, b: autograd.lokr_conv2d(x, w, None, [1, 1], [1, 1], [1, 1], 1, w1, a, b, 2.0, impl),
        (2, 6, 4, 4),
        (8, 6, 3, 3),
        (2, 2),
        (4, 1),
        (1, 3, 3, 3),
    ),
}

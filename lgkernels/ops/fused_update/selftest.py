"""Tiny cases of the family's op for `python -m lgkernels info --selftest`: `CASES[op](impl, device, dtype)`.

`ORDINARY`: those of `verify`, with the sizes of a linear layer and of a convolution.
"""

import torch

from ..common.selftest import ROWS, Ordinary, values
from . import op  # noqa: F401  registers the op
from .blocks import encoded
from .options import UpdateRule

SGD = UpdateRule("sgd", 0.1, 0.9, weight_decay=0.01, nesterov=True)
ADAM = UpdateRule("adam", 0.01, 0.9, 0.1, keep=0.99, beta2=0.99, eps=1e-8, root=0.3)


def update(impl, device, dtype):
    results = []
    for rule in (SGD, ADAM):
        weight, first, gradient = (values(n, 40, device=device, dtype=dtype)[:6].clone() for n in (6, 7, 8))
        second = values(9, 40, device=device, dtype=dtype)[:6].abs()
        grad, x = values(5, 6, device=device, dtype=dtype), values(5, 40, device=device, dtype=dtype)
        own = weight, first, second if rule.rule == "adam" else None
        torch.ops.lgkernels.fused_update_(*own, gradient, grad, x, *rule, impl)
        results += [t for t in own if t is not None]
    return results


def _coded(rows, columns, device):
    first, second = (values(rows + n, columns, device=device, dtype=torch.float32)[:rows] for n in (2, 3))
    return *encoded(first, True), *encoded(second.abs() + 0.1, False)


def update_8bit(impl, device, dtype):
    results = []
    for rule in (SGD, ADAM):
        weight, states = values(6, 300, device=device, dtype=dtype), _coded(6, 300, device)
        grad, x = values(5, 6, device=device, dtype=dtype), values(5, 300, device=device, dtype=dtype)
        states = states if rule.rule == "adam" else (*states[:2], None, None)
        torch.ops.lgkernels.fused_update_8bit_(weight, *states, None, grad, x, *rule, impl)
        # without the codes, which rounding may move by one
        results += [weight, *(t for t in states[1::2] if t is not None)]
    return results


CASES = {"fused_update_": update, "fused_update_8bit_": update_8bit}


def _update(rows, columns):
    def run(impl, device, dtype, layout):
        weight, first, second = (values(rows, columns, device=device, dtype=dtype) for _ in range(3))
        grad, x = values(128, rows, device=device, dtype=dtype), values(128, columns, device=device, dtype=dtype)
        ops = torch.ops.lgkernels
        ops.fused_update_(weight, first, None, None, grad, x, *UpdateRule("sgd", 0.1, 0.9), impl)
        ops.fused_update_(weight, first, second.abs_(), None, grad, x, *ADAM, impl)

    return Ordinary(ROWS[:1], run)


def _update_8bit(rows, columns):
    def run(impl, device, dtype, layout):
        weight, states = values(rows, columns, device=device, dtype=dtype), _coded(rows, columns, device)
        grad, x = values(128, rows, device=device, dtype=dtype), values(128, columns, device=device, dtype=dtype)
        torch.ops.lgkernels.fused_update_8bit_(weight, *states, None, grad, x, *ADAM, impl)

    return Ordinary(ROWS[:1], run)


_LAYERS = {"512 x 1024": (512, 1024), "4096 x 4096": (4096, 4096), "256 x 1152": (256, 128 * 9)}
ORDINARY = {
    "fused_update_": {words: _update(*sizes) for words, sizes in _LAYERS.items()},
    "fused_update_8bit_": {words: _update_8bit(*sizes) for words, sizes in _LAYERS.items()},
}

"""The family's kernel on small odd shapes, for support/sanitized.py."""

import itertools

import torch

from lgkernels.ops.fused_update.blocks import encoded
from tests.fused_update.common import STEPS, states
from tests.support.problems import randn


def run(kernels, device):
    """Every step, layout and dtype; returns what was written."""
    results = []
    for (rows, columns), dtype in itertools.product(((3, 1), (33, 70), (65, 300)), (torch.float32, torch.bfloat16)):
        shapes = [(rows, columns)] * 4 + [(9, rows), (9, columns)]
        weight, first, second, gradient, grad, x = (
            randn(*shape, seed=i).to(device, dtype) for i, shape in enumerate(shapes)
        )
        second.abs_()
        for name, rule in STEPS.items():
            own = [weight, *(first, second)[: states(name)], *[None] * (2 - states(name))]
            kernels.update_(*own, gradient if name in ("nesterov", "adamw") else None, grad, x, rule)
        results += [weight, first, second]
        for name in ("momentum", "adamw"):
            coded = [t.to(device) for t in (*encoded(first.cpu(), True), *encoded(second.cpu(), False))]
            coded[2 * states(name) :] = [None] * (4 - 2 * states(name))
            kernels.update_8bit_(weight, *coded, gradient, grad, x, STEPS[name])
            results += [weight, *(t for t in coded if t is not None)]
    return results

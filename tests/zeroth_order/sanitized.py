"""Every kernel of the family on small odd shapes, without the library's, for support/sanitized.py."""

import itertools

import torch

from lgkernels.ops.zeroth_order.options import Noise
from tests.support.problems import randn


def run(kernels, device):
    """Calls every function for each law, dtype and number of matrices; returns its results."""
    results = []
    for (outputs, inputs), dtype in itertools.product(((3, 1), (33, 70), (65, 300)), (torch.float32, torch.bfloat16)):
        weight, x = randn(outputs, inputs).to(device, dtype), randn(2, 9, inputs, seed=1).to(device, dtype)
        bias, coefficients = randn(outputs, seed=2).to(device, dtype), torch.tensor([0.5, -0.5], device=device)
        for law, matrices in itertools.product(("uniform", "normal", "uniform8", "sign"), (1, 2)):
            noise = Noise(None, torch.tensor([[5, 6, 7 + i] for i in range(matrices)], device=device), law, 0.7)
            results.append(kernels.perturbed_linear(x, weight, bias, coefficients, noise))
            index = torch.tensor([[0, outputs - 1, 1], [2, 2, 0]], device=device)
            results.append(kernels.perturbed_rows(weight, index, coefficients, noise, dtype))
            kernels.formula_update_(weight, coefficients[:matrices], noise, 0.9)
        results.append(weight)
    return results

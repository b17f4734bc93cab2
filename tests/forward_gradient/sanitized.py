"""Every kernel of the family on small odd shapes, without the library's, for support/sanitized.py."""

import itertools

import torch

from lgkernels.ops.forward_gradient.options import Noise, NormOptions
from tests.support.problems import randn, targets


def run(kernels, device):
    """Calls every function for each size, dtype and way of the noise; returns its results."""
    results = []
    for shape, dtype in itertools.product(
        [(3, 5, 4, 7), (2, 64, 2, 8), (1, 9, 3, 33), (2, 3, 1, 1100)], (torch.float32, torch.bfloat16)
    ):
        x, v = randn(*shape, dtype=dtype).to(device), randn(*shape, seed=1, dtype=dtype).to(device)
        n, patches, groups, channels = shape
        teach, head = randn(n, groups * channels, seed=2).to(device), randn(n, seed=3).to(device)
        grad = randn(n, patches, groups, seed=4).to(device)
        for normed in (None, x):
            results += [
                kernels.pooled(x, normed is not None),
                kernels.tangent(normed, v, teach, head, torch.empty_like(grad)),
                kernels.cotangent(normed, grad, teach, torch.empty_like(x)),
            ]
        state = torch.tensor([5, 1, 2], device=device)
        for dim, noise in itertools.product((3, 1), (Noise(v), Noise(None, state), Noise(None, state, "sign"))):
            options = NormOptions(dim, 1e-5, True)
            coefficient = v.narrow(dim, 0, 1).contiguous()
            results += [
                kernels.dual_norm(x, v, v, noise, options),
                kernels.activity_grad(x, v, coefficient, noise, options),
            ]
    for classes in (7, 300):
        results += kernels.classify(
            randn(5, 24).to(device), randn(24, classes, seed=1).to(device), None, targets(5, classes).to(device)
        )
    return results

"""Every kernel of the family on small odd shapes, without the library's, for support/sanitized.py."""

import itertools

import torch

from tests.support.problems import preactivation, randn, targets


def run(kernels, device):
    """Calls every function for each layout, dtype and mode; returns its results."""
    results, one = [], torch.ones((), device=device)
    for shape, layout, dtype in itertools.product(
        [(3, 5, 7, 7), (2, 16, 8, 8), (1, 72, 9, 8), (2, 4, 40, 70)],
        ("dense", "channels_last"),
        (torch.float32, torch.bfloat16),
    ):
        h, target = preactivation(shape, dtype, layout).to(device), targets(shape[0], 300).to(device)
        results += kernels.local_cross_entropy(h, randn(300, shape[1]).to(device), None, target, 0.1, "mean", True)
        loss, kappa, squares = kernels.goodness(h, target > 5, 2.0, True, True)
        results += [loss, kappa, squares, kernels.goodness_grad(h, kappa, one)]
        loss, grad, mean = kernels.similarity(h, target, 300, True, True)
        results += [loss, grad, mean, kernels.similarity_grad(h, grad, mean, one)]
    results += kernels.similarity(randn(3, 1500).to(device), targets(3, 10).to(device), 10, True, True)[:2]
    return results

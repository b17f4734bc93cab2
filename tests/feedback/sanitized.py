"""Every kernel of the family on small odd shapes, without the library's, for support/sanitized.py."""

import itertools

import torch

from tests.feedback.common import made
from tests.support.problems import randn


def run(kernels, device):
    """Calls every function for each layout, dtype and mode; returns its results."""
    results, state = [], torch.tensor([5, 6, 7], device=device)
    index = torch.tensor([2, 0, 2, 5], device=device)
    for (rows, columns), dtype in itertools.product(((3, 1), (33, 70), (65, 300)), (torch.float32, torch.bfloat16)):
        weight, grad = (randn(*shape, seed=i).to(device, dtype) for i, shape in enumerate(((rows, columns), (9, rows))))
        packed = kernels.pack_signs(weight)
        for signs, law in itertools.product((weight, packed, None), (None, "uniform", "normal", "uniform8", "sign")):
            random = None if law is None else (state, law, 0.7, None)
            formula = made(signs, None, random, 0.5, signs is packed)
            results.append(kernels.matrix((rows, columns), formula, dtype, torch.device(device)))
            results.append(kernels.product(grad, columns, formula))
            if law is not None:
                results.append(kernels.rows(index, columns, made(random=random, scale=0.5), dtype))
    return results

"""Tiny cases of the family's ops for `python -m lgkernels info --selftest`.

`CASES[op](impl, device, dtype)` returns what the op computes, gradients included, from fixed inputs.
"""

import torch

from ..common.selftest import values
from . import autograd
from .options import BlockOptions, HeadOptions


def _target(device):
    return torch.tensor([0, 3, 1], device=device)


def lls_loss(impl, device, dtype):
    kinds = dict(device=device, dtype=dtype)
    results = []
    for waveform in ("square", "cosine"):
        activation = values(3, 5, 7, 6, **kinds).requires_grad_()
        modulation = values(4, 4, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        modulation.requires_grad_()
        options = HeadOptions(4, label_smoothing=0.1)
        loss = autograd.lls_loss(activation, _target(device), modulation, None, waveform, 2, options, impl)
        loss.backward()
        results += [loss.detach(), activation.grad, modulation.grad]
    return results


def lls_block(impl, device, dtype):
    kinds = dict(device=device, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = values(3, 2, 8, 8, **kinds)
    weight = values(5, 2, 3, 3, scale=0.3, **kinds).requires_grad_()
    norm_weight = (1 + 0.1 * torch.arange(5, device=device, dtype=wide)).requires_grad_()
    norm_bias = torch.full((5,), 0.25, device=device, dtype=wide, requires_grad=True)
    options = BlockOptions("square", [1, 1], [1, 1], 0.1, 1e-5, 0.01, True, 4, 2, 0.5, 0.0)
    out, loss = autograd.lls_block(
        x, weight, None, norm_weight, norm_bias, None, None, None, _target(device), options, impl
    )
    loss.backward()
    return [out, loss.detach(), weight.grad, norm_weight.grad, norm_bias.grad]


CASES = {"lls_loss": lls_loss, "lls_block": lls_block}

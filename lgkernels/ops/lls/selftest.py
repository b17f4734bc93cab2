"""Tiny cases of the family's ops for `python -m lgkernels info --selftest`.

`CASES[op](impl, device, dtype)` returns what the op computes, gradients included, from fixed inputs. `ORDINARY`: those
of `verify`, with layers of VGG8 on images of 32 x 32.
"""

import torch

from ..common.selftest import IMAGES, ROWS, Ordinary, arranged, values
from . import autograd
from .options import BlockOptions, HeadOptions


def _target(device):
    return torch.tensor([0, 3, 1], device=device, dtype=torch.int64)


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


def _loss(*shape, pool_size, classes):
    def run(impl, device, dtype, layout):
        activation = arranged(values(*shape, device=device, dtype=dtype), layout).requires_grad_()
        target = torch.arange(shape[0], device=device) % classes
        autograd.lls_loss(activation, target, None, None, "square", pool_size, HeadOptions(classes), impl).backward()

    return Ordinary(IMAGES if len(shape) == 4 else ROWS, run)


def _block(*shape, out_channels, max_pool=False, pool_size=2, classes=10):
    """A convolution of 3 x 3, or a linear layer."""

    def run(impl, device, dtype, layout):
        kernel = (3, 3) if len(shape) == 4 else ()
        x = arranged(values(*shape, device=device, dtype=dtype), layout)
        weight = values(out_channels, shape[1], *kernel, scale=0.05, device=device, dtype=dtype)
        if layout == "channels_last":
            weight = arranged(weight, layout)
        ones, zeros, mean, var = (
            torch.full((out_channels,), n, device=device, dtype=torch.float32) for n in (1.0, 0.0, 0.0, 1.0)
        )
        target = torch.arange(shape[0], device=device) % classes
        geometry = [1, 1] if kernel else []
        options = BlockOptions("square", geometry, geometry, 0.1, 1e-5, 0.01, max_pool, classes, pool_size, 0.5, 0.0)
        leaves = weight.requires_grad_(), None, ones.requires_grad_(), zeros.requires_grad_()
        autograd.lls_block(x, *leaves, None, mean, var, target, options, impl)[1].backward()

    return Ordinary(IMAGES[:2] if len(shape) == 4 else ROWS[:1], run)


ORDINARY = {
    "lls_loss": {
        "128x128x32x32": _loss(128, 128, 32, 32, pool_size=4, classes=10),
        "128x512x8x8, 100 classes": _loss(128, 512, 8, 8, pool_size=2, classes=100),
        "128x1024": _loss(128, 1024, pool_size=1024, classes=10),
    },
    "lls_block": {
        "128x3x32x32 to 128": _block(128, 3, 32, 32, out_channels=128, pool_size=4),
        "128x128x32x32 to 256, max-pool": _block(128, 128, 32, 32, out_channels=256, max_pool=True),
        "128x256x16x16 to 512": _block(128, 256, 16, 16, out_channels=512),
        "128x1024 to 1024": _block(128, 1024, out_channels=1024, pool_size=1024),
    },
}

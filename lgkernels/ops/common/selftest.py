"""Inputs of the families' self-tests: fixed values, rounded to half precision so that every dtype starts alike."""

from collections.abc import Callable
from typing import NamedTuple

import torch

IMAGES = ("contiguous", "channels_last", "strided")
ROWS = ("contiguous", "strided")


class Ordinary(NamedTuple):
    """A case of ordinary sizes for `python -m lgkernels verify`: `ORDINARY[op][sizes in words]` of a self-test."""

    layouts: tuple[str, ...]
    run: Callable  # of (impl, device, dtype, layout)


def arranged(tensor, layout):
    """The same values, laid out in one of IMAGES."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    return torch.stack([tensor, tensor], -1)[..., 0] if layout == "strided" else tensor.contiguous()


def values(*shape, device, dtype, scale=1.0):
    """Standard normal values times `scale`."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32, device="cpu")
    return (made * scale).bfloat16().to(device, dtype)


def leaves(shapes, device, dtype):
    """A tensor that asks for a gradient for each shape."""
    generator = torch.Generator().manual_seed(1)
    made = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes)
    return [t.bfloat16().to(device, dtype).requires_grad_() for t in made]

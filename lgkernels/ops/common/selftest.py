"""Inputs of the families' self-tests: fixed values, rounded to half precision so that every dtype starts alike."""

import torch


def values(*shape, device, dtype, scale=1.0):
    """Standard normal values times `scale`."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)
    return (made * scale).bfloat16().to(device, dtype)


def leaves(shapes, device, dtype):
    """A tensor that asks for a gradient for each shape."""
    generator = torch.Generator().manual_seed(1)
    made = (torch.randn(shape, generator=generator) for shape in shapes)
    return [t.bfloat16().to(device, dtype).requires_grad_() for t in made]

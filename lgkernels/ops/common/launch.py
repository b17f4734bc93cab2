"""Starting a Triton kernel: block sizes, device guard, current stream, and the interpreter on CPU tensors.

`start` and `architecture` are read from this module at every launch, so that a test that puts its own in their place
sees the launches of all families.
"""

from contextlib import nullcontext

import torch

from ...core import dry
from ...core.dispatch import interpreting
from ...core.tiles import architecture, select


def block_count(size, block):
    """How many blocks of `block` elements hold `size` of them."""
    return -(-size // block)


def new(like, *shape):
    """A float32 tensor on the device of `like`, with no values yet."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def configuration(tile, sizes, like, dtype=None):
    """Block sizes, warps and stages by an entry of the family's TILES, for the device and the dtype of `like`."""
    arch = dry.architecture() if like.is_meta else architecture(like.device)
    return select(tile, sizes, dtype or like.dtype, arch)


def start(kernel, programs, device, args, meta):
    """Run `kernel` on `device`'s current stream, or in the interpreter."""
    if device.type == "meta":
        dry.note(kernel, meta)
        return
    if device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f"the triton backend got tensors on {device}: move them to a CUDA device, choose another "
            "impl=, or set TRITON_INTERPRET=1 before triton is imported"
        )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **meta)


def launch(kernel, programs, device, *args, **meta):
    """Run `kernel` on a one-dimensional grid of `programs`; nothing to do where there are none."""
    if programs:
        start(kernel, programs, device, args, meta)

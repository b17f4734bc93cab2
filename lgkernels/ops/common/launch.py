"""Starting a Triton kernel: device guard, current stream, and the interpreter on CPU tensors."""

from contextlib import nullcontext

import torch

from ...core.dispatch import interpreting


def launch(kernel, programs, device, *args, **meta):
    """Run `kernel` on a one-dimensional grid of `programs` on `device`'s current stream."""
    if device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f"the triton backend got tensors on {device}: move them to a CUDA device, choose another "
            "impl=, or set TRITON_INTERPRET=1 before triton is imported"
        )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **meta)

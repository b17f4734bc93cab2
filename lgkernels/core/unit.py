"""The gradient that starts a backward pass: one tensor a device, known by its address.

Whoever receives it can tell that nothing scales it, which on a GPU would else take a synchronisation or, to be safe, a
multiplication by it.
"""

import contextlib

import torch

from .kept import made

_made: dict[torch.device, torch.Tensor] = {}


def one(device):
    kept = _made.get(device)
    if kept is None or kept._version:  # a hook on a loss wrote to its gradient: later passes must not see that
        kept = _made[device] = made(lambda: torch.ones((), dtype=torch.float32, device="cpu"), device)
    return kept


@contextlib.contextmanager
def own(device):
    """Inside, a tensor that nobody else starts from: for a CUDA graph, which reads it at every replay and keeps it."""
    others = _made.pop(device, None)
    try:
        yield (mine := one(device))
        if mine._version:
            raise RuntimeError("a hook writes to the gradient of a loss, which a graph would repeat on what it wrote")
    finally:
        _made.pop(device)
        if others is not None:  # kept alive: a graph that others recorded may read it
            _made[device] = others


def unit_gradient(loss):
    """For `loss.backward(unit_gradient(loss))`: None, torch's own, unless the loss is one float32 number."""
    return one(loss.device) if loss.dim() == 0 and loss.dtype == torch.float32 else None


def is_one(gradient):
    """True where the gradient of a scalar is known to be 1 without waiting for a device."""
    if type(gradient) is not torch.Tensor or gradient.dim() != 0:
        return False
    if not _readable(gradient):
        return gradient.data_ptr() == one(gradient.device).data_ptr()
    try:
        return gradient.item() == 1.0
    except RuntimeError:  # a batch of gradients (is_grads_batched=True) has no single value
        return False


def _readable(gradient):
    return gradient.device.type == "cpu"

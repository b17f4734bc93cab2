"""What a refresh of offsets needs around its passes: a model that is afterwards as it was, and no float16 gradients."""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def untouched(model: nn.Module | Iterable[nn.Module] | None, batch_norm: str) -> Iterator[None]:
    """Restores buffers, modes and random state bit for bit."""
    roots = [] if model is None else [model] if isinstance(model, nn.Module) else model
    modules = [m for root in roots for m in root.modules()]
    names = [(m, dict(m._buffers)) for m in modules]  # a forward may put another tensor in a buffer's place
    buffers = [(b, b.clone()) for m in modules for b in m.buffers(recurse=False)]
    modes = [(m, m.training) for m in modules]
    devices = {b.device for b, _ in buffers} | {p.device for m in modules for p in m.parameters(recurse=False)}
    try:
        with torch.random.fork_rng([d.index for d in devices if d.type == "cuda"]):
            if batch_norm == "eval":
                for m in modules:
                    if isinstance(m, _BatchNorm):
                        m.eval()
            yield
    finally:
        for m, training in modes:
            m.training = training
        for m, own in names:
            m._buffers.clear()
            m._buffers.update(own)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def no_float16(device: str) -> AbstractContextManager:
    """Switches off an autocast whose gradients would want a loss scale."""
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()

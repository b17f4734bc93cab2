"""The registered op of the family offset: one step over all tensors of a device, by the chosen backend."""

import torch
from torch import Tensor

from ...core import dispatch
from ...core.ops import define, require_memory, require_no_overlap
from .options import StepOptions


def kernels_for(params, impl):
    """The backend's module. The kernels take float32 parameters; others, with impl="auto", are for the reference."""
    odd = next((p.dtype for p in params if p.dtype != torch.float32), None)
    if odd is not None and impl == "auto":
        impl = "reference"
    if odd not in (None, torch.float64) and impl not in ("reference", "torch"):
        raise TypeError(f"params must be float32 for impl={impl!r}, got {str(odd)[6:]}; use impl='reference'")
    return dispatch.backend("offset_sgd_", impl, params[0].device, odd or torch.float32)


def changed(tensors):
    """Autograd notices from the version that a tensor which it saved has been written to since."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def check(params, grads, momentum_buffers, offsets, momentum):
    """Every tensor of a parameter must be of its size: the kernels walk through them side by side."""
    names = ("grads", grads), ("momentum_buffers", momentum_buffers if momentum else None), ("offsets", offsets)
    for name, tensors in names:
        if tensors is None:
            continue
        if len(tensors) != len(params):
            raise ValueError(f"{name} must have one entry for each of the {len(params)} params, got {len(tensors)}")
        for i, (param, tensor) in enumerate(zip(params, tensors)):
            if tensor is None or name == "offsets" and not tensor.numel():
                continue
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{name}[{i}] must have shape {tuple(param.shape)} (that of params[{i}]), got {tuple(tensor.shape)}"
                )
            require_memory(name, tensor, params[0].device)
    for name, tensors in (("params", params), ("momentum_buffers", momentum_buffers if momentum else [])):
        for i, tensor in enumerate(tensors):
            require_memory(name, tensor, params[0].device)
            require_no_overlap(f"{name}[{i}]", tensor)
    if momentum:
        for i, (param, buffer) in enumerate(zip(params, momentum_buffers)):
            if buffer.dtype != param.dtype:
                raise TypeError(f"momentum_buffers[{i}] must be {str(param.dtype)[6:]}, got {str(buffer.dtype)[6:]}")


def step(kernels, params, grads, momentum_buffers, offsets, options):
    """`offsets`: None, or an empty tensor, where a parameter has none. Returns what the backend can run again."""
    check(params, grads, momentum_buffers, offsets, options.momentum)
    offsets = [o if o is not None and o.numel() and options.offset_scale else None for o in offsets]
    table = kernels.step_(params, grads, momentum_buffers, offsets, options)
    changed(params)
    changed(momentum_buffers if options.momentum else [])
    return table


@define(
    backends_of="offset_sgd_",
    package=__package__,
    fake=lambda *_: None,
    where=lambda params, *_: (params[0].device if params else torch.device("cpu"), torch.float32),
    mutates=("params", "momentum_buffers"),
    choose=lambda impl, params, *_: kernels_for(params, impl) if params else None,
)
def offset_sgd_(
    kernels,
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    offsets: list[Tensor],
    options: StepOptions,
) -> None:
    if params:
        step(kernels, params, grads, momentum_buffers, offsets, options)


def trusted_kernels(params, grads, momentum_buffers, offsets, options):
    """The backend of a step that somebody else keeps: its kernels where they may be used."""
    kernels = kernels_for(params, "auto")
    flat = params, grads, momentum_buffers, offsets, *options, "auto"
    return offset_sgd_.trusted(kernels, "auto", params[0].device, flat)

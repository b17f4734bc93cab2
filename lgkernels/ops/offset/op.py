"""The registered op of the family offset: one step over all tensors of a device, by the chosen backend."""

import torch

from ...core import dispatch

LIBRARY = torch.library.Library("lgkernels", "FRAGMENT")

dispatch.register(
    "offset_sgd_",
    **{
        name: f"lgkernels.ops.offset.{module}"
        for name, module in (("reference", "reference"), ("cpu", "cpu"), ("triton", "triton"), ("cuda", "cuda"))
    },
)

LIBRARY.define(
    "offset_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] offsets, "
    "float lr, float momentum, float weight_decay, float local_scale, float offset_scale, float grad_scale, "
    "str impl) -> ()"
)


def kernels_for(params, impl):
    """The backend's module. The kernels take float32 parameters; others, with impl="auto", are for the reference."""
    odd = next((p.dtype for p in params if p.dtype != torch.float32), None)
    if odd is not None and impl == "auto":
        impl = "reference"
    if odd not in (None, torch.float64) and impl != "reference":
        raise TypeError(f"params must be float32 for impl={impl!r}, got {str(odd)[6:]}; use impl='reference'")
    return dispatch.backend("offset_sgd_", impl, params[0].device, odd or torch.float32)


def changed(tensors):
    """Autograd notices from the version that a tensor which it saved has been written to since."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def step(
    kernels, params, grads, momentum_buffers, offsets, lr, momentum, weight_decay, local_scale, offset_scale, grad_scale
):
    """`offsets`: None, or an empty tensor, where a parameter has none. Returns what the backend can run again."""
    offsets = [o if o is not None and o.numel() and offset_scale else None for o in offsets]
    table = kernels.step_(
        params, grads, momentum_buffers, offsets, lr, momentum, weight_decay, local_scale, offset_scale, grad_scale
    )
    changed(params)
    changed(momentum_buffers if momentum else [])
    return table


def _step(params, grads, momentum_buffers, offsets, *numbers):
    *numbers, impl = numbers
    if params:
        step(kernels_for(params, impl), params, grads, momentum_buffers, offsets, *numbers)


LIBRARY.impl("offset_sgd_", _step, "CompositeExplicitAutograd")
torch.library.register_fake("lgkernels::offset_sgd_", lambda *arguments: None, lib=LIBRARY)

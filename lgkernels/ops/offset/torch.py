"""The step in plain torch, on any device: as many passes as torch's own foreach step takes, each over all tensors."""

import torch

from . import reference

_HALVES = (torch.bfloat16, torch.float16)


def step_(params, grads, momentum_buffers, offsets, options):
    if not params:
        return
    if any(p.dtype in _HALVES for p in params):  # each pass would round
        return reference.step_(params, grads, momentum_buffers, offsets, options)
    lr, momentum, weight_decay, local_scale, offset_scale, grad_scale = options
    sums, factor = (momentum_buffers, 1.0) if momentum else (params, -lr)
    if momentum:
        torch._foreach_mul_(sums, momentum)
    if weight_decay:
        torch._foreach_add_(sums, params, alpha=factor * weight_decay)  # first: without momentum the sums are params
    torch._foreach_add_(sums, grads, alpha=factor * local_scale * grad_scale)
    tilted = {}  # a list of one dtype is one pass
    for sum_, offset in zip(sums, offsets):
        if offset is not None and offset_scale:
            own, of_dtype = tilted.setdefault(offset.dtype, ([], []))
            own.append(sum_)
            of_dtype.append(offset)
    for own, of_dtype in tilted.values():
        torch._foreach_add_(own, of_dtype, alpha=factor * offset_scale)
    if momentum:
        torch._foreach_add_(params, sums, alpha=-lr)

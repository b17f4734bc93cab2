"""The step in plain torch: the definition that every other backend is tested against. Any device and dtype."""

import torch

from ...core.ops import wide_dtype


def step_(params, grads, momentum_buffers, offsets, options):
    """In place, for lists of tensors of one device:

        g = local_scale * grad_scale * grad + offset_scale * offset + weight_decay * w
        v = momentum * v + g;  w = w - lr * v        (momentum 0: w - lr * g, and momentum_buffers is empty)

    An offset of None counts as 0. With `offset_scale` 0, no offset is read. Of half parameters g and v are float32, and
    what is stored is rounded once.
    """
    if not params:
        return
    lr, momentum, weight_decay, local_scale, offset_scale, grad_scale = options

    def wider(tensors):
        return [t.to(wide_dtype(p.dtype)) for p, t in zip(params, tensors)]

    velocity = torch._foreach_mul(wider(grads), local_scale * grad_scale)
    tilted = [(v, o.to(v.dtype)) for v, o in zip(velocity, offsets) if o is not None and offset_scale]
    if tilted:
        torch._foreach_add_(*map(list, zip(*tilted)), alpha=offset_scale)
    if weight_decay:
        torch._foreach_add_(velocity, wider(params), alpha=weight_decay)
    if momentum:
        torch._foreach_add_(velocity, wider(momentum_buffers), alpha=momentum)
        torch._foreach_copy_(momentum_buffers, velocity)
    torch._foreach_add_(params, velocity, alpha=-lr)

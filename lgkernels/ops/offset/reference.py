"""The step in plain torch: the definition that every other backend is tested against. Any device and dtype."""

import torch


def step_(
    params, grads, momentum_buffers, offsets, lr, momentum, weight_decay, local_scale, offset_scale, grad_scale=1.0
):
    """In place, for lists of tensors of one device:

        g = local_scale * grad_scale * grad + offset_scale * offset + weight_decay * w
        v = momentum * v + g;  w = w - lr * v        (momentum 0: w - lr * g, and momentum_buffers is empty)

    An offset of None counts as 0. With `offset_scale` 0, no offset is read.
    """
    if not params:
        return
    scale = local_scale * grad_scale
    if momentum:
        velocity = momentum_buffers
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, grads, alpha=scale)
    else:
        velocity = torch._foreach_mul(grads, scale)
    tilted = [(v, o.to(v.dtype)) for v, o in zip(velocity, offsets) if o is not None and offset_scale]
    if tilted:
        torch._foreach_add_(*map(list, zip(*tilted)), alpha=offset_scale)
    if weight_decay:
        torch._foreach_add_(velocity, params, alpha=weight_decay)
    torch._foreach_add_(params, velocity, alpha=-lr)

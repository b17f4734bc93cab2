"""The fused step as an expert writes it in plain torch, on any device: reference.py's, in few passes."""

import torch

from ...core.ops import wide_dtype
from . import blocks, reference


def _product(gradient, left, x, scale):
    """scale * (left @ x + gradient), the caller's own."""
    if gradient is not None:
        return torch.addmm(gradient, left, x, beta=scale, alpha=scale)
    return left @ x if scale == 1.0 else torch.addmm(left.new_empty(()), left, x, beta=0, alpha=scale)


def _sgd_in_place(weight, first, left, x, rule):
    """Without a gradient of its own: the product is added where it belongs."""
    if first is None:
        decay = rule.keep - rule.lr * rule.weight_decay
        weight.addmm_(left, x, beta=decay, alpha=-rule.lr * rule.grad_scale)
        return
    first.addmm_(left, x, beta=rule.momentum, alpha=rule.fresh * rule.grad_scale)
    if rule.weight_decay:
        first.add_(weight, alpha=rule.fresh * rule.weight_decay)
    if rule.keep != 1.0:
        weight.mul_(rule.keep)
    weight.add_(first, alpha=-rule.lr)


def update_(weight, first, second, gradient, grad, x, rule):
    if weight.dtype != wide_dtype(weight.dtype):  # each pass would round
        return reference.update_(weight, first, second, gradient, grad, x, rule)
    left, x, clipped = grad.to(weight.dtype).t(), x.to(weight.dtype), rule.clip_value != float("inf")
    if gradient is None and rule.rule == "sgd" and not (rule.nesterov or clipped):
        return _sgd_in_place(weight, first, left, x, rule)
    g = _product(gradient, left, x, rule.grad_scale)
    if clipped:
        g.clamp_(-rule.clip_value, rule.clip_value)
    if rule.rule == "manhattan":
        g.sign_()
    if rule.weight_decay:
        g.add_(weight, alpha=rule.weight_decay)
    if first is not None:
        first.mul_(rule.momentum).add_(g, alpha=rule.fresh)
    if rule.keep != 1.0:
        weight.mul_(rule.keep)
    if rule.rule == "adam":
        second.mul_(rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
        torch.sqrt(second, out=g)
        weight.addcdiv_(first, g.div_(rule.root).add_(rule.eps), value=-rule.lr)
        return None
    if first is not None:
        g = g.add_(first, alpha=rule.momentum) if rule.nesterov else first
    weight.add_(g, alpha=-rule.lr)
    return None


_PART = 1 << 20  # entries of the states that are there in full at once


def update_8bit_(weight, first, first_max, second, second_max, gradient, grad, x, rule):
    (rows, columns), dtype = weight.shape, wide_dtype(weight.dtype)
    step = max(1, _PART // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        states = [(first[part], first_max[part], True)]
        if second is not None:
            states.append((second[part], second_max[part], False))
        wide = [blocks.decoded(*state, dtype) for state in states]
        own = weight[part], wide[0], wide[1] if second is not None else None
        update_(*own, gradient if gradient is None else gradient[part], grad[:, part], x, rule)
        for (codes, absmax, signed), state in zip(states, wide):
            blocks.encode_(codes, absmax, signed, state)

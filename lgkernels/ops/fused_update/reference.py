"""The fused step in plain torch: the definition that every other backend is tested against.

Any device; float32 arithmetic, float64 where `weight` is float64.
"""

from ...core.ops import wide_dtype
from . import blocks


def update_(weight, first, second, gradient, grad, x, rule):
    """One optimizer step along grad^T x (+ `gradient`), in place.

        g = clip(grad_scale * (grad^T x + gradient), +-clip_value);  manhattan: g = sign(g);  g += weight_decay * W
        m = momentum * m + fresh * g                             (`first`; None: there is none, and m is g)
        adam: v = beta2 * v + (1 - beta2) * g^2                  (`second`)
        W = keep * W - lr * (nesterov: g + momentum * m | adam: m / (sqrt(v) / root + eps) | m)

    weight, first, second, gradient (N, K) of one dtype, the last three or None; grad (M, N), x (M, K). `first` is
    momentum_buffer, or exp_avg of Adam, and `second` exp_avg_sq. torch.optim.SGD's first step with momentum sets m = g:
    pass a zero buffer and fresh = 1. A clip_value of inf lets NaN through as it is.
    """
    dtype = wide_dtype(weight.dtype)
    g = grad.to(dtype).t() @ x.to(dtype)
    if gradient is not None:
        g = g + gradient.to(dtype)
    g = (g * rule.grad_scale).clamp(-rule.clip_value, rule.clip_value)
    if rule.rule == "manhattan":
        g = g.sign()
    old = weight.to(dtype)
    step = g = g + rule.weight_decay * old
    if first is not None:
        m = rule.momentum * first.to(dtype) + rule.fresh * g
        first.copy_(m)
        step = g + rule.momentum * m if rule.nesterov else m
    if rule.rule == "adam":
        v = rule.beta2 * second.to(dtype) + (1 - rule.beta2) * g * g
        second.copy_(v)
        step = m / (v.sqrt() / rule.root + rule.eps)
    weight.copy_(rule.keep * old - rule.lr * step)


def update_8bit_(weight, first, first_max, second, second_max, gradient, grad, x, rule):
    """The same with states of 8 bits (`blocks.py`): the step goes by the new states before they are rounded.

    first, second (N, K) uint8, the latter of Adam alone, else None; first_max, second_max (N, ceil(K / 256)).
    """
    dtype, pairs = wide_dtype(weight.dtype), ((first, first_max, True), (second, second_max, False))
    wide = [c if c is None else blocks.decoded(c, absmax, signed, dtype) for c, absmax, signed in pairs]
    update_(weight, *wide, gradient, grad, x, rule)
    for (codes, absmax, signed), state in zip(pairs, wide):
        if state is not None:
            blocks.encode_(codes, absmax, signed, state)

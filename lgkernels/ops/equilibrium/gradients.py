"""Gradients of the weights from an error e: (1/B) sum_b (dF/dtheta)^T e_b at the free state, in closed form.

dense edge a -> b      W: r_a^T e_b,  bias: sum e_b                                  the input's with x for r_a
conv, a < b            the VJP of P at r_a with cotangent e_b
conv, a > b            the gradient of <e_b, DP(r_b)^T r_a>: two products, of e_b and of r_b
readout                that of the mean cross entropy
"""

import torch
import torch.nn.functional as F

from ...core.ops import wide, without_autocast
from .activations import activity
from .network import READOUT
from .pool import curved, pooled, scattered, windows


def _weight_grad(x, cotangent, weight, padding):
    """Of conv2d(x, weight)."""
    return torch.ops.aten.convolution_backward(
        cotangent, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]


def _up(r, weight, bias, e, padding):
    """Gradients of the kernel and the bias of pool(conv(r) + bias)."""
    z = F.conv2d(r, weight, bias, padding=padding)
    back = scattered(pooled(z)[2] * e.unsqueeze(-1), z)
    return _weight_grad(r, back, weight, padding), back.sum((0, 2, 3))


def _down(low, high, weight, e, padding):
    """Of <e, DP(low)^T high>."""
    z, moved = F.conv2d(low, weight, padding=padding), windows(F.conv2d(e, weight, padding=padding))
    _, p, q = pooled(z)
    high = high.unsqueeze(-1)
    by_e, by_low = scattered(high * q, z), scattered(high * curved(moved, p, q), z)
    return _weight_grad(e, by_e, weight, padding) + _weight_grad(low, by_low, weight, padding)


@torch.no_grad()
def gradients(weights, found, x, target, state, error, activation, loss):
    """A dict as `weights`."""
    with without_autocast(x.device):
        x, samples = wide(x), max(len(x), 1)
        r = [activity(wide(v), activation) for v in state]
        e = [wide(v) / samples for v in error]
        grads = {}
        edges = [(f"in-{found.names[b]}", -1, b) for b in found.inputs] + [(found.key(t), *t) for t in found.edges]
        for key, a, b in edges:
            weight, bias = wide(weights[f"{key}/kernel"]), weights.get(f"{key}/bias")
            before, padding = x if a < 0 else r[a], 0 if max(a, b) == len(r) - 1 else 1
            if not found.conv:
                made = before.t() @ e[b], e[b].sum(0)
            elif a < b:
                made = _up(before, weight, None if bias is None else wide(bias), e[b], padding)
            else:
                made = _down(r[b], before, weight, e[b], padding), None
            grads[f"{key}/kernel"], grads[f"{key}/bias"] = made
        if found.readout:
            grads |= _readout(weights, r[-1].flatten(1), target, loss)
        return {key: grads[key].to(value.dtype) for key, value in weights.items()}


def _readout(weights, r, target, loss):
    """Of cross entropy. A squared error is taken of the last layer itself: the readout learns nothing."""
    kernel, bias = wide(weights[f"{READOUT}/kernel"]), weights.get(f"{READOUT}/bias")
    if loss == "mse":
        return {f"{READOUT}/kernel": torch.zeros_like(kernel), f"{READOUT}/bias": kernel.new_zeros(kernel.shape[1])}
    z = r @ kernel if bias is None else r @ kernel + wide(bias)
    delta = (torch.softmax(z, 1) - target) / max(len(r), 1)
    return {f"{READOUT}/kernel": r.t() @ delta, f"{READOUT}/bias": delta.sum(0)}

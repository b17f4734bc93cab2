"""Convolutional nets on CPUs, of real phases: edges between layers of whole vectors by the kernels of pooled_cpu.py."""

from functools import partial

import torch

from . import pooled_cpu
from .field import Packed, edge, force
from .field import settle as run


def takes(state, drive, net, phases):
    """Whether some edge is for the kernels, and all is as they want it."""
    tensors = [*state, *drive, *net.weights, *net.biases]
    return (
        phases.real_phases == phases.many
        and all(v.numel() and v.dtype == torch.float32 for v in tensors)
        and any(map(pooled_cpu.takes, net.weights))
    )


def settle(state, drive, net, target, phases, options):
    values = Packed(phases, len(state[0]) // phases.rows, state[0])
    panels = {
        (a, b): pooled_cpu.panels(w, net.padding(a, b), "softmax") for a, b, w, _ in net.routes() if pooled_cpu.takes(w)
    }
    state, drive = ([v.contiguous(memory_format=torch.channels_last) for v in part] for part in (state, drive))
    u, *report = run(net, drive, state, target, options, values, partial(_step, panels))
    return [v.contiguous() for v in u], *report


def _term(panels, net, a, b, weight, bias, r, values):
    made = panels.get((a, b))
    if made is None:
        return edge(net, a, b, weight, bias, r, values)
    value, slopes = pooled_cpu.up(made, r[min(a, b)])
    if a > b:
        return pooled_cpu.down(made, slopes, r[b], r[a])
    return value if bias is None else value.add_(bias.view(-1, 1, 1))  # one number a window: outside of the pool too


def _step(panels, net, drive, r, target, loss, values, layers):
    states, routes = [], net.routes()
    for b in layers:
        terms = [_term(panels, net, a, c, w, bias, r, values) for a, c, w, bias in routes if c == b]
        u = sum(terms[1:], terms[0]) if terms else torch.zeros_like(r[b])
        u = values.shifted(u, drive[b]) if b < len(drive) else u
        if b == net.layers - 1 and target is not None:
            u = values.nudged(u, values.pointwise(lambda r: force(net, r, target, loss), r[b]))
        states.append(u)
    return states

"""The family in plain torch with few operations: all phases in the rows of one real product an edge.

A complex state times a real weight is one product of stacked rows, real and imaginary; the input's part is copied in.
"""

from functools import partial

import torch

from . import energy, energy_torch, reference
from .energy_torch import gradients as energy_gradients
from .field import Packed, force
from .field import settle as run
from .options import one_phase

__all__ = ["by_phase", "energy_gradients", "energy_phases", "error", "homeostasis", "settle"]

energy_phases = partial(energy.phases, settle=energy_torch.settle, prepare=energy_torch.prepare)


def settle(state, drive, net, target, phases, options):
    if options.tolerance is not None and phases.many > 1:
        return by_phase(settle, state, drive, net, target, phases, options)
    values = Packed(phases, len(state[0]) // max(phases.rows, 1), state[0])
    if state[0].dim() != 2:
        return run(net, drive, state, target, options, values)
    rows = [values.rows_of(v) for v in drive]
    return run(net, rows, state, target, options, values, _dense_step)


def by_phase(settle, state, drive, net, target, phases, options):
    """One phase after the other, for each of them stops by itself."""
    samples, results, row = len(state[0]) // phases.rows, [], 0
    for k, beta in enumerate(phases.betas):
        own = one_phase(beta.real if k < phases.real_phases else beta)
        part = [u[row : row + own.rows * samples] for u in state]
        results.append(settle(part, drive, net, target, own, options))
        row += own.rows * samples
    states, *reports = zip(*results)
    return [torch.cat(rows) for rows in zip(*states)], *(torch.cat(parts) for parts in reports)


def _dense_step(net, drive, r, target, loss, values, layers):
    states, edges = [], net.routes()
    for b in layers:
        u = drive[b] if b < len(drive) else torch.zeros_like(r[b])
        for a, c, weight, _ in edges:
            if c == b:
                u = torch.addmm(u, r[a], weight)
        if b == net.layers - 1 and target is not None:
            u = values.nudged(u, values.pointwise(lambda r: force(net, r, target, loss), r[b]))
        states.append(u)
    return states


def error(state, drive, net, target, beta, points, options):
    return reference.error(state, drive, net, target, beta, points, options, settle)


def homeostasis(weights, eps, edges, sizes, estimator):
    """By edges: two products for J, two for J^T, and one of reduction length K a gradient."""
    pairs = list(zip(edges[::2], edges[1::2]))
    n = sum(sizes)
    if estimator == "exact":
        at = dict(zip(pairs, weights))
        skew = [w - at[b, a].t() if (b, a) in at else w for (a, b), w in zip(pairs, weights)]
        paired = [(b, a) in at for a, b in pairs]
        loss = sum(torch.dot(s.reshape(-1), s.reshape(-1)) * (0.5 if p else 1.0) for s, p in zip(skew, paired))
        return loss / n, [s * (2 / n) for s in skew]
    many = len(eps[0])

    def product(e, transposed):
        out = [-v for v in e]
        for (a, b), w in zip(pairs, weights):
            if transposed:
                out[a] = torch.addmm(out[a], e[b], w.t())
            else:
                out[b] = torch.addmm(out[b], e[a], w)
        return out

    v, w = product(eps, False), product(eps, True)
    if estimator == "symmetric":
        left = right = [x - y for x, y in zip(v, w)]
        loss = sum(x.square().sum() for x in left) / 2
    else:
        left, right = [2 * x - y for x, y in zip(v, w)], v
        # <eps, J v> = <w, v>
        loss = sum((x * (x - y)).sum() for x, y in zip(v, w))
    before = [torch.cat((e, -x)) for e, x in zip(eps, right)]
    after = [torch.cat((x, e)) for e, x in zip(eps, left)]
    return loss / (many * n), [before[a].t() @ after[b] / (many * n) for a, b in pairs]

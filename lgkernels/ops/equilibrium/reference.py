"""The definition of the family: generalised holomorphic equilibrium propagation (Laborieux & Zenke, ICLR 2024).

Plain torch, phase after phase, complex numbers as complex numbers. A backend has the functions `settle`, `error` and
`homeostasis`, with these arguments and results; `field.py` says what a net is and how it moves. Nets with an energy,
whose `energy_phases` and `energy_gradients` plain torch and the CPU have, are defined in `energy.py`.
"""

import torch

from .activations import activity, slope
from .energy import gradients as energy_gradients
from .energy import phases as energy_phases
from .field import Arithmetic, Packed, field, field_tangent, force
from .field import settle as run
from .options import circle

__all__ = ["energy_gradients", "energy_phases", "error", "homeostasis", "settle"]


def settle(state, drive, net, target, phases, options):
    """`(states, steps, residual, orbit)` after `options.steps` steps from `state`, each u <- H(phi(u)) + beta dL/dr.

    state: for each layer (R, *) rows, as `Phases` lays them out for B samples. drive: the input's constant part of
    the first layers, (B, *) each. target: (B, C) or None where no phase is nudged. With the schedule "asynchronous"
    a step moves the layers 0, 2, ... and then, by their new activities, 1, 3, ...

    steps (P, B): steps until the sample had settled (all of them where there is no tolerance); residual, orbit (P, B):
    norms of u_t - u_(t-1) and u_t - u_(t-2) over all layers at the end.
    """
    samples = len(state[0]) // max(phases.rows, 1)
    settled, reports, row = [], [], 0
    for k, beta in enumerate(phases.betas):
        many = samples if k < phases.real_phases else 2 * samples
        own = [u[row : row + many] for u in state]
        if k >= phases.real_phases:
            own = [torch.complex(*u.unflatten(0, (2, samples)).unbind(0)) for u in own]
        values = Arithmetic(beta if own[0].is_complex() else beta.real)
        u, *report = run(net, drive, own, target, options, values)
        settled.append([torch.view_as_real(v).movedim(-1, 0).flatten(0, 1) if v.is_complex() else v for v in u])
        reports.append(report)
        row += many
    states = [torch.cat(rows) for rows in zip(*settled)]
    return states, *(torch.cat(parts) for parts in zip(*reports))


def tangent(state, drive, net, target, options):
    """`(e, residual (1, B))`: d phi(u_T) / d beta at beta = 0, of T steps that start at `state`, which is fixed."""
    values, u, moved = Arithmetic(), list(state), state
    w = [torch.zeros_like(v) for v in u]
    for _ in range(options.steps):
        r = [activity(v, options.activation) for v in u]
        w = field_tangent(net, r, [slope(v, options.activation) * d for v, d in zip(u, w)])
        w[-1] = w[-1] + force(net, r[-1], target, options.loss)
        moved, u = u, field(net, drive, r, None, options.loss, values)
    residual = values.squares([v - m for v, m in zip(u, moved)]).sqrt()
    return [slope(v, options.activation) * d for v, d in zip(u, w)], residual


def error(state, drive, net, target, beta, points, options, settle=settle):
    """`(e, residual (P, B))`: the derivative of the equilibrium's activities by beta, from N points on a circle.

        e = (1/N) sum_k phi(u_k) / beta_k,   beta_k = beta exp(2 pi i k / N)

    u_k: `options.steps` steps from the free state. By u(conj beta) = conj u(beta) half of the points do. N = 1: against
    the free state. N = 0: the derivative itself, along those steps. A sum over a circle of N points is wrong by terms
    of order beta^N.
    """
    if points == 0:
        return tangent(state, drive, net, target, options)
    phases, samples = circle(beta, points), len(state[0])
    values = Packed(phases, samples, state[0])
    rows = [values.rows_of(v) for v in state]
    u, _, residual, _ = settle(rows, drive, net, target, phases, options)
    return [values.fourier(v, s, points, options.activation) for v, s in zip(u, state)], residual


def homeostasis(weights, eps, edges, sizes, estimator):
    """`(loss, gradients of the weights)` of a dense net's homeostatic loss, per state.

    J = W - 1 is the Jacobian of the field by the activities, v = J eps, w = J^T eps, eps (K, n) standard normal:

        paper       <v, v> - <eps, J v>, the mean over eps          (may be negative)
        symmetric   <v - w, v - w> / 2, the mean over eps
        exact       |J - J^T|^2 / 2, which is the expectation of both; eps is None
    """
    n = sum(sizes)
    offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    blocks = [
        (slice(*offsets[b : b + 2]), slice(*offsets[a : a + 2])) for a, b in zip(edges[::2], edges[1::2])
    ]  # J[post, pre]
    jacobian = -torch.eye(n, dtype=weights[0].dtype, device=weights[0].device)
    for block, w in zip(blocks, weights):
        jacobian[block] += w.t()
    if estimator == "exact":
        skew = jacobian - jacobian.t()
        loss, grad = skew.square().sum() / 2, 2 * skew
    else:
        e = torch.cat(eps, -1)
        v, w, many = e @ jacobian.t(), e @ jacobian, len(e)
        if estimator == "paper":
            loss = (v.square().sum() - (e * (v @ jacobian.t())).sum()) / many
            grad = ((2 * v - w).t() @ e - e.t() @ v) / many
        else:
            a = v - w
            loss, grad = a.square().sum() / 2 / many, (a.t() @ e - e.t() @ a) / many
    return loss / n, [grad[block].t() / n for block in blocks]

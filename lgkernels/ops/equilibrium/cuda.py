"""Dense nets on the CUDA C++ kernel in csrc/equilibrium/cuda: the functions of `reference.py`, float32.

All steps of all phases are one launch on the current stream, and nothing synchronises; with a tolerance each step is a
launch, and the host looks at every one. Plain torch's: conv nets, the homeostatic loss, empty batches, and nets with
more units than a block's shared memory holds.
"""

import torch

from ..common.cuda import address, call
from . import reference
from . import torch as lean
from .dense_net import dense_net
from .loop import repeated
from .torch import by_phase, homeostasis

__all__ = ["error", "homeostasis", "settle"]

_MOST_LAYERS, _MOST_EDGES, _MOST_PHASES = 8, 16, 16  # kernels.h
_SHARED, _THREADS = 48 * 1024, 512  # bytes of a block of two rows, which is the least


def _by_kernel(state, net, target, many):
    if state[0].dim() != 2 or not all(v.numel() for v in state):
        return False
    nudge = 0 if target is None else target.shape[1]
    floats = 2 * (2 * sum(v.shape[1] for v in state) + nudge + _THREADS)
    counts = len(state) <= _MOST_LAYERS and len(net.weights) <= _MOST_EDGES and many <= _MOST_PHASES
    return counts and 4 * floats <= _SHARED


def _run(state, drive, net, target, phases, options):
    """`(results, residual, orbit)`; phases: `(samples, real ones, Re of beta, Im of beta, tangent)`."""
    samples, real, betas, _, tangent = phases
    dense = dense_net(state, drive, net, target)
    like, many = dense.results[0], len(betas)
    residual, orbit = (like.new_empty(many, samples) for _ in range(2))
    rows = samples * (2 * many - (0 if tangent else real))
    scratch = like.new_empty(2 if options.steps > 1 else 0, rows, sum(v.shape[1] for v in dense.results))
    call(
        "equilibrium_settle",
        like.device,
        dense.layers,
        dense.edges,
        dense.readout,
        phases,
        (*options[:4], -1.0),
        tuple(map(address, (residual, orbit, scratch))),
    )
    return dense.results, residual, orbit


def _step_by_step(state, drive, net, target, phases, options):
    """With a tolerance: a launch each step, and a look at how far it went. `(results, steps, residual, orbit)`"""
    one, states, moves = options._replace(steps=1, tolerance=None), [state], []

    def step(t):
        results, residual, _ = _run(states[-1], drive, net, target, phases, one)
        moves[:] = [residual]
        states[:] = [*states[-2:], results]

    def moved(t, back):
        if back == 1:
            return moves[0]
        squares = sum((a - b).square().sum(1) for a, b in zip(states[-1], states[-3]))
        return squares.unflatten(0, (-1, phases[0])).sum(0, keepdim=True).sqrt()

    like = state[0].new_empty(1, phases[0], dtype=torch.float32)
    _, *report = repeated(step, moved, options, like)
    return [v.clone() if v is u else v for v, u in zip(states[-1], state)], *report


def settle(state, drive, net, target, phases, options):
    if not _by_kernel(state, net, target, phases.many):
        return lean.settle(state, drive, net, target, phases, options)
    if options.tolerance is not None and phases.many > 1:
        return by_phase(settle, state, drive, net, target, phases, options)
    samples = len(state[0]) // phases.rows
    own = samples, phases.real_phases, phases.beta_real, phases.beta_imag, False
    if options.tolerance is None:
        results, residual, orbit = _run(state, drive, net, target, own, options)
        steps = torch.full_like(residual, options.steps, dtype=torch.int64)
    else:
        results, steps, residual, orbit = _step_by_step(state, drive, net, target, own, options)
    dtype = state[0].dtype
    return [v.to(dtype) for v in results], steps, residual.to(dtype), orbit.to(dtype)


def error(state, drive, net, target, beta, points, options):
    if points or not _by_kernel(state, net, target, 1):
        return reference.error(state, drive, net, target, beta, points, options, settle)
    options = options._replace(schedule="synchronous", tolerance=None)
    e, residual, _ = _run(state, drive, net, target, (len(state[0]), 0, [0.0], [0.0], True), options)
    return [v.to(state[0].dtype) for v in e], residual.to(state[0].dtype)

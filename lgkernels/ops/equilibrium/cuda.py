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
from .options import circle, one_phase, shares
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


def _run(state, drive, net, target, phases, options, wanted="states", shares=()):
    """`(results, residual, orbit)`; wanted: StateWanted of options.h."""
    dense = dense_net(state, drive, net, target)
    like, many, samples = dense.results[0], phases.many, len(drive[0])
    residual, orbit = (like.new_empty(many, samples) for _ in range(2))
    rows = samples * (phases.rows + (wanted == "tangent"))
    used = options.steps > 1 or wanted == "error"
    scratch = like.new_empty(2 if used else 0, rows, sum(v.shape[1] for v in dense.results))
    real, imag = [share.real for share in shares], [share.imag for share in shares]
    call(
        "equilibrium_settle",
        like.device,
        dense.layers,
        dense.edges,
        dense.readout,
        (samples, phases.real_phases, phases.beta_real, phases.beta_imag, real, imag, wanted),
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
        return squares.unflatten(0, (-1, samples)).sum(0, keepdim=True).sqrt()

    samples = len(drive[0])
    like = state[0].new_empty(1, samples, dtype=torch.float32)
    _, *report = repeated(step, moved, options, like)
    return [v.clone() if v is u else v for v, u in zip(states[-1], state)], *report


def settle(state, drive, net, target, phases, options):
    if not _by_kernel(state, net, target, phases.many):
        return lean.settle(state, drive, net, target, phases, options)
    if options.tolerance is not None and phases.many > 1:
        return by_phase(settle, state, drive, net, target, phases, options)
    if options.tolerance is None:
        results, residual, orbit = _run(state, drive, net, target, phases, options)
        steps = torch.full_like(residual, options.steps, dtype=torch.int64)
    else:
        results, steps, residual, orbit = _step_by_step(state, drive, net, target, phases, options)
    dtype = state[0].dtype
    return [v.to(dtype) for v in results], steps, residual.to(dtype), orbit.to(dtype)


def error(state, drive, net, target, beta, points, options):
    phases = circle(beta, points) if points else one_phase(0.0)
    if not _by_kernel(state, net, target, phases.many) or points and options.tolerance is not None:
        return reference.error(state, drive, net, target, beta, points, options, settle)
    if points:
        own = options, "error", shares(phases, points)
    else:
        own = options._replace(schedule="synchronous", tolerance=None), "tangent"
    e, residual, _ = _run(state, drive, net, target, phases, *own)
    return [v.to(state[0].dtype) for v in e], residual.to(state[0].dtype)

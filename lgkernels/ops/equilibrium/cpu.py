"""Nets over the C++ kernels in csrc/equilibrium/cpu: the functions of `reference.py`, float32.

Dense nets settle in them; of convolutional nets (conv_cpu.py) and energies (energy_cpu.py) they make the pooled
convolutions of real phases. The homeostatic loss and empty batches are plain torch's. A row's result depends neither on
the rows beside it nor on the number of threads.
"""

from functools import partial

import torch

from ...core.native import cpu_entries, threads
from ..common.cpu import address, floats
from . import conv_cpu, energy, energy_cpu, reference
from . import torch as lean
from .dense_net import dense_net
from .options import circle, one_phase, shares
from .torch import by_phase, energy_gradients, homeostasis

__all__ = ["energy_gradients", "energy_phases", "error", "homeostasis", "settle"]

energy_phases = partial(energy.phases, settle=energy_cpu.settle, prepare=energy_cpu.prepare)

_C = cpu_entries()


def _by_kernel(state):
    return state[0].dim() == 2 and all(v.numel() for v in state)


def _pairs(numbers):
    """(numbers, Re and Im)"""
    return torch.tensor([[n.real, n.imag] for n in numbers], dtype=torch.float32, device="cpu")


def _run(state, drive, net, target, phases, options, wanted, shares=()):
    """`(results, steps, residual, orbit)`; wanted: StateWanted of options.h."""
    samples, many = len(drive[0]), phases.many
    dense = dense_net(state, drive, net, target)
    beta, share = _pairs(phases.betas), _pairs(shares)
    steps = torch.empty(many, samples, dtype=torch.int64, device="cpu")
    residual, orbit = (floats(many, samples) for _ in range(2))
    tolerance = -1.0 if options.tolerance is None else options.tolerance
    _C.equilibrium_settle(
        dense.layers,
        dense.edges,
        dense.readout,
        (samples, many, phases.real_phases, address(beta), address(share), wanted),
        (*options[:4], tolerance),
        tuple(map(address, (steps, residual, orbit))),
        threads(),
    )
    dtype = state[0].dtype
    return [v.to(u.dtype) for v, u in zip(dense.results, state)], steps, residual.to(dtype), orbit.to(dtype)


def settle(state, drive, net, target, phases, options):
    if options.tolerance is not None and phases.many > 1:
        return by_phase(settle, state, drive, net, target, phases, options)
    if state[0].dim() == 4 and conv_cpu.takes(state, drive, net, phases):
        return conv_cpu.settle(state, drive, net, target, phases, options)
    if not _by_kernel(state):
        return lean.settle(state, drive, net, target, phases, options)
    return _run(state, drive, net, target, phases, options, "states")


def error(state, drive, net, target, beta, points, options):
    if not _by_kernel(state) or points and options.tolerance is not None:
        return reference.error(state, drive, net, target, beta, points, options, settle)
    if points:
        phases = circle(beta, points)
        own = options, "error", shares(phases, points)
    else:
        phases = one_phase(0j)
        own = options._replace(schedule="synchronous", tolerance=None), "tangent"
    e, _, residual, _ = _run(state, drive, net, target, phases, *own)
    return e, residual

"""Tiny cases of the family's ops for `python -m lgkernels info --selftest`.

`CASES[op](impl, device, dtype)` returns what the op computes, gradients included, from fixed inputs.
`ORDINARY`: those of `verify`.
"""

import torch

from ..common.selftest import ROWS, Ordinary, arranged, leaves, values
from . import op  # noqa: F401  registers the ops

_ops = torch.ops.lgkernels
_EDGES, _OPTIONS = [0, 1, 1, 0], ("sigmoid", "cross_entropy", "synchronous", 3, None)


def _net(device, dtype, sizes=(6, 4), classes=5):
    (first, last), scale = sizes, 0.3
    shapes = (first, last), (last, first), (last, classes), (classes,)
    up, down, readout, bias = (values(*s, device=device, dtype=dtype, scale=scale) for s in shapes)
    return [up, down], [], readout, bias, _EDGES, 2


def _states(device, dtype, samples, sizes=(6, 4)):
    return [values(samples, n, device=device, dtype=dtype) for n in sizes]


def _settle(impl, device, dtype):
    dtype = torch.promote_types(dtype, torch.float32)
    drive, state = _states(device, dtype, 3), _states(device, dtype, 9)
    target, net = values(3, 5, device=device, dtype=dtype), _net(device, dtype)
    u, steps, residual, orbit = _ops.equilibrium_settle(
        state, drive, *net, target, [0.2, 0.0], [0.0, 0.2], 1, *_OPTIONS, impl
    )
    results = [*u, steps.to(dtype), residual, orbit]
    for points in (0, 4):
        e, residual = _ops.equilibrium_error(drive, drive, *net, target, 0.2, points, *_OPTIONS, impl)
        results += [*e, residual]
    return results


def _homeostasis(impl, device, dtype):
    dtype = torch.promote_types(dtype, torch.float32)
    weights = [t.detach() for t in leaves(((6, 4), (4, 6)), device, dtype)]
    results = []
    for estimator in ("paper", "symmetric", "exact"):
        eps = [] if estimator == "exact" else _states(device, dtype, 8)
        loss, grads = _ops.equilibrium_homeostasis(weights, eps, _EDGES, [6, 4], estimator, impl)
        results += [loss, *grads]
    return results


def _energy(impl, device, dtype):
    """Images through each kind of pool, layers of whole vectors, dense ones, a skip."""
    dtype = torch.promote_types(dtype, torch.float32)
    shapes = [(2, 16, 2, 2), (2, 16, 1, 1), (2, 6), (2, 5)]
    kernels, biases = [(16, 16, 3, 3), (16, 16, 3, 3), (16, 6), (6, 5), (16, 5)], [(16,), (16,), (6,), (5,)]
    own = dict(device=device, dtype=dtype)
    x, target, results = values(2, 16, 5, 5, **own), values(2, 5, **own), []
    weights = [[values(*s, scale=0.1, **own) for s in part] for part in (kernels, biases)]
    for first, second in ((2, 3), (1, 0)):
        edges = [0, 1, 1, 1, first, 1, 2, 1, 1 if second else 0, second, 2, 3, 0, 0, 0, 3, 4, 0, 0, 0, 2, 4, 0, 0, 0]
        if not second:
            weights[0][1] = values(16, 16, 2, 2, scale=0.1, **own)
        form = edges, [1.0, 1.0, 2.0, 1.0], "sigmoid", 1.0, False, "mse"
        states = [values(*s, **own).sigmoid() for s in shapes]
        phases = "asynchronous", 2, 8, [-0.2, 0.2]  # the nudge reaches every layer
        free, settled, nudged, residual = _ops.equilibrium_energy_phases(
            states, x, *weights, None, None, target, *form, *phases, impl
        )
        made = _ops.equilibrium_energy_gradients(nudged, x, *weights, *form, [-0.2, 0.2], impl)
        results += [*free, settled, *nudged, residual, *made[0], *made[1]]
    return results


CASES = {"equilibrium_settle": _settle, "equilibrium_homeostasis": _homeostasis, "equilibrium_energy": _energy}


# -- ordinary sizes ---------------------------------------------------------------------------------------------------


def _ordinary_settle(impl, device, dtype, layout):
    dtype, sizes = torch.promote_types(dtype, torch.float32), (256, 10)
    drive = [arranged(v, layout) for v in _states(device, dtype, 50, sizes)]
    target, net = values(50, 10, device=device, dtype=dtype), _net(device, dtype, sizes, 10)
    _ops.equilibrium_error(drive, drive, *net, target, 0.2, 2, *_OPTIONS, impl)


def _ordinary_homeostasis(impl, device, dtype, layout):
    dtype = torch.promote_types(dtype, torch.float32)
    eps = [arranged(v, layout) for v in _states(device, dtype, 250, (256, 10))]
    weights = [values(*s, device=device, dtype=dtype, scale=0.1) for s in ((256, 10), (10, 256))]
    _ops.equilibrium_homeostasis(weights, eps, _EDGES, [256, 10], "paper", impl)


ORDINARY = {
    "equilibrium_settle": {"784-256-10, B=50": Ordinary(ROWS, _ordinary_settle)},
    "equilibrium_homeostasis": {"256-10, K B=250": Ordinary(ROWS, _ordinary_homeostasis)},
}

"""Every kernel of the family on small odd shapes, without the library's, for support/sanitized.py."""

import itertools

import torch

from lgkernels.ops.equilibrium.field import Net
from lgkernels.ops.equilibrium.options import Phases, Settling, circle, one_phase
from tests.support.problems import randn

CHAIN, LOOP = [0, 1, 1, 0, 1, 2, 2, 1], [0, 1, 1, 2, 2, 0]


def dense(device, sizes, samples, phases, edges, classes):
    """Arguments of `settle` but the options; classes None: no readout."""
    gains = [(sizes[a], sizes[b]) for a, b in zip(edges[::2], edges[1::2])]
    weights = [(randn(a, b, seed=i) / 2 / a**0.5).to(device) for i, (a, b) in enumerate(gains)]
    readout = None if classes is None else randn(sizes[-1], classes, seed=9).to(device)
    bias = None if classes is None else randn(classes, seed=10).to(device)
    state = [randn(samples * phases.rows, n, seed=11).to(device) / 5 for n in sizes]
    drive = [randn(samples, n, seed=12).to(device) / 5 for n in sizes]
    target = randn(samples, classes or sizes[-1], seed=13).to(device)
    return state, drive, Net(weights, [], readout, bias, edges, len(sizes)), target, phases


def conv(device, phases):
    shapes = [(3, 9, 8), (5, 4, 4), (2, 1, 1)]
    sizes = [(b[0], a[0], 3, 3) for a, b in zip(shapes, shapes[1:])]
    weights = [randn(*sizes[i // 2], seed=i).to(device) / 5 for i in range(4)]
    biases = [randn(s[0], seed=5).to(device) for s in sizes]
    state = [randn(phases.rows * 2, *s, seed=6).to(device) / 5 for s in shapes]
    drive = [randn(2, *shapes[0], seed=7).to(device)]
    net = Net(weights, biases, randn(2, 4).to(device), None, CHAIN, 3)
    return state, drive, net, randn(2, 4, seed=8).to(device), phases


def run(kernels, device):
    """Calls every function for each size, kind of rows and schedule; returns its results."""
    results = []
    cases = (((9, 70, 5), 3, CHAIN, 7), ((33, 3, 10), 20, LOOP, None))
    for (sizes, samples, edges, classes), schedule in itertools.product(cases, ("synchronous", "asynchronous")):
        for phases, activation, points in (
            (circle(0.2, 5), "dsilu", 5),
            (circle(0.2, 4), "sigmoid", 4),
            (Phases([0.3, -0.3], [0.0, 0.0], 2), "hard_sigmoid", 1),
        ):
            options = Settling(activation, "mse" if classes is None else "cross_entropy", schedule, 4, None)
            args = dense(device, sizes, samples, phases, edges, classes)
            states, *report = kernels.settle(*args, options)
            results += [*states, *report]
            args = dense(device, sizes, samples, one_phase(0.1), edges, classes)
            for many in (0, points):
                e, residual = kernels.error(*args[:4], 0.1, many, options)
                results += [*e, residual]
    weights = [randn(33, 7), randn(7, 33), randn(7, 7)]
    loss, grads = kernels.homeostasis([w.to(device) for w in weights], [], [0, 1, 1, 0, 2, 1], [33, 7, 7], "exact")
    results += [loss, *grads]
    if kernels.__name__.endswith("triton"):
        for phases, schedule in itertools.product((circle(0.2, 2), circle(0.2, 5)), ("synchronous", "asynchronous")):
            states, *_ = kernels.settle(*conv(device, phases), Settling("dsilu", "cross_entropy", schedule, 2, None))
            results += states
    return [r for r in results if isinstance(r, torch.Tensor)]

"""Family equilibrium for the ahead-of-time gate: the published nets, every activation and kind of rows."""

import torch

from lgkernels.ops.equilibrium import triton as kernels
from lgkernels.ops.equilibrium.field import Net
from lgkernels.ops.equilibrium.options import Phases, Settling, one_phase

MATRIX_KERNELS = {"step_kernel"}
TABLES = {}

FREE, TWO, COMPLEX = one_phase(0.0), Phases([0.2, -0.2], [0.0, 0.0], 2), one_phase(0.1 + 0.1j)
CHAIN = [0, 1, 1, 0, 1, 2, 2, 1]
# (phases, samples, activation, loss, units of the last layer, classes), None: no readout
DENSE = [
    (FREE, 50, "sigmoid", "cross_entropy", 10, 10),
    (COMPLEX, 50, "sigmoid", "cross_entropy", 10, 10),
    (None, 50, "sigmoid", "cross_entropy", 10, 10),  # tangents
    (TWO, 1024, "hard_sigmoid", "mse", 10, None),
    (COMPLEX, 1024, "dsilu", "cross_entropy", 64, 50),
    (None, 1024, "dsilu", "cross_entropy", 64, None),
]


def dense(phases, samples, activation, loss, last, classes):
    sizes, options = (256, 256, last), Settling(activation, loss, "synchronous", 1, None)
    weights = [torch.empty(sizes[a], sizes[b]) for a, b in zip(CHAIN[::2], CHAIN[1::2])]
    readout = None if classes is None else torch.empty(last, classes)
    net = Net(weights, [], readout, None, CHAIN, 3)
    target = None if phases is FREE else torch.empty(samples, classes or last)
    drive = [torch.empty(samples, n) for n in sizes]
    if phases is None:
        kernels.error(drive, drive, net, target, 0.1, 0, options)
    else:
        state = [torch.empty(samples * phases.rows, n) for n in sizes]
        kernels.settle(state, drive, net, target, phases, options)


def conv(phases, activation, layers):
    sizes, weights = [(8, 16, 16), (16, 8, 8), (16, 3, 3)][:layers], []
    for low, high in zip(sizes, sizes[1:]):
        weights += [torch.empty(high[0], low[0], 3, 3)] * 2
    if layers == 2:
        sizes[1] = 16, 7, 7
    net = Net(weights, [torch.empty(16)] * (layers - 1), None, None, CHAIN[: 4 * layers - 4], layers)
    state, drive = [torch.empty(phases.rows, *s) for s in sizes], [torch.empty(1, *sizes[0])]
    target = torch.empty(1, state[-1][0].numel()) if any(phases.betas) else None
    kernels.settle(state, drive, net, target, phases, Settling(activation, "mse", "synchronous", 1, None))


def errors(activation, points):
    up, down = torch.empty(16, 5), torch.empty(5, 16)
    free, net = [torch.empty(50, 16), torch.empty(50, 5)], Net([up, down], [], None, None, CHAIN[:4], 2)
    options = Settling(activation, "mse", "synchronous", 1, None)
    kernels.error(free, free, net, torch.empty(50, 5), 0.1, points, options)


def cases():
    for case in DENSE:
        dense(*case)
    conv(FREE, "sigmoid", 2)
    conv(COMPLEX, "dsilu", 3)
    for activation, points in (("sigmoid", 2), ("dsilu", 3), ("hard_sigmoid", 1)):
        errors(activation, points)
    up, down = torch.empty(256, 10), torch.empty(10, 256)
    kernels.homeostasis([up, down, torch.empty(10, 10)], [], [0, 1, 1, 0, 2, 1], [256, 10, 10], "exact")

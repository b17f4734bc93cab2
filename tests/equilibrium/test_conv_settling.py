"""Convolutional nets that settle, by every backend against the definition: phases, schedules, odd sizes, lone edges."""

import pytest
import torch

from lgkernels.ops.equilibrium.field import Net
from lgkernels.ops.equilibrium.options import Phases, Settling, circle, one_phase
from tests.conftest import backend_module
from tests.equilibrium import test_settling
from tests.equilibrium.test_settling import check
from tests.support.problems import place

CHAIN = [0, 1, 1, 0, 1, 2, 2, 1]
TWO = Phases([0.3, -0.3], [0.0, 0.0], 2)
# the layers' shapes: each half of the one before, of the last one's border
EVEN, ODD = [(3, 8, 8), (4, 4, 4), (5, 1, 1)], [(2, 11, 9), (3, 5, 4), (2, 1, 1)]
VECTORS = [(16, 9, 8), (32, 4, 4), (16, 1, 1)]  # channels as the C++ kernels take them


@pytest.fixture
def module(backend):
    return backend_module("equilibrium", backend)


def problem(shapes, samples, phases, options, edges=CHAIN, bias=True, classes=3):
    made = torch.Generator().manual_seed(4)

    def randn(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    pairs = list(zip(edges[::2], edges[1::2]))
    weights = [randn(shapes[max(p)][0], shapes[min(p)][0], 3, 3) / 5 for p in pairs]
    biases = [randn(shapes[b][0]) for a, b in pairs if a < b] if bias else []
    last = shapes[-1][0] * shapes[-1][1] * shapes[-1][2]
    readout = (None, None) if classes is None else (randn(last, classes), randn(classes))
    state = [randn(samples * phases.rows, *s) / 4 for s in shapes]
    target = randn(samples, classes if classes and options.loss != "mse" else last).abs()
    net = Net(weights, biases, *readout, edges, len(shapes))
    return state, [randn(samples, *shapes[0]) / 2], net, target if any(phases.betas) else None, phases, options


CASES = (
    (one_phase(0.0), "sigmoid", "mse", None),
    (TWO, "dsilu", "cross_entropy", 3),
    (circle(0.2, 5), "dsilu", "mse", 3),
)


@pytest.mark.parametrize(
    "shapes, schedule",
    [(EVEN, "asynchronous"), (ODD, "synchronous"), (VECTORS, "synchronous"), (VECTORS, "asynchronous")],
    ids=["even", "odd", "vectors", "vectors in turn"],
)
def test_phases(module, shapes, schedule):
    for phases, activation, loss, classes in CASES:
        options = Settling(activation, loss, schedule, 3, None)
        check(
            module, problem(shapes, 2, phases, options, classes=classes), length=300 if shapes is not VECTORS else 900
        )


@pytest.mark.parametrize("shapes", [ODD, VECTORS], ids=["odd", "vectors"])
@pytest.mark.parametrize("edges", [[0, 1, 1, 2], [0, 1, 1, 0, 1, 2], [1, 0, 0, 1, 2, 1, 1, 2]], ids=str)
def test_edges(module, edges, shapes):
    for phases in (one_phase(0.2), one_phase(0.1 + 0.1j)):
        options = Settling("dsilu", "cross_entropy", "synchronous", 2, None)
        check(module, problem(shapes, 2, phases, options, edges, bias=False), length=300 if shapes is ODD else 600)


def test_tolerance_and_clipped_activations(module):
    for activation in ("clipped_relu", "hard_sigmoid"):
        options = Settling(activation, "mse", "asynchronous", 30, 2e-2)
        args = problem(EVEN, 3, one_phase(0.0), options)
        _, steps, *_ = check(module, args, length=300)
        assert 1 < steps.max() < 30


def test_large_maps(module):
    """Windows whose exponentials overflow, and angles of many turns."""
    options = Settling("dsilu", "cross_entropy", "synchronous", 1, None)
    for phases in (one_phase(0.1), one_phase(0.1 + 0.1j)):
        state, drive, net, *rest = problem(EVEN, 2, phases, options)
        net = net._replace(weights=[w * 200 for w in net.weights])
        check(module, (state, drive, net, *rest), length=300 if phases.real_phases else 10**5)


def test_no_step_gives_copies(module):
    options = Settling("sigmoid", "mse", "synchronous", 0, None)
    dense = test_settling.problem((9, 20, 5), 3, circle(0.2, 3), options)
    for args in (dense, problem(EVEN, 1, circle(0.2, 3), options)):
        state, *rest = (test_settling.mapped(v, lambda t: place(t.float())) for v in args)
        for got, given in zip(module.settle(state, *rest)[0], state):
            assert torch.equal(got, given) and got.data_ptr() != given.data_ptr()

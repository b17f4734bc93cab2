"""Settling by every backend against the definition: sizes, schedules, phases, losses, layouts, and how it stops."""

import itertools

import pytest
import torch

from lgkernels.ops.equilibrium import reference
from lgkernels.ops.equilibrium.field import Net
from lgkernels.ops.equilibrium.options import Phases, Settling, circle, one_phase
from tests.conftest import backend_module
from tests.equilibrium.test_invariants import ACTIVATIONS
from tests.support.problems import place
from tests.support.tolerances import assert_accurate

CHAIN = [0, 1, 1, 0, 1, 2, 2, 1]
LOOP = [0, 1, 1, 2, 2, 0]
MIXED = circle(0.2, 5)  # +beta, and two complex ones


@pytest.fixture
def module(backend):
    return backend_module("equilibrium", backend)


def problem(sizes, samples, phases, options, edges=CHAIN, classes=7, gain=0.5):
    """Arguments of `settle` in float64; classes None: no readout."""
    made = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    weights = [randn(sizes[a], sizes[b]) * gain / sizes[a] ** 0.5 for a, b in zip(edges[::2], edges[1::2])]
    readout = (None, None) if classes is None else (randn(sizes[-1], classes), randn(classes))
    net = Net(weights, [], *readout, edges, len(sizes))
    state = [randn(samples * phases.rows, n) / 2 for n in sizes]
    drive = [randn(samples, n) / 2 for n in sizes]
    wanted = sizes[-1] if classes is None or options.loss == "mse" else classes
    target = torch.rand(samples, wanted, generator=made, dtype=torch.float64) if any(phases.betas) else None
    return state, drive, net, target, phases, options


def mapped(value, function):
    """With `function` of every tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Net):
        return Net(*(mapped(v, function) for v in value))
    return [mapped(v, function) for v in value] if type(value) in (list, tuple) else value


def run(module, args, function="settle"):
    """Where the backend runs; the results on the CPU."""
    result = getattr(module, function)(*(mapped(v, place) for v in args))
    return mapped(result, torch.Tensor.cpu)


def cast(value, dtype):
    return mapped(value, lambda v: v.to(dtype))


def check(module, args, function="settle", length=64):
    single = [cast(v, torch.float32) for v in args]
    truth = getattr(reference, function)(*args)
    plain, got = getattr(reference, function)(*single), run(module, single, function)
    for layer, (a, b, c) in enumerate(zip(got[0], plain[0], truth[0])):
        assert_accurate(f"layer {layer}", a, b, c, length, magnitude=torch.full_like(c, 4.0))
    for a, b in zip(got[1:], truth[1:]):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)
    return got


@pytest.mark.parametrize("sizes", [(1, 1), (3, 17), (17, 3, 257), (257, 16, 1), (40, 33, 10)], ids=str)
def test_sizes(module, sizes):
    options = Settling("sigmoid", "cross_entropy", "synchronous", 4, None)
    edges = CHAIN if len(sizes) == 3 else [0, 1, 1, 0]
    for samples, phases in ((1, one_phase(0.3)), (1, one_phase(0.2 + 0.1j)), (2, MIXED), (23, one_phase(0.3))):
        check(module, problem(sizes, samples, phases, options, edges))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("schedule", ["synchronous", "asynchronous"])
def test_schedules_losses_and_phases(module, activation, schedule):
    free, twice = one_phase(0.0), Phases([0.3, -0.3], [0.0, 0.0], 2)
    phases = (free, twice, MIXED) if activation in ("sigmoid", "dsilu") else (free, twice)
    for nudges, edges, loss in itertools.product(phases, (CHAIN, LOOP), ("cross_entropy", "mse")):
        options = Settling(activation, loss, schedule, 5, None)
        classes = 7 if edges is CHAIN else None
        check(module, problem((9, 20, 5), 4, nudges, options, edges, classes))


@pytest.mark.parametrize("schedule", ["synchronous", "asynchronous"])
def test_edges_between_layers_of_one_turn(module, schedule):
    """From odd layers to odd ones, which move together: by what they were."""
    options = Settling("sigmoid", "cross_entropy", schedule, 4, None)
    for phases in (one_phase(0.3), one_phase(0.2 + 0.1j)):
        check(module, problem((9, 20, 5, 4), 3, phases, options, [0, 1, 1, 3, 3, 1, 1, 2, 2, 0, 2, 3]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tangents(module, activation):
    for steps, loss, classes in ((0, "mse", 3), (1, "cross_entropy", None), (6, "cross_entropy", 7), (6, "mse", None)):
        options = Settling(activation, loss, "synchronous", steps, None)
        state, drive, net, target, _, options = problem((9, 20, 5), 3, one_phase(1.0), options, classes=classes)
        check(module, (state, drive, net, target, 0.5, 0, options), "error")


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_first_steps(module, steps):
    """The moves look back two steps, to where there were none."""
    for schedule in ("synchronous", "asynchronous"):
        options = Settling("sigmoid", "mse", schedule, steps, None)
        got = check(module, problem((9, 20, 5), 3, MIXED, options))
        assert (got[1] == steps).all() and got[2].isinf().all() == (steps == 0) and got[3].isinf().all() == (steps < 2)


def test_the_input_enters_the_first_layers_alone(module):
    for schedule in ("synchronous", "asynchronous"):
        options = Settling("sigmoid", "cross_entropy", schedule, 3, None)
        state, drive, *rest = problem((9, 20, 5), 3, MIXED, options)
        check(module, (state, drive[:1], *rest))
        free = [v[:3] for v in state]
        for points in (0, 2):
            check(module, (free, drive[:1], *rest[:2], 0.5, points, options), "error")


@pytest.mark.parametrize("schedule", ["synchronous", "asynchronous"])
def test_it_stops_where_all_samples_have_settled(module, schedule):
    """In more rows than one thread takes at a time: none may stop before the last one."""
    options = Settling("sigmoid", "cross_entropy", schedule, 60, 1e-3)
    args = problem((12, 20, 5), 150, Phases([0.2, 0.0], [0.0, 0.05], 1), options, gain=0.7)
    args[1][0][:140] = 0
    _, steps, residual, _ = check(module, args)
    assert steps.min() < steps.max() < 60 and (residual <= 1e-3).all()


def test_orbits(module):
    """Opposite layers that drive each other: the synchronous net swings for ever between two states."""
    args = problem((1, 1), 2, one_phase(0.0), Settling("sigmoid", "mse", "synchronous", 100, 1e-4), [0, 1, 1, 0], None)
    net = args[2]._replace(weights=[torch.full((1, 1), 6.0).double()] * 2)
    state, drive = [torch.tensor([[2.0], [1.0]]).double(), torch.tensor([[-2.0], [1.1]]).double()], args[1]
    drive = [torch.full((2, 1), -2.5).double()] * 2
    _, steps, residual, orbit = check(module, (state, drive, net, *args[3:]))
    assert residual[0, 0] > 1 and orbit[0, 0] <= 1e-4 and steps.max() < 100


def test_layouts_and_halves(module):
    """Strided tensors, and weights that are views of one another, are read as they are; nothing is written to."""
    options = Settling("dsilu", "cross_entropy", "synchronous", 3, None)
    args = [cast(v, torch.float32) for v in problem((9, 20, 5), 3, MIXED, options)]
    expected = run(module, args)

    def strided(v):
        return v.repeat_interleave(2, -1)[..., ::2]

    net = args[2]._replace(weights=[w.t().contiguous().t() for w in args[2].weights], readout=strided(args[2].readout))
    own = [[strided(v) for v in args[0]], [strided(v) for v in args[1]], net, strided(args[3])]
    kept = [v.clone() for v in (*own[0], *own[1], own[3])]
    for got, value in zip(run(module, (*own, *args[4:]))[0], expected[0]):
        torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip((*own[0], *own[1], own[3]), kept))


@pytest.mark.only(where=lambda backend: backend == "cpu")
def test_halves_are_computed_in_float32(module):
    options = Settling("dsilu", "cross_entropy", "synchronous", 3, None)
    args = [cast(v, torch.bfloat16) for v in problem((9, 20, 5), 3, MIXED, options)]
    expected = module.settle(*(cast(v, torch.float32) for v in args))
    for got, value in zip(module.settle(*args)[0], expected[0]):
        assert got.dtype == torch.bfloat16 and torch.equal(got, value.bfloat16())


def test_large_states(module):
    """Far from the activation's middle, where exponentials overflow and angles are many turns."""
    for activation, phases in itertools.product(("sigmoid", "dsilu"), (one_phase(0.1), one_phase(0.1 + 0.1j))):
        options = Settling(activation, "cross_entropy", "synchronous", 1, None)
        state, *rest = problem((9, 20, 5), 3, phases, options)
        for scale in (30.0, 400.0):
            check(module, ([v * scale for v in state], *rest), length=10**4 if phases.real_phases == 0 else 64)
    options = Settling("clipped_relu", "mse", "synchronous", 2, None)
    state, *rest = problem((9, 20, 5), 3, one_phase(0.1), options)
    state[0][1, 2] = torch.nan
    got = run(module, [cast(v, torch.float32) for v in (state, *rest)])
    assert got[0][0][1].isnan().all() and got[2][0].isnan().tolist() == [False, True, False]


@pytest.mark.only(where=lambda backend: backend == "cpu")
@pytest.mark.parametrize("tolerance", [None, 1e-2])
def test_results_do_not_depend_on_threads_or_neighbours(module, tolerance):
    """Bit for bit; a tile of one, two, ... rows adds up in one order."""
    options = Settling("sigmoid", "cross_entropy", "asynchronous", 9, tolerance)
    args = [cast(v, torch.float32) for v in problem((130, 67, 5), 131, MIXED, options)]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            states, *report = module.settle(*args)
            results.append([*states, *report])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    if tolerance is None:
        for row in (0, 70):  # one row alone
            own = [[v[row : row + 1] for v in args[0]], [v[row : row + 1] for v in args[1]]]
            alone = module.settle(*own, args[2], args[3][row : row + 1], one_phase(0.2), options)
            assert all(torch.equal(a[0], b[row]) for a, b in zip(alone[0], results[0]))

"""The error from a circle of nudges by every backend: the Fourier sum, and what it keeps in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lgkernels.ops.equilibrium import reference
from lgkernels.ops.equilibrium.options import Settling, circle, one_phase
from tests.conftest import backend_module
from tests.equilibrium import test_conv_settling
from tests.equilibrium.test_settling import CHAIN, LOOP, cast, check, mapped, problem
from tests.support.problems import place

pytestmark = pytest.mark.op("equilibrium_settle")


@pytest.fixture
def module(backend):
    return backend_module("equilibrium", backend)


def circle_problem(points, samples=5, sizes=(9, 20, 5), edges=CHAIN, classes=7, steps=4, loss="cross_entropy"):
    options = Settling("sigmoid", loss, "synchronous", steps, None)
    state, drive, net, target, _, _ = problem(sizes, samples, one_phase(1.0), options, edges, classes)
    return state, drive, net, target, 0.3, points, options


def test_the_sum_over_a_circle(module):
    """Of real phases, of one, of complex ones, of no step, of both losses; more samples than a chunk has."""
    for points, samples, steps, edges, loss in (
        (1, 5, 4, CHAIN, "cross_entropy"),
        (2, 130, 4, CHAIN, "cross_entropy"),
        (3, 5, 4, LOOP, "mse"),
        (6, 70, 4, LOOP, "cross_entropy"),
        (4, 1, 1, CHAIN, "mse"),
        (6, 5, 0, CHAIN, "cross_entropy"),
    ):
        check(module, circle_problem(points, samples=samples, steps=steps, edges=edges, loss=loss), "error")


def test_the_other_activations(module):
    for activation, points in (("dsilu", 5), ("hard_sigmoid", 2), ("clipped_relu", 1)):
        *args, options = circle_problem(points)
        check(module, (*args, options._replace(activation=activation)), "error")


class _Tensors(TorchDispatchMode):
    """How many values the tensors have which operations make: the largest one, and all of them."""

    def __init__(self):
        super().__init__()
        self.most = self.all = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        views = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        own = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor) and id(t.untyped_storage()) not in views]
        self.most = max([self.most, *(t.numel() for t in own)])
        self.all += sum(t.numel() for t in own)
        return made


@pytest.mark.only(where=lambda backend: backend not in ("reference", "torch"))
def test_no_phase_is_stored(module, backend):
    """Of N = 8, what the kernels' own memory is not: neither the states that they start from nor those they end at."""
    args = [mapped(cast(v, torch.float32), place) for v in circle_problem(8, samples=40, sizes=(30, 20, 5))]
    rows, values = circle(0.3, 8).rows, sum(v.numel() for v in args[0])
    with _Tensors() as own:
        module.error(*args)
    with _Tensors() as by_states:
        reference.error(*args, settle=module.settle)
    assert own.all + 2 * rows * values <= by_states.all
    if backend == "cpu":
        assert own.most <= max(v.numel() for v in args[0])


@pytest.mark.only(where=lambda backend: backend == "cpu")
def test_the_sum_does_not_depend_on_threads_or_neighbours(module):
    args = [cast(v, torch.float32) for v in circle_problem(5, samples=131)]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(module.error(*args)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    alone = module.error([v[70:71] for v in args[0]], [v[70:71] for v in args[1]], args[2], args[3][70:71], *args[4:])
    assert all(torch.equal(a[0], b[70]) for a, b in zip(alone[0], results[0]))


def test_conv_nets(module):
    for points in (1, 5):
        options = Settling("dsilu", "cross_entropy", "synchronous", 2, None)
        state, drive, net, target, *_ = test_conv_settling.problem(test_conv_settling.EVEN, 2, one_phase(0.2), options)
        check(module, (state, drive, net, target, 0.2, points, options), "error", length=300)

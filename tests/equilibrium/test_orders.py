"""The kernel of nets that settle gives the same bits whatever the order of threads and blocks.

That the bits are right (sizes, phases, losses) is tested in test_settling.py, where "cuda-simt" is a backend.
"""

import functools

import pytest

from lgkernels.ops.equilibrium.options import Phases, Settling, circle, one_phase
from tests.equilibrium.sanitized import CHAIN, LOOP, dense
from tests.simt import executor
from tests.simt.orders import in_every_order

pytestmark = pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable()))
run = functools.partial(in_every_order, "equilibrium")
TWO = Phases([0.3, -0.3], [0.0, 0.0], 2)


def flat(result):
    states, *report = result
    return *states, *report


# parts of sums and whole ones, more units than a block has lanes; with a readout and without; rows that fill a block
SIZES = [((9, 70, 5), CHAIN, 7), ((600, 3, 33), LOOP, None), ((3, 1200, 2), CHAIN, 40)]


@pytest.mark.parametrize("schedule", ["synchronous", "asynchronous"])
@pytest.mark.parametrize("sizes, edges, classes", SIZES, ids=str)
def test_settling(sizes, edges, classes, schedule):
    for phases, loss in ((circle(0.2, 5), "cross_entropy"), (TWO, "mse" if classes is None else "cross_entropy")):
        options = Settling("dsilu", loss, schedule, 3, None)
        args = dense("cpu", sizes, 3, phases, edges, classes)
        run(lambda kernels, args=args, options=options: flat(kernels.settle(*args, options)))


def test_tangents_and_a_tolerance():
    for activation in ("sigmoid", "clipped_relu"):
        args = dense("cpu", (9, 70, 5), 3, TWO._replace(beta_real=[0.1], beta_imag=[0.0], real_phases=1), CHAIN, 7)
        options = Settling(activation, "cross_entropy", "synchronous", 4, 1e-3)
        run(lambda kernels, args=args, options=options: flat(kernels.error(*args[:4], 0.1, 0, options)))
        run(lambda kernels, args=args, options=options: flat(kernels.settle(*args, options)))


@pytest.mark.parametrize("schedule", ["synchronous", "asynchronous"])
def test_free_steps_wait_for_one_another(schedule):
    """The widest layer comes last in a step, has no parts of sums, and no nudge follows."""
    state, drive, net, *_ = dense("cpu", (3, 600), 3, one_phase(0.0), CHAIN[:4], 7)
    options = Settling("sigmoid", "mse", schedule, 4, None)
    run(lambda kernels: flat(kernels.settle(state, drive, net, None, one_phase(0.0), options)))


@pytest.mark.parametrize("units, launches", [(2816, [[1, 512, 48 * 1024]]), (2817, [])])
def test_nets_up_to_the_shared_memory_run_on_the_kernel(units, launches):
    state, drive, net, *_ = dense("cpu", (units - 9, 9), 1, one_phase(0.0), [0, 1], 7)
    simt, options = executor.module(), Settling("sigmoid", "mse", "synchronous", 1, None)
    simt.launches()
    executor.backend("equilibrium").settle(state, drive, net, None, one_phase(0.0), options)
    assert simt.launches() == launches

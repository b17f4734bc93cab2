"""The kernel of nets that settle gives the same bits whatever the order of threads and blocks.

That the bits are right (sizes, phases, losses) is tested in test_settling.py, where "cuda-simt" is a backend.
"""

import functools

import pytest

from lgkernels.ops.equilibrium.options import Phases, Settling, circle
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

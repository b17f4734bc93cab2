"""What the kernels of nets that settle have to pass on a user's device: Triton's interpreter stands in for it."""

import pytest
import torch

from lgkernels.core import dispatch, trust
from lgkernels.ops.equilibrium import op, trials  # noqa: F401  registers the ops
from lgkernels.ops.equilibrium import triton as kernels
from tests.equilibrium import test_conv_settling, test_settling
from tests.equilibrium.test_settling import Settling, cast, circle
from tests.integration.test_trust import stand_in  # noqa: F401  the CPU counts as a GPU

pytestmark = pytest.mark.skipif(not dispatch.interpreting(), reason="the kernels run on CPU tensors")
OPTIONS = Settling("sigmoid", "cross_entropy", "synchronous", 4, None)


def settling(problem):
    state, drive, net, target, phases, options = (cast(v, torch.float32) for v in problem)
    return state, drive, *net, target, *phases, *options


def dense(options=OPTIONS, phases=circle(0.2, 4)):  # noqa: B008
    return settling(test_settling.problem((20, 9, 5), 4, phases, options))


def error(points):
    state, drive, *net, target, _, _, _, activation, loss, schedule, steps, tolerance = dense(phases=circle(0.1, 1))
    return state, drive, *net, target, 0.1, points, activation, loss, schedule, steps, tolerance


def conv():
    return settling(test_conv_settling.problem(test_conv_settling.ODD, 5, circle(0.2, 4), OPTIONS))


def homeostasis(estimator):
    weights = [torch.randn(9, 7), torch.randn(7, 9)]
    eps = [] if estimator == "exact" else [torch.randn(70, 9), torch.randn(70, 7)]
    return weights, eps, [0, 1, 1, 0], [9, 7], estimator


def calls():
    ops = torch.ops.lgkernels
    return [
        (ops.equilibrium_settle, dense()),
        (ops.equilibrium_settle, dense(OPTIONS._replace(tolerance=1e-3, schedule="asynchronous"))),
        (ops.equilibrium_settle, conv()),
        *((ops.equilibrium_error, error(points)) for points in (0, 3)),
        *((ops.equilibrium_homeostasis, homeostasis(estimator)) for estimator in ("paper", "symmetric", "exact")),
    ]


def test_every_op_passes():
    for call, arguments in calls():
        call(*arguments, "auto")
    assert [state for _, state, _ in trust.decided().values()] == ["good"] * len(calls()), trust.decided()


def test_other_sizes_and_words_are_other_kinds():
    def kind(arguments):
        return trials.TRIALS["equilibrium_settle"].kind(dict(zip(trust.OPS["equilibrium_settle"].names, arguments)))

    longer, larger = dense(OPTIONS._replace(steps=20)), dense(phases=circle(0.2, 6))
    assert kind(dense()) == kind(longer) != kind(larger)
    assert kind(dense()) != kind(dense(OPTIONS._replace(activation="dsilu")))


@pytest.mark.parametrize("place", [0, 4, 7])
def test_a_kernel_at_fault_is_seen(monkeypatch, place):
    """One layer of a dense net, of its tangents, or of the gradients is wrong by 1 % in a single entry."""
    for name in ("settle", "error", "homeostasis"):
        right = getattr(kernels, name)

        def wrong(*args, right=right):
            result = right(*args)
            parts = result[0] if isinstance(result[0], list) else result[1]
            parts[0].view(-1)[3] *= 1.01
            return result

        monkeypatch.setattr(kernels, name, wrong)
    call, arguments = calls()[place]
    with pytest.warns(UserWarning, match="failed their trial"):
        call(*arguments, "auto")
    assert [state for _, state, _ in trust.decided().values()] == ["bad"]

"""The cases of test_settling.py and test_circle.py on a CUDA device, and what only a device can show of them."""

import pytest
import torch

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.ops.equilibrium.options import Settling, circle, one_phase
from tests.conftest import backend_module
from tests.equilibrium import test_conv_settling, test_settling
from tests.equilibrium.test_circle import *  # noqa: F403
from tests.equilibrium.test_settling import *  # noqa: F403
from tests.equilibrium.test_settling import mapped, run
from tests.support.gpu import backend, on_the_device, test_no_kernel_is_at_fault  # noqa: F401
from tests.support.problems import place
from tests.support.tolerances import assert_bit_equal

pytestmark = pytest.mark.op("equilibrium_settle")
CIRCLE, SYNCHRONOUS = circle(0.2, 5), Settling("sigmoid", "cross_entropy", "synchronous", 20, None)


def dense(phases=CIRCLE, samples=50):
    args = test_settling.problem((256, 256, 10), samples, phases, SYNCHRONOUS, classes=10)
    return [mapped(v, lambda t: place(t.float())) for v in args]


def conv():
    args = test_conv_settling.problem(test_conv_settling.EVEN, 8, circle(0.2, 2), SYNCHRONOUS)
    return [mapped(v, lambda t: place(t.float())) for v in args]


NETS = pytest.mark.parametrize("net", [dense, conv])


@NETS
@pytest.mark.unpoisoned
def test_a_cuda_graph_holds_all_steps(module, net):
    """They are captured with no synchronisation; the replay on another state is the eager run."""
    args = net()
    module.settle(*args)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        module.settle(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = module.settle(*args)
    for u in args[0]:
        u.mul_(0.5)
    graph.replay()
    for a, b in zip(captured[0], module.settle(*args)[0]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@NETS
def test_repeatable_bit_for_bit(module, net):
    args = net()
    first = module.settle(*args)
    for _ in range(5):
        for i, (a, b) in enumerate(zip(module.settle(*args)[0], first[0])):
            assert_bit_equal(f"layer {i}", a, b)


def test_other_stream(module):
    args = dense()
    expected = module.settle(*args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late = [torch.zeros_like(u) for u in args[0]]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for to, u in zip(late, args[0]):
            to.copy_(u)
        got = module.settle(late, *args[1:])
    stream.synchronize()
    for i, (a, b) in enumerate(zip(got[0], expected[0])):
        assert_bit_equal(f"layer {i}", a, b)


def test_a_large_batch_is_many_small_ones(module):
    args = dense(one_phase(0.2), 1000)
    whole = run(module, args)
    for row in (0, 517, 999):
        few = [[v[row : row + 1] for v in part] for part in args[:2]]
        alone = run(module, (*few, args[2], args[3][row : row + 1], *args[4:]))
        for a, b in zip(alone[0], whole[0]):
            torch.testing.assert_close(a[0], b[row], rtol=1e-4, atol=1e-5)


def test_conv_nets(module):
    for phases in (one_phase(0.0), circle(0.2, 5)):
        options = Settling("dsilu", "cross_entropy", "synchronous", 3, None)
        for shapes in (test_conv_settling.EVEN, test_conv_settling.ODD):
            test_settling.check(module, test_conv_settling.problem(shapes, 2, phases, options), length=300)


@pytest.mark.op("equilibrium_homeostasis")
def test_homeostasis_of_symmetric_weights_is_none(backend):
    kernels = backend_module("equilibrium", backend)
    up = torch.randn(300, 70, generator=torch.Generator().manual_seed(0))
    weights = [place(w) for w in (up, up.t().contiguous() + 1.0)]
    loss, (first, second) = kernels.homeostasis(weights, [], [0, 1, 1, 0], [300, 70], "exact")
    torch.testing.assert_close(loss.cpu(), torch.tensor(300 * 70 / 370.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(first.t(), -second)
    torch.testing.assert_close(second.cpu(), torch.full((70, 300), 2 / 370.0), rtol=1e-5, atol=1e-7)


def test_the_public_functions(impl):
    torch.manual_seed(0)
    net = lnn.EquilibriumMLP(20, (30, 40), 10, num_classes=5)
    weights = {k: place(w.detach()) for k, w in net.named_weights().items()}
    x, target = place(torch.rand(7, 20)), place(torch.arange(7) % 5)
    state = LF.ep_settle(weights, x, steps=40, impl=impl)
    own = dict(beta=0.1, steps=20)
    exact = LF.holomorphic_ep_error(weights, x, target, state, points=0, impl=impl, **own)
    for key, e in LF.holomorphic_ep_error(weights, x, target, state, points=4, impl=impl, **own).items():
        torch.testing.assert_close(e, exact[key], rtol=1e-2, atol=1e-3)

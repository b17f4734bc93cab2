"""Settling loops in CUDA graphs, on a CUDA device: see test_graphs.py."""

import pytest
import torch

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.ops.equilibrium import graphs
from lgkernels.ops.equilibrium.options import Settling, circle
from tests.conftest import backend_module
from tests.equilibrium import test_conv_settling, test_settling
from tests.equilibrium.test_settling import mapped
from tests.support.gpu import backend, on_the_device  # noqa: F401
from tests.support.problems import place

pytestmark = pytest.mark.op("equilibrium_settle")
OPTIONS = Settling("dsilu", "cross_entropy", "synchronous", 20, None)
NETS = {
    "dense": lambda: test_settling.problem((256, 256, 10), 50, circle(0.2, 5), OPTIONS, classes=10),
    "conv": lambda: test_conv_settling.problem(test_conv_settling.EVEN, 8, circle(0.2, 5), OPTIONS),
}


@pytest.fixture(autouse=True)
def none_kept():
    graphs.forget()
    yield
    graphs.forget()


def problem(name):
    return [mapped(v, lambda t: place(t.float())) for v in NETS[name]()]


def settle(module, args):
    state, drive, net, target, phases, options = args
    return graphs.run(module.settle, state, drive, net, target, (phases,), options)


def recorded():
    return list(graphs._graphs.values())


def close(got, expected):
    for a, b in zip(got[0], expected[0]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(got[1:], expected[1:]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_a_replay_is_the_loop(backend, name):
    module, args = backend_module("equilibrium", backend), problem(name)
    none = backend == "reference" or backend == "cuda" and name == "dense"  # the definition; what is one launch
    for calls in range(4):
        close(settle(module, args), module.settle(*args))
        assert len(recorded()) == (calls > 0 and not none)
        for tensor in (*args[0], *args[1], args[3], *args[2].weights, args[2].readout):
            tensor.mul_(0.95)


def test_errors_and_tangents(backend):
    module = backend_module("equilibrium", backend)
    state, drive, net, target, _, options = problem("conv")
    state = [v[: len(drive[0])] for v in state]
    for points in (0, 2, 5):
        expected = module.error(state, drive, net, target, 0.2, points, options)
        for _ in range(3):
            close(graphs.run(module.error, state, drive, net, target, (0.2, points), options), expected)
    assert len(recorded()) == 3 * (backend != "reference")


def test_streams_have_graphs_of_their_own():
    module, args = backend_module("equilibrium", "torch"), problem("conv")
    expected = module.settle(*args)
    for _ in range(2):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = [settle(module, args) for _ in range(3)]
        stream.synchronize()
        close(got[-1], expected)
    assert len(recorded()) >= 1


def test_inside_of_another_graph():
    """It is a part of that one, and none is made for it."""
    module, args = backend_module("equilibrium", "torch"), problem("conv")
    for _ in range(2):
        module.settle(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = settle(module, args)
    assert not graphs._graphs and not graphs._seen
    graph.replay()
    close(captured, module.settle(*args))


def test_weights_may_be_temporaries():
    """Copies of another net's weights at each call, whose memory the allocator gives to something else at once."""
    module, args = backend_module("equilibrium", "torch"), problem("conv")
    for scale in (1.0, 0.9, 0.8, 0.7):
        weights = [w * scale for w in args[2].weights]
        expected = module.settle(*args[:2], args[2]._replace(weights=[w.clone() for w in weights]), *args[3:])
        got = settle(module, [*args[:2], args[2]._replace(weights=weights), *args[3:]])
        del weights
        close(got, expected)
    assert len(recorded()) == 1


def test_settings_by_operation():
    """With torch's `fp32_precision`, whose mixtures the older settings refuse to read."""
    module, args = backend_module("equilibrium", "torch"), problem("conv")
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = "ieee", "tf32"
    try:
        for _ in range(3):
            close(settle(module, args), module.settle(*args))
    finally:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before
    assert len(recorded()) == 1


@pytest.mark.unpoisoned
def test_under_compile():
    """Recorded and replayed between the graphs that torch.compile makes of what is around."""
    torch.manual_seed(0)
    net = lnn.EquilibriumMLP(20, (30, 40), 10, num_classes=5)
    weights = {k: place(w.detach()) for k, w in net.named_weights().items()}

    def run(x):
        state = LF.ep_settle(weights, 2 * x, steps=20, impl="torch")
        return state["out"] + 1

    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(run, mode=mode)
        for scale in (1.0, 0.5, 0.25, 0.1):
            x = place(torch.rand(7, 20)) * scale
            torch.testing.assert_close(compiled(x).clone(), run(x), rtol=1e-5, atol=1e-5)

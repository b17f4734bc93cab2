"""Settling loops in CUDA graphs, with the recorder of tests/training/test_cuda_graph.py in place of torch's: what is
recorded, when it is replayed, what makes another kind, and when a graph is dropped.

The recorder sees what reaches the dispatcher, so loops are plain torch's; those of Triton are in test_gpu_graphs.py."""

import contextlib
import gc
import warnings

import pytest
import torch

from lgkernels.core import kept
from lgkernels.ops.equilibrium import field, graphs
from lgkernels.ops.equilibrium.options import Settling, circle, one_phase
from tests.conftest import backend_module
from tests.equilibrium import test_conv_settling, test_settling
from tests.equilibrium.test_settling import cast
from tests.support.tolerances import assert_bit_equal
from tests.training.test_cuda_graph import Recorder, Stream

CIRCLE = circle(0.2, 3)
OPTIONS = Settling("sigmoid", "cross_entropy", "synchronous", 5, None)


class Own(Stream):
    number = 0

    @property
    def cuda_stream(self):
        return Own.number


class Light:
    """A graph that holds nothing, to be counted."""

    made = replays = 0

    def __init__(self):
        Light.made += 1

    def replay(self):
        Light.replays += 1


@contextlib.contextmanager
def capture(recorder, stream, capture_error_mode):
    assert capture_error_mode == "thread_local"
    with recorder if isinstance(recorder, Recorder) else contextlib.nullcontext():
        yield
    if isinstance(recorder, Recorder):
        recorder.undo()


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setattr(graphs, "DEVICE_TYPES", {"cpu"})
    for name, value in dict(CUDAGraph=Recorder, graph=capture, Stream=Own, current_stream=Own).items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(Own, "number", 0)
    monkeypatch.setattr(Light, "made", 0)
    monkeypatch.setattr(Light, "replays", 0)
    graphs.forget()
    yield
    graphs.forget()


def dense(phases=CIRCLE, samples=4, options=OPTIONS):
    return [cast(v, torch.float32) for v in test_settling.problem((9, 8, 5), samples, phases, options)]


def conv():
    args = test_conv_settling.problem(test_conv_settling.EVEN, 2, one_phase(0.2), OPTIONS)
    return [cast(v, torch.float32) for v in args]


def settle(module, args):
    state, drive, net, target, phases, options = args
    return graphs.run(module.settle, state, drive, net, target, (phases,), options)


def recorded():
    return [graph for graph in graphs._graphs.values() if graph is not None]


@pytest.fixture
def module():
    return backend_module("equilibrium", "torch")


@pytest.mark.parametrize("net", [dense, conv])
def test_a_replay_is_the_loop(module, net):
    """Of other states, inputs, targets, and of weights that have changed where they are; results are the caller's."""
    args = net()
    for calls in range(4):
        got = settle(module, args)
        kept = [v.clone() for v in got[0]]
        expected = module.settle(*args)
        for i, (a, b) in enumerate(zip([*got[0], *got[1:]], [*expected[0], *expected[1:]])):
            assert_bit_equal(f"result {i}", a, b)
        assert len(recorded()) == (calls > 0)
        for tensor in (*args[0], *args[1], args[3], *args[2].weights, args[2].readout):
            tensor.mul_(0.9)
        settle(module, args)
        assert all(torch.equal(a, b) for a, b in zip(got[0], kept))
    assert recorded()[0].graph.replays == 7


def test_errors_are_recorded_too(module):
    state, drive, net, target, _, options = dense(one_phase(1.0))
    for points in (0, 3):
        rest = state, drive, net, target, (0.2, points), options
        expected = module.error(state, drive, net, target, 0.2, points, options)
        for _ in range(3):
            e, residual = graphs.run(module.error, *rest)
            assert all(torch.equal(a, b) for a, b in zip([*e, residual], [*expected[0], expected[1]]))
    assert [graph.graph.replays for graph in recorded()] == [2, 2]


def test_kinds(module, monkeypatch):
    """Each of these is recorded by itself, after an ordinary call; and none takes another's graph."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Light)
    monkeypatch.setattr(graphs, "MOST", 99)
    args = dense()
    net, precision = args[2], torch.get_float32_matmul_precision()
    moved = net._replace(weights=[net.weights[0].clone(), *net.weights[1:]])
    other = [
        args,
        dense(samples=3),
        dense(circle(0.3, 3)),
        dense(options=OPTIONS._replace(schedule="asynchronous")),
        dense(options=OPTIONS._replace(steps=6)),
        [*args[:2], moved, *args[3:]],
        [*args[:2], net._replace(readout_bias=None), *args[3:]],
    ]
    for many, own in enumerate(other, 1):
        for _ in range(3):
            settle(module, own)
        assert (Light.made, Light.replays) == (many, 2 * many)
    Own.number = 7  # another stream
    for _ in range(3):
        settle(module, args)
    assert Light.made == len(other) + 1
    torch.set_float32_matmul_precision("high")
    try:
        for _ in range(3):
            settle(module, args)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert Light.made == len(other) + 2


def test_what_is_not_recorded(module, monkeypatch):
    args = dense()

    def ordinary(own, module=module):
        expected = module.settle(*own)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(settle(module, own)[0], expected[0]))
        assert not graphs._graphs and not graphs._seen

    ordinary(dense(one_phase(0.2), options=OPTIONS._replace(tolerance=1e-9)))
    ordinary(dense(options=OPTIONS._replace(steps=2)))
    ordinary(args, backend_module("equilibrium", "reference"))
    ordinary(args, backend_module("equilibrium", "cpu"))
    monkeypatch.setenv("LGKERNELS_GRAPHS", "0")
    ordinary(args)
    monkeypatch.delenv("LGKERNELS_GRAPHS")
    monkeypatch.setattr(kept, "capturing", lambda device: True)
    ordinary(args)
    monkeypatch.undo()
    ordinary(args)  # on a CPU


def test_a_gradient_is_not_recorded(module):
    args = dense()
    args[2].weights[0].requires_grad_()
    for _ in range(3):
        assert settle(module, args)[0][0].requires_grad
    assert not recorded()
    with torch.no_grad():
        for _ in range(3):
            settle(module, args)
    assert len(recorded()) == 1


def test_graphs_go_with_their_weights(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Light)
    first, second = dense(), dense()
    for args in (first, second):
        for _ in range(2):
            settle(module, args)
    assert len(recorded()) == 2
    del args, first
    gc.collect()
    settle(module, second)
    assert len(recorded()) == 1 and Light.replays == 3


def test_the_graphs_used_last_are_kept(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Light)
    monkeypatch.setattr(graphs, "MOST", 2)
    nets = [dense(samples=samples) for samples in (2, 3, 4)]
    for args in (nets[0], nets[0], nets[1], nets[1], nets[0], nets[2], nets[2]):
        settle(module, args)
    assert Light.made == 3 and len(recorded()) == 2
    settle(module, nets[0])
    assert Light.made == 3
    settle(module, nets[1])
    assert Light.made == 4


def test_a_loop_that_cannot_be_recorded(module, monkeypatch):
    """It is told once, and run as it is from then on."""

    def refusing(loop):
        raise RuntimeError("not here")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: refusing(None))
    args, expected = dense(), module.settle(*dense())
    settle(module, args)
    with pytest.warns(UserWarning, match="not here.*LGKERNELS_GRAPHS=0"):
        settle(module, args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = settle(module, args)
    assert all(torch.equal(a, b) for a, b in zip(got[0], expected[0]))


def test_nudges_are_written_on_the_device():
    """No copy from the host, which a graph cannot hold: the recorder refuses none, for on a CPU there is none."""
    made = field.Packed(circle(0.2, 5), 2, torch.zeros(1)).betas
    assert made[0].tolist() == pytest.approx([0.2]) and made[1].dtype == torch.complex64
    assert made[1].tolist() == pytest.approx(circle(0.2, 5).betas[1:])

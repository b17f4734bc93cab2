"""Settling loops in CUDA graphs, with the recorder of tests/training/test_cuda_graph.py in place of torch's: what is
recorded, when it is replayed, what makes another kind, and when a graph is dropped.

The recorder sees what reaches the dispatcher, so loops are plain torch's; those of Triton are in test_gpu_graphs.py."""

import contextlib
import threading
import warnings

import pytest
import torch

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.core import kept
from lgkernels.ops.equilibrium import dense_plan, field, graphs
from lgkernels.ops.equilibrium.options import Settling, circle, one_phase
from tests.conftest import backend_module
from tests.equilibrium import test_conv_settling, test_settling
from tests.equilibrium.test_settling import cast
from tests.support.tolerances import assert_bit_equal
from tests.training.test_cuda_graph import Recorder, Stream

CIRCLE = circle(0.2, 3)
OPTIONS = Settling("sigmoid", "cross_entropy", "synchronous", 5, None)


class Own(Stream):
    """Also as the event of a replay."""

    number = waits = 0

    @property
    def cuda_stream(self):
        return Own.number

    def record(self, stream):
        pass

    def synchronize(self):
        Own.waits += 1


class Graph(Recorder):
    def capture_begin(self, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)
        self.undo()


class Light:
    """A graph that holds nothing, to be counted."""

    made = replays = 0

    def __init__(self):
        Light.made += 1

    def capture_begin(self, capture_error_mode):
        pass

    def capture_end(self):
        pass

    def replay(self):
        Light.replays += 1


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setattr(graphs, "DEVICE_TYPES", {"cpu"})
    for name, value in dict(CUDAGraph=Graph, Event=Own, Stream=Own, current_stream=Own).items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    for name in ("graph", "synchronize", "empty_cache"):  # of the whole device: another thread's capture breaks

        def refused(*_, name=name):
            raise AssertionError(name)

        monkeypatch.setattr(torch.cuda, name, refused)
    monkeypatch.setattr(Own, "number", 0)
    monkeypatch.setattr(Own, "waits", 0)
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
    return list(graphs._graphs.values())


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
    net = args[2]
    turned = net._replace(weights=[net.weights[0].t().contiguous().t(), *net.weights[1:]])
    other = [
        args,
        dense(samples=3),
        dense(circle(0.3, 3)),
        dense(options=OPTIONS._replace(schedule="asynchronous")),
        dense(options=OPTIONS._replace(steps=6)),
        [*args[:2], turned, *args[3:]],
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
    for many, of in enumerate((torch.backends.cuda.matmul, torch.backends.cudnn.conv), len(other) + 2):
        before = of.fp32_precision
        of.fp32_precision = "ieee" if before == "tf32" else "tf32"  # the older settings are not readable now
        try:
            for _ in range(3):
                settle(module, args)
        finally:
            of.fp32_precision = before
        assert Light.made == many


def test_settings_that_cannot_be_read(module, monkeypatch):
    class Mixed:
        enabled = property(lambda self: torch.get_float32_matmul_precision("no argument"))

    monkeypatch.setattr(torch.backends, "cudnn", Mixed())
    args, expected = dense(), module.settle(*dense())
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(settle(module, args)[0], expected[0]))
    assert not recorded()


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


def test_weights_may_be_temporaries(module):
    """One graph for nets of the same sizes; what it replays is the call's net, also after all others are gone."""
    args = conv()
    kept = args[2]
    for scale in (1.0, 0.9, 0.8, 0.7):
        net = kept._replace(weights=[w * scale for w in kept.weights], biases=[b * scale for b in kept.biases])
        expected = module.settle(*args[:2], net, *args[3:])
        got = settle(module, [*args[:2], net, *args[3:]])
        for a, b in zip(net.weights, kept.weights):
            assert torch.equal(a, b * scale)
            a.fill_(torch.nan)  # as memory that was freed
        assert all(torch.equal(a, b) for a, b in zip(got[0], expected[0]))
    assert [graph.graph.replays for graph in recorded()] == [3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_models_profit(monkeypatch, dtype):
    """Those of half precision, and of convolutions without biases, whose weights are copies."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Light)
    net = lnn.EquilibriumConvNet(1, (2, 3), num_classes=2, steps=5, dtype=dtype)
    weights = {k: w.detach() for k, w in net.named_weights().items() if "readout" in k or "bias" not in k}
    for _ in range(5):
        LF.ep_settle(weights, torch.zeros(2, 1, 8, 8, dtype=dtype), steps=5, activation="dsilu", impl="torch")
    assert (Light.made, Light.replays) == (1, 4)


def test_more_kinds_than_places(module, monkeypatch):
    """In turn, the first ones keep their graphs; those that nothing uses any more make room."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Light)
    monkeypatch.setattr(graphs, "MOST", 2)
    monkeypatch.setattr(graphs, "STALE", 6)
    nets = [dense(samples=samples) for samples in (2, 3, 4)]
    for _ in range(5):
        for args in nets:
            settle(module, args)
    assert (Light.made, Light.replays, Own.waits) == (2, 8, 0)
    for _ in range(9):
        settle(module, nets[2])
    assert (Light.made, Own.waits, len(recorded())) == (3, 1, 2)
    for _ in range(2):
        settle(module, nets[1])
    assert Light.made == 3


def test_tables_are_made_in_a_thread_of_their_own(monkeypatch):
    """A graph that is recorded in the caller's thread would write over them."""
    threads, tensor = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: (threads.append(threading.get_ident()), tensor(*a, **k))[1])
    plans = [dense_plan.plan_of((31, 7), (0, 1), 32, 16, 16, torch.device("cpu")) for _ in range(2)]
    assert plans[0].table is plans[1].table and len(threads) == 1 and threads[0] != threading.get_ident()


def test_a_loop_that_cannot_be_recorded(module, monkeypatch):
    """It is told once, and run as it is from then on."""

    def refusing(loop):
        raise RuntimeError("not here")

    monkeypatch.setattr(Graph, "capture_begin", lambda self, capture_error_mode: refusing(None))
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

"""What ops keep between calls is made before the first run of a compiled graph, and never in a CUDA graph's memory."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lgkernels.functional as LF
from lgkernels.core import dispatch, kept, trust, unit
from lgkernels.ops.lls import basis, block
from tests.lls.blocks import CONV, LINEAR, make
from tests.support.problems import randn, targets

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """As in a new process."""
    for module, name in ((basis, "_table"), (basis, "_signs"), (block, "bin_areas")):
        monkeypatch.setattr(module, name, kept.kept(getattr(module, name).__wrapped__))
    monkeypatch.setattr(unit, "_made", {})
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def made(monkeypatch):
    """Counts what is made; `made.forbidden` says that a graph is running."""

    class Made:
        count, forbidden = 0, False

        def __call__(self, function, device, run=kept.made):
            assert not self.forbidden, "a tensor is made and kept inside of a graph"
            self.count += 1
            return run(function, device)

    counting = Made()
    monkeypatch.setattr(kept, "made", counting)
    monkeypatch.setattr(unit, "made", counting)
    return counting


def loss_of(**options):
    def function(impl):
        x, target = randn(4, 6, 5, 5).requires_grad_(), targets(4, 7)
        return lambda: LF.lls_loss(x, target, num_classes=7, pool_size=2, impl=impl, **options)

    return function


def block_of(case):
    def function(impl):
        module, x, target = make(case, impl)
        return lambda: module(x, target)[1]

    return function


CASES = {
    "loss": loss_of(),
    "loss, cosine": loss_of(waveform="cosine"),
    "convolution": block_of(dict(CONV, modulation="matrix")),
    "pooled, strided": block_of(dict(CONV, max_pool=True, stride=2, H=9, W=7, waveform="cosine")),
    "linear": block_of(dict(LINEAR, modulation="matrix", reduced_rows=4)),
}


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_graph_makes_nothing_that_is_kept(name, impl, made):
    def compiler(graph, _):
        made.forbidden = True
        return graph.forward

    loss = torch.compile(CASES[name](impl), fullgraph=True, backend=compiler)()
    assert made.count
    loss.backward()


@pytest.mark.unpoisoned
def test_sizes_that_are_symbols(made):
    """They are not guessed: what depends on them is made by the first run."""
    module, x, target = make(CONV)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (8, 9, 11):
        x = randn(3, CONV["cin"], size, size)
        assert torch.allclose(compiled(x, target[:3])[1], module(x, target[:3])[1])


def test_what_may_run_is_prepared(monkeypatch):
    """On a GPU kernels and plain torch, which runs where a trial fails."""

    def names(impl):
        found = dispatch.candidates("lls_block", impl, CPU, torch.float32)
        return [module.__name__.rpartition(".")[2] for module in found]

    assert names("torch") == ["torch"] and names("no such backend") == []
    pytest.importorskip("triton")
    monkeypatch.setattr(trust, "DEVICE_TYPES", {"cpu"})
    dispatch._chosen.cache_clear()
    try:
        assert names("auto") == ["triton", "torch"] and names("triton") == ["triton"]
    finally:
        dispatch._chosen.cache_clear()


def test_made_by_a_thread_of_its_own(monkeypatch):
    """The allocator gives a graph's memory to the thread that warms it up or records it."""
    threads = []

    @kept.kept
    def table(n):
        threads.append(threading.get_ident())
        return torch.arange(n)

    with torch.inference_mode(), FakeTensorMode():
        found = table(CPU, 5)
    assert type(found) is torch.Tensor and not found.is_inference() and torch.equal(found, torch.arange(5))
    assert table(CPU, 5) is found and len(threads) == 1 and threads[0] != threading.get_ident()
    with FakeTensorMode():
        assert type(unit.one(CPU)) is torch.Tensor


def test_nothing_is_made_during_a_capture(monkeypatch):
    table = kept.kept(lambda n: torch.arange(n))
    monkeypatch.setattr(kept, "capturing", lambda device: True)
    with pytest.raises(
        RuntimeError, match="cannot be made while a CUDA graph is captured: run one step before the cap"
    ):
        table(CPU, 5)
    with pytest.raises(RuntimeError, match="cannot be made while a CUDA graph is captured"):
        unit.one(CPU)
    monkeypatch.setattr(kept, "capturing", lambda device: False)
    first, one = table(CPU, 5), unit.one(CPU)
    monkeypatch.setattr(kept, "capturing", lambda device: True)
    assert table(CPU, 5) is first and unit.one(CPU) is one


def test_what_lies_on_a_gpu_is_never_freed(monkeypatch):
    """A graph that reads it holds its address alone."""
    monkeypatch.setattr(kept, "made", lambda make, device: make())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    table = kept.kept(lambda n: torch.arange(n))
    gpu = torch.device("cuda", 1)
    first = table(gpu, 0)
    for n in range(2 * kept.MOST):
        table(gpu, n)
    assert table(gpu, 0) is first and table(torch.device("cuda"), 0) is first
    assert table(torch.device("cuda", 0), 0) is not first


def test_a_graph_of_its_own_leaves_what_other_graphs_read():
    others = unit.one(CPU)
    with unit.own(CPU) as own:
        assert own is unit.one(CPU) is not others
    assert unit.one(CPU) is others

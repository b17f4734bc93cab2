"""torch.compile(fullgraph=True) over every op: forward and backward as eager, and no storm of recompilations."""

import copy
import shutil
import typing

import pytest
import torch

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.random import RandomFeedback
from tests.lls.blocks import CONV, LINEAR, make
from tests.lls.problems import modulation
from tests.support.calls import all_calls, is_float, weighted
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_relative

pytestmark = pytest.mark.unpoisoned


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["aot_eager", "inductor"])
def compiler(request):
    if request.param == "inductor" and not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    return request.param


def step(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    function(*leaves).backward()
    return [t.grad for t in leaves]


@pytest.mark.parametrize("kind", ["none", "matrix"])
@pytest.mark.only(where=lambda compiler, backend: compiler != "inductor" or backend in ("cpu", "cuda-simt"))
def test_loss_inside_a_graph(compiler, impl, kind):
    m = [] if kind == "none" else [modulation(kind, 6, 6)]
    target = targets(3, 6)

    def function(weight, *m):
        h = torch.tanh(source @ weight)
        return LF.lls_loss(h, target, *m, num_classes=6, pool_size=4, impl=impl) * 3 + h.square().mean()

    source, weight = randn(3, 5), randn(5, 8, seed=1)
    eager = step(function, [weight, *m])
    compiled = step(torch.compile(function, fullgraph=True, backend=compiler), [weight, *m])
    for a, b in zip(compiled, eager):
        assert_relative("gradient", a, b, 1e-5)


@pytest.mark.parametrize("case", [dict(CONV, modulation="matrix", max_pool=True), LINEAR], ids=["conv", "linear"])
@pytest.mark.only(
    where=lambda compiler, backend, case: (
        compiler != "inductor" or (backend in ("cpu", "cuda-simt") and "features" not in case)
    )
)
def test_block(compiler, impl, case):
    block, x, target = make(case, impl)
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    for _ in range(2):
        out, loss = compiled(x, target)
        loss.backward()
        expected, expected_loss = eager(x, target)
        expected_loss.backward()
    assert_relative("out", out, expected, 1e-6)
    assert_relative("loss", loss, expected_loss, 1e-6)
    for (name, p), q in zip(block.named_parameters(), eager.parameters()):
        assert (p.grad is None) == (q.grad is None) or name == "layer.bias"
        if q.grad is not None and name != "layer.bias":
            assert_relative(name, p.grad, q.grad, 1e-5)
    for (name, p), q in zip(block.named_buffers(), eager.buffers()):
        assert_relative(name, p.float(), q.float(), 1e-6)


def test_a_changing_batch_size_compiles_at_most_once_more(impl):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def function(activation, target):
        return LF.lls_loss(activation, target, num_classes=6, pool_size=2, impl=impl)

    block, _, _ = make(CONV, impl)
    compiled = torch.compile(block, fullgraph=True, backend=count)
    for batch in (3, 5, 7, 9, 4):
        activation, target = randn(batch, 2, 4, 4).requires_grad_(), targets(batch, 6)
        loss = function(activation, target)
        loss.backward()
        assert_relative("loss", loss, LF.lls_loss(activation, target, num_classes=6, pool_size=2, impl=impl), 1e-6)
    assert len(graphs) <= 2
    graphs.clear()
    for batch in (3, 5, 7, 9, 4):
        compiled(randn(batch, 3, 8, 8), targets(batch, 10))[1].backward()
    assert len(graphs) <= 2


@pytest.mark.parametrize("given", [False, True], ids=["formula", "matrix"])
def test_direct_signals(given):
    place = lnn.DirectFeedback(feedback=randn(6, 4) if given else None)
    feedback = randn(6, 4) if given else RandomFeedback(1)
    functions = (
        lambda e, t, a: LF.target_projection(t, feedback, (4,)),
        lambda e, t, a: place.signal(e, a),
        lambda e, t, a: place.target_signal(t, a),
    )
    arguments = randn(3, 6), targets(3, 6), randn(3, 4)
    for function in functions:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments), function(*arguments))


CALLS = {name: call for name, call in all_calls().items() if call.compiles}


def given(name, seeded):
    """Arguments of a valid call; `seeded`: random matrices by formula, where the function takes them."""
    function, arguments = getattr(LF, name), dict(CALLS[name].arguments)
    for own, hint in typing.get_type_hints(function).items() if seeded else ():
        if RandomFeedback in typing.get_args(hint):
            arguments[own] = RandomFeedback(1)
    return arguments


def outputs_and_gradients(function, arguments, learning):
    own = {k: v.clone().requires_grad_() if learning and is_float(v) else v for k, v in arguments.items()}
    loss = weighted(function(**own))
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), {k: v.grad for k, v in own.items() if is_float(v)}


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_every_function_is_one_graph(name, seeded, learning):
    arguments = given(name, seeded)
    if seeded and not any(isinstance(v, RandomFeedback) for v in arguments.values()):
        by_reference = {"impl": "reference"} if "impl" in typing.get_type_hints(getattr(LF, name)) else {}
        seeded, arguments = False, {**arguments, **by_reference}
    function = getattr(LF, name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    loss, grads = outputs_and_gradients(compiled, arguments, learning)
    expected_loss, expected = outputs_and_gradients(function, arguments, learning)
    assert_relative("result", loss, expected_loss, 1e-6)
    for own, gradient in expected.items():
        assert (gradient is None) == (grads[own] is None), own
        if gradient is not None:
            assert_relative(own, grads[own], gradient, 1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_numbers_that_change(name):
    """Numbers and sizes are symbols here, from the first call on."""
    function = getattr(LF, name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_relative("result", weighted(compiled(**given(name, False))), weighted(function(**given(name, False))), 1e-6)

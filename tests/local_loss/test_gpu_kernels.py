"""The cases of tests/local_loss/test_kernels.py on a CUDA device, and what only a device can show of the losses
and of the offset step."""

import pytest
import torch

import lgkernels.functional as LF
from tests.conftest import backend_module
from tests.local_loss.test_kernels import *  # noqa: F403
from tests.support.gpu import backend, on_the_device  # noqa: F401
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_bit_equal, assert_relative


def step(impl, h, weight, target):
    """Loss and gradients of the three families, from leaves h and weight."""
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = LF.local_cross_entropy(h, weight, None, target, impl=impl)
    loss = loss + LF.goodness_loss(h, target > 4, impl=impl)
    loss = loss + LF.similarity_matching_loss(h, target, num_classes=len(weight), impl=impl)
    loss.backward()
    return [loss.detach(), h.grad, weight.grad]


def problem(batch=64, dtype=torch.float32):
    return (randn(batch, 96, 14, 14, dtype=dtype).cuda(), randn(10, 96, seed=1).cuda(), targets(batch, 10).cuda())


def sgd(module, momentum=0.9):
    lists = [[randn(n, seed=7 * n + i).cuda() for n in (40000, 5, 999)] for i in range(4)]
    module.step_(*lists, 0.1, momentum, 0.01, 1.0, 0.5)
    return lists[0] + lists[2]


@pytest.mark.unpoisoned
def test_no_synchronisation(impl):
    arguments = problem()
    step(impl, *arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(impl, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_stream(impl):
    h, weight, target = problem()
    expected = step(impl, h, weight, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late = torch.zeros_like(h)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(h)
        got = step(impl, late, weight, target)
    stream.synchronize()
    for i, (a, b) in enumerate(zip(got, expected)):
        assert_bit_equal(f"result {i}", a, b)


@pytest.mark.unpoisoned
def test_cuda_graph(impl, backend):
    """Losses, gradients and the optimizer step are captured; the replay on other data is the eager step."""
    h, weight, target = problem()
    update = backend_module("offset", backend).step_
    buffer, offset = torch.zeros_like(weight), torch.ones_like(weight)
    gradient = torch.empty_like(weight)

    def whole(own):
        results = step(impl, h, own, target)
        gradient.copy_(results[2])
        update([own], [gradient], [buffer], [offset], 0.1, 0.9, 0.0, 1.0, 0.5)
        return results

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            whole(weight)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole(weight)
    h.copy_(torch.randn_like(h))
    twin, before = weight.clone(), buffer.clone()
    graph.replay()
    replayed = [t.clone() for t in (*captured, weight, buffer)]
    buffer.copy_(before)
    expected = [*whole(twin), twin, buffer]
    for i, (a, b) in enumerate(zip(replayed, expected)):
        assert_relative(f"result {i}", a.cpu(), b.cpu(), 1e-5)


def test_repeatable_bit_for_bit(impl, backend):
    arguments, update = problem(dtype=torch.bfloat16), backend_module("offset", backend)
    first = step(impl, *arguments) + sgd(update)
    for _ in range(20):
        for i, (a, b) in enumerate(zip(step(impl, *arguments) + sgd(update), first)):
            assert_bit_equal(f"result {i}", a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["dense", "channels_last"])
def test_more_than_2_to_the_31_elements(backend, layout):
    if backend == "reference" or torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory, and kernels")
    local, reference = backend_module("local_loss", backend), backend_module("local_loss", "reference")
    h = torch.empty(8200, 64, 64, 64, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_()
    weight, target, one = randn(10, 64).cuda(), targets(8200, 10).cuda(), torch.ones((), device="cuda")
    loss, pooled, *_ = local.local_cross_entropy(h, weight, None, target, 0.0, "none", True)
    assert_relative("pooled", pooled[-3:].cpu(), h[-3:].float().mean((2, 3)).cpu(), 1e-4)
    _, kappa, squares = local.goodness(h, target > 4, 1.0, True, True)
    assert_relative("squares", squares[-3:].cpu(), h[-3:].float().square().sum((1, 2, 3)).cpu(), 1e-4)
    got = local.goodness_grad(h, kappa, one)[-3:]
    assert_relative("goodness", got.cpu(), reference.goodness_grad(h[-3:], kappa[-3:], one).cpu(), 1e-2)
    del got
    _, grad, mean = local.similarity(h, target, 10, True, True)
    got = local.similarity_grad(h, grad, mean, one)[-3:]
    assert_relative("similarity", got.cpu(), reference.similarity_grad(h[-3:], grad[-3:], mean[-3:], one).cpu(), 1e-2)


def test_step_of_more_than_2_to_the_31_elements(backend):
    if backend == "reference" or torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free device memory, and kernels")
    n = 2**31 + 100
    param, grad, buffer = (torch.full((n,), value, device="cuda") for value in (1.0, 2.0, 3.0))
    offset = torch.ones(n, device="cuda", dtype=torch.bfloat16)
    backend_module("offset", backend).step_([param], [grad], [buffer], [offset], 0.5, 0.5, 0.0, 1.0, 1.0)
    assert (param[-100:] == -1.25).all() and (buffer[-100:] == 4.5).all() and (param[:100] == -1.25).all()

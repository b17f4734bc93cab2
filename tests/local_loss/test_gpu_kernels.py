"""The cases of tests/local_loss/test_kernels.py on a CUDA device, and what only a device can show of the losses."""

import pytest
import torch

import lgkernels.functional as LF
from tests.conftest import backend_module
from tests.local_loss.test_kernels import *  # noqa: F403
from tests.support.gpu import backend, on_the_device, test_no_kernel_is_at_fault  # noqa: F401
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_bit_equal, assert_relative

pytestmark = pytest.mark.op("local_cross_entropy", "goodness", "similarity")


def cross_entropy(h, weight, target, impl):
    return LF.local_cross_entropy(h, weight, None, target, impl=impl)


def goodness(h, weight, target, impl):
    return LF.goodness_loss(h, target > 4, impl=impl)


def similarity(h, weight, target, impl):
    return LF.similarity_matching_loss(h, target, num_classes=len(weight), impl=impl)


LOSSES = pytest.mark.parametrize(
    "loss",
    [
        pytest.param(cross_entropy, marks=pytest.mark.op("local_cross_entropy")),
        pytest.param(goodness, marks=pytest.mark.op("goodness")),
        pytest.param(similarity, marks=pytest.mark.op("similarity")),
    ],
)


def step(loss, impl, h, weight, target):
    """Loss and gradients, from leaves h and weight."""
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
    value = loss(h, weight, target, impl)
    value.backward()
    return [t for t in (value.detach(), h.grad, weight.grad) if t is not None]


def problem(batch=64, dtype=torch.float32):
    return (randn(batch, 96, 14, 14, dtype=dtype).cuda(), randn(10, 96, seed=1).cuda(), targets(batch, 10).cuda())


@LOSSES
@pytest.mark.unpoisoned
def test_no_synchronisation(impl, loss):
    arguments = problem()
    step(loss, impl, *arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(loss, impl, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@LOSSES
def test_other_stream(impl, loss):
    h, weight, target = problem()
    expected = step(loss, impl, h, weight, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late = torch.zeros_like(h)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(h)
        got = step(loss, impl, late, weight, target)
    stream.synchronize()
    for i, (a, b) in enumerate(zip(got, expected)):
        assert_bit_equal(f"result {i}", a, b)


@LOSSES
@pytest.mark.unpoisoned
def test_cuda_graph(impl, loss):
    """Loss and gradients are captured; the replay on other data is the eager step."""
    h, weight, target = problem()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(loss, impl, h, weight, target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(loss, impl, h, weight, target)
    h.copy_(torch.randn_like(h))
    graph.replay()
    replayed = [t.clone() for t in captured]
    for i, (a, b) in enumerate(zip(replayed, step(loss, impl, h, weight, target))):
        assert_relative(f"result {i}", a.cpu(), b.cpu(), 1e-5)


@LOSSES
def test_repeatable_bit_for_bit(impl, loss):
    arguments = problem(dtype=torch.bfloat16)
    first = step(loss, impl, *arguments)
    for _ in range(20):
        for i, (a, b) in enumerate(zip(step(loss, impl, *arguments), first)):
            assert_bit_equal(f"result {i}", a, b)


@pytest.mark.alone
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["dense", "channels_last"])
def test_more_than_2_to_the_31_elements(backend, layout):
    if backend in ("reference", "torch") or torch.cuda.mem_get_info()[0] < 24 * 2**30:
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

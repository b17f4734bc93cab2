"""The cases of tests/forward_gradient/test_kernels.py on a CUDA device, and what only a device can show of them."""

import pytest
import torch

import lgkernels.functional as LF
from lgkernels.ops.forward_gradient.options import Noise, NormOptions
from tests.conftest import backend_module
from tests.forward_gradient.test_kernels import *  # noqa: F403
from tests.support.gpu import backend, on_the_device, test_no_kernel_is_at_fault  # noqa: F401
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_bit_equal, assert_relative

pytestmark = pytest.mark.op("replicated_cross_entropy", "replicated_nt_xent", "replicated_tangent", "dual_norm")


def cross_entropy(x, weight, target, impl):
    return LF.replicated_cross_entropy(x, weight, None, target, layer_norm=True, impl=impl)


def nt_xent(x, weight, target, impl):
    return LF.replicated_nt_xent(x, x.flip(0), weight, None, impl=impl)


LOSSES = pytest.mark.parametrize(
    "loss",
    [
        pytest.param(cross_entropy, marks=pytest.mark.op("replicated_cross_entropy", "replicated_tangent")),
        pytest.param(nt_xent, marks=pytest.mark.op("replicated_nt_xent", "replicated_tangent")),
    ],
)


def step(loss, impl, x, weight, target):
    """Loss and gradients, from leaves x and weight; a layer with its tangent and gradient."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    value = loss(x, weight, target, impl)
    value.sum().backward()
    return [value.detach(), x.grad, weight.grad]


def layer(kernels, z, state):
    noise, options = Noise(None, state), NormOptions(3, 1e-5, True)
    both = kernels.dual_norm(z, z, None, noise, options)
    return [both, kernels.activity_grad(z, both[0], z.narrow(3, 0, 1), noise, options)]


def problem(batch=64, dtype=torch.float32):
    return randn(batch, 64, 16, 32, dtype=dtype).cuda(), randn(512, 10, seed=1).cuda(), targets(batch, 10).cuda()


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
    x, weight, target = problem()
    expected = step(loss, impl, x, weight, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late = torch.zeros_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        got = step(loss, impl, late, weight, target)
    stream.synchronize()
    for i, (a, b) in enumerate(zip(got, expected)):
        assert_bit_equal(f"result {i}", a, b)


@LOSSES
@pytest.mark.unpoisoned
def test_cuda_graph(impl, loss):
    """Loss and gradients are captured; the replay on other data is the eager step."""
    x, weight, target = problem()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(loss, impl, x, weight, target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(loss, impl, x, weight, target)
    x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [t.clone() for t in captured]
    for i, (a, b) in enumerate(zip(replayed, step(loss, impl, x, weight, target))):
        assert_relative(f"result {i}", a.cpu(), b.cpu(), 1e-5)


@LOSSES
def test_repeatable_bit_for_bit(impl, loss):
    arguments = problem(dtype=torch.bfloat16)
    first = step(loss, impl, *arguments)
    for _ in range(20):
        for i, (a, b) in enumerate(zip(step(loss, impl, *arguments), first)):
            assert_bit_equal(f"result {i}", a, b)


@pytest.mark.op("dual_norm")
@pytest.mark.unpoisoned
def test_layer_in_a_cuda_graph_follows_its_state(backend):
    if backend in ("reference", "torch"):
        pytest.skip("the noise of plain torch is compared with its definition before it is captured")
    kernels, z = backend_module("forward_gradient", backend), problem()[0]
    state = torch.tensor([5, 1, 2], device="cuda")
    layer(kernels, z, state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(kernels, z, state)
    state[2] += 1
    graph.replay()
    for i, (a, b) in enumerate(zip(captured, layer(kernels, z, state))):
        assert_bit_equal(f"result {i}", a, b)


@pytest.mark.alone
def test_more_than_2_to_the_31_elements(backend):
    if backend in ("reference", "torch") or torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of free device memory, and kernels")
    kernels, reference = backend_module("forward_gradient", backend), backend_module("forward_gradient", "reference")
    x = torch.empty(1040, 1024, 64, 32, dtype=torch.bfloat16, device="cuda").normal_()
    last = slice(-2, None)
    assert_relative("pooled", kernels.pooled(x, True)[last].cpu(), reference.pooled(x[last], True).cpu(), 1e-4)
    teach, grad = randn(1040, 2048).cuda(), torch.empty(1040, 1024, 64, device="cuda")
    kernels.tangent(None, x, teach, None, grad)
    expected = reference.tangent(None, x[last], teach[last], None, torch.empty_like(grad[last]))
    assert_relative("tangent", grad[last].cpu(), expected.cpu(), 1e-4)
    got = kernels.cotangent(None, grad, teach, torch.empty_like(x))[last]
    expected = reference.cotangent(None, grad[last], teach[last], torch.empty_like(x[last]))
    assert_relative("cotangent", got.cpu(), expected.cpu(), 1e-2)
    del got
    options = NormOptions(3, 1e-5, True)
    got = kernels.dual_norm(x, x, None, Noise(), options)[:, last]
    assert_relative("dual_norm", got.cpu(), reference.dual_norm(x[last], x[last], None, Noise(), options).cpu(), 1e-2)

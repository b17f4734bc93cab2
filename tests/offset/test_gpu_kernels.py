"""The cases of tests/offset/test_kernels.py on a CUDA device, and what only a device can show."""

import pytest
import torch

from lgkernels.ops.offset.options import StepOptions
from tests.conftest import backend_module
from tests.offset.test_kernels import *  # noqa: F403
from tests.support.gpu import backend, on_the_device, test_no_kernel_is_at_fault  # noqa: F401
from tests.support.problems import randn
from tests.support.tolerances import assert_bit_equal, assert_relative

pytestmark = pytest.mark.op("offset_sgd_")


def tensors(*sizes):
    """Parameters, gradients, momentum buffers, offsets."""
    return [[randn(n, seed=7 * n + i).cuda() for n in sizes] for i in range(4)]


@pytest.mark.unpoisoned
def test_cuda_graph(backend):
    """A step is captured; its replay with other gradients is the eager step."""
    update, lists = backend_module("offset", backend).step_, tensors(40000, 5, 999)

    def step(lists):
        update(*lists, StepOptions(0.1, 0.9, 0.01, 1.0, 0.5))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(lists)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(lists)
    for gradient in lists[1]:
        gradient.copy_(torch.randn_like(gradient))
    twins = [[t.clone() for t in group] for group in lists]
    graph.replay()
    step(twins)
    for name, got, expected in zip(("parameter", "gradient", "momentum buffer", "offset"), lists, twins):
        for i, (a, b) in enumerate(zip(got, expected)):
            assert_relative(f"{name} {i}", a.cpu(), b.cpu(), 1e-5)


def test_repeatable_bit_for_bit(backend):
    update, runs = backend_module("offset", backend).step_, []
    for _ in range(20):
        lists = tensors(40000, 5, 999)
        update(*lists, StepOptions(0.1, 0.9, 0.01, 1.0, 0.5))
        runs.append(lists[0] + lists[2])
    for run in runs[1:]:
        for i, (a, b) in enumerate(zip(run, runs[0])):
            assert_bit_equal(f"result {i}", a, b)


@pytest.mark.alone
def test_step_of_more_than_2_to_the_31_elements(backend):
    if backend in ("reference", "torch") or torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free device memory, and kernels")
    n = 2**31 + 100
    param, grad, buffer = (torch.full((n,), value, device="cuda") for value in (1.0, 2.0, 3.0))
    offset = torch.ones(n, device="cuda", dtype=torch.bfloat16)
    backend_module("offset", backend).step_([param], [grad], [buffer], [offset], StepOptions(0.5, 0.5, 0.0, 1.0, 1.0))
    assert (param[-100:] == -1.25).all() and (buffer[-100:] == 4.5).all() and (param[:100] == -1.25).all()

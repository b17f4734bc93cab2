"""The cases of tests/lls/test_blocks.py on a CUDA device, and what only a device can show."""

import pytest
import torch

from tests.lls.blocks import CONV, LINEAR, make, results
from tests.lls.test_blocks import test_loss_factor, test_step  # noqa: F401
from tests.support.cases import label
from tests.support.gpu import backend, on_the_device  # noqa: F401
from tests.support.problems import targets
from tests.support.tolerances import assert_bit_equal, assert_relative

pytestmark = pytest.mark.op("lls_block")
BOTH = pytest.mark.parametrize(
    "case", [dict(CONV, modulation="matrix", max_pool=True), dict(LINEAR, modulation="vector")], ids=["conv", "linear"]
)
IMPLEMENTED = pytest.mark.parametrize("case", [dict(CONV, modulation="vector"), LINEAR], ids=label)


def device_problem(case, impl):
    block, x, target = make(case, impl)
    return block.cuda(), x.cuda(), target.cuda()


@BOTH
@pytest.mark.unpoisoned
def test_no_synchronisation(impl, case):
    block, x, target = device_problem(case, impl)
    block(x, target)[1].backward()  # compilation and tables
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block(x, target)[1].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BOTH
def test_other_stream(impl, case):
    """The kernels run where the caller's stream is, after what was queued there."""
    block, x, target = device_problem(case, impl)
    expected = {name: value.clone() for name, value in results(block, x, target).items()}
    other, _, _ = device_problem(case, impl)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    source, late = x.clone(), torch.zeros_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(source)
        got = results(other, late, target)
    stream.synchronize()
    for name, value in expected.items():
        assert_bit_equal(name, got[name], value)


@BOTH
@pytest.mark.unpoisoned
def test_cuda_graph(impl, case):
    """A whole step, forward and backward, is captured; its replay on other data is the eager step."""
    block, x, target = device_problem(case, impl)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            block.zero_grad(set_to_none=True)
            block(x, target)[1].backward()
    torch.cuda.current_stream().wait_stream(stream)
    block.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, loss = block(x, target)
        loss.backward()
    twin, _, _ = device_problem(case, impl)
    twin.load_state_dict(block.state_dict())
    x.copy_(torch.randn_like(x))
    target.copy_(targets(len(target), 10, seed=77))
    graph.replay()
    torch.cuda.synchronize()
    expected = results(twin, x, target)
    assert_relative("out", out.cpu(), expected["out"].cpu(), 1e-6)
    assert_relative("loss", loss.cpu(), expected["loss"].cpu(), 1e-6)
    for name, parameter in block.named_parameters():
        if name != "layer.bias":
            assert_relative(name, parameter.grad.cpu(), expected[name].cpu(), 1e-5)


@pytest.mark.alone
@pytest.mark.op("lls_loss", "lls_block")
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_2_to_the_31_elements(impl, channels_last):
    """Every kernel of the block over 4.3 GB of bfloat16; the last samples against the reference on them alone."""
    shape, pool = (8200, 64, 64, 64), 2
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free device memory")
    if impl in ("reference", "torch"):
        pytest.skip("it has no kernels; the reference widens everything to float32 several times over")
    from lgkernels.ops.lls import reference
    from tests.conftest import backend_module

    kernels = backend_module("lls", impl)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    z = torch.empty(shape, dtype=torch.bfloat16, device="cuda").to(memory_format=memory_format).normal_()
    assert z.numel() > 2**31
    mean, rstd = kernels.batch_stats(z, None, None, None, 0.1, 1e-5)
    assert mean.abs().max() < 1e-3 and (rstd - 1).abs().max() < 1e-3
    tail = z[-3:].clone()
    gamma, beta = torch.rand(64, device="cuda") + 0.5, torch.rand(64, device="cuda")
    norm = mean, rstd, gamma, beta
    out, x, s1, s2 = kernels.norm_act_pool(z, *norm, 0.01, pool, False, True)
    expected = reference.norm_act_pool(tail, *norm, 0.01, pool, False, True)
    for name, got, want in zip(("out", "latents", "s1", "s2"), (out, x, s1, s2), expected):
        assert_relative(name, got[-3:].cpu(), want.cpu(), 1e-2 if name == "out" else 1e-4)
    assert_relative("latents", kernels.latents(z, pool)[-3:].cpu(), reference.latents(tail, pool).cpu(), 1e-4)
    grad = torch.randn_like(x)
    one = torch.ones((), device="cuda")
    assert_relative(
        "expand_grad",
        kernels.expand_grad(grad, one, out, pool)[-3:].cpu(),
        reference.expand_grad(grad[-3:], one, torch.empty_like(tail), pool).cpu(),
        1e-2,
    )
    zeros = torch.zeros(64, device="cuda")
    dz = kernels.grad_preactivation_(z, *norm, 0.01, grad, zeros, zeros, pool, 1.0)[-3:]
    want = reference.grad_preactivation_(tail, *norm, 0.01, grad[-3:], zeros, zeros, pool, 1.0)
    assert_relative("dz", dz.cpu(), want.cpu(), 1e-2)


@IMPLEMENTED
def test_repeatable_bit_for_bit(impl, case):
    runs = []
    for _ in range(20):
        block, x, target = device_problem(dict(case, B=64), impl)
        runs.append(results(block, x, target))
    for run in runs[1:]:
        for name in ("loss", "norm.weight", "norm.bias", "running_mean"):
            assert_bit_equal(name, run[name], runs[0][name])


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(impl, case, dtype):
    block, x, target = device_problem(case, impl)
    twin, _, _ = device_problem(case, "reference")
    with torch.autocast("cuda", dtype):
        out, loss = block(x, target)
        out2, loss2 = twin(x, target)
    loss.backward()
    loss2.backward()
    assert out.dtype == dtype and loss.dtype == torch.float32
    assert_relative("out", out.cpu(), out2.cpu(), 0.02)
    assert_relative("loss", loss.cpu(), loss2.cpu(), 0.01)
    for (name, p), q in zip(block.named_parameters(), twin.parameters()):
        assert_relative(name, p.grad.cpu(), q.grad.cpu(), 0.05)
